/* Shared by the C tests: checks that print failures and count, and a batch. */
#ifndef CHECK_H
#define CHECK_H

#include <ddtas.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures, checks;

#define CHECK(condition)                                                                                     \
    do {                                                                                                     \
        checks++;                                                                                            \
        if (!(condition)) {                                                                                  \
            failures++;                                                                                      \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                                  \
        }                                                                                                    \
    } while (0)

/* Checks a refusal: its status, and a message of one line that contains `text`. */
static inline void refused_at(int line, const ddtas_context *context, ddtas_status got, ddtas_status want,
                              const char *text) {
    char message[512];
    size_t length = ddtas_context_message(context, message, sizeof message);
    checks++;
    if (got != want || length == 0 || strchr(message, '\n') || !strstr(message, text)) {
        failures++;
        fprintf(stderr, "line %d: status %d, want %d; message \"%s\", want \"%s\" in it\n", line, (int)got,
                (int)want, message, text);
    }
}
#define REFUSED(context, got, want, text) refused_at(__LINE__, context, got, want, text)

enum { COUNT = 60, DIM = 24 };

/* Unit rows of 12 classes, and the structs that point to them. */
typedef struct {
    float rows[COUNT * DIM];
    int64_t labels[COUNT];
    float gradient[COUNT * DIM];
    ddtas_rows view;
    ddtas_loss_result result;
} fixture;

static inline float draw(uint64_t *state) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (float)((double)(*state >> 40) / (1 << 23) - 1.0);
}

static inline void fill(fixture *f, uint64_t seed) {
    memset(f, 0, sizeof *f);
    for (int i = 0; i < COUNT; i++) {
        f->labels[i] = i % 12;
        uint64_t centre = 1000 + (uint64_t)f->labels[i];
        double square = 0;
        for (int d = 0; d < DIM; d++) {
            float value = draw(&centre) + draw(&seed);
            f->rows[i * DIM + d] = value;
            square += (double)value * value;
        }
        for (int d = 0; d < DIM; d++)
            f->rows[i * DIM + d] = (float)(f->rows[i * DIM + d] / sqrt(square));
    }
    f->view = (ddtas_rows){
        .struct_size = sizeof(ddtas_rows), .embeddings = f->rows, .labels = f->labels, .count = COUNT, .dim = DIM};
    f->result = (ddtas_loss_result){.struct_size = sizeof(ddtas_loss_result), .gradient = f->gradient};
}

static inline ddtas_context *open_context(size_t threads) {
    ddtas_context_options options = {.struct_size = sizeof options, .device = "cpu", .threads = threads};
    ddtas_context *context = NULL;
    CHECK(ddtas_context_create(&options, &context, NULL, 0) == DDTAS_STATUS_OK);
    if (!context)
        exit(1);
    return context;
}

/* Prints the summary; the exit status. */
static inline int report(const char *name) {
    printf("%s: %d checks, %d failed\n", name, checks, failures);
    return checks == 0 || failures > 0;
}

#endif
