/* One loss, its gradient and Recall@1 from plain C.
 *
 *   packaging/install.sh ~/.local
 *   cd examples/c && PKG_CONFIG_PATH=~/.local/lib/pkgconfig make && ./loss
 */
#include <ddtas.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { CLASSES = 20, EACH = 4, COUNT = CLASSES * EACH, DIM = 64 };

/* Uniform in -1 to 1, the same on every machine. */
static float draw(uint64_t *state) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (float)((double)(*state >> 40) / (1 << 23) - 1.0);
}

/* Rows around a centre for each class, scaled to unit length. */
static void draw_batch(float *rows, int64_t *labels) {
    uint64_t noise = 1;
    for (int i = 0; i < COUNT; i++) {
        labels[i] = i / EACH;
        uint64_t centre = 1000 + (uint64_t)labels[i];
        double norm = 0;
        for (int d = 0; d < DIM; d++) {
            float value = draw(&centre) + 1.5f * draw(&noise);
            rows[i * DIM + d] = value;
            norm += (double)value * value;
        }
        for (int d = 0; d < DIM; d++)
            rows[i * DIM + d] = (float)(rows[i * DIM + d] / sqrt(norm));
    }
}

static void expect(const ddtas_context *context, ddtas_status status, const char *call) {
    if (status == DDTAS_STATUS_OK)
        return;
    char message[256];
    ddtas_context_message(context, message, sizeof message);
    fprintf(stderr, "%s: status %d: %s\n", call, (int)status, message);
    exit(1);
}

int main(void) {
    static float rows[COUNT * DIM], gradient[COUNT * DIM];
    static int64_t labels[COUNT];
    draw_batch(rows, labels);

    char message[256];
    ddtas_context_options options = {.struct_size = sizeof options, .device = "cpu", .threads = 2};
    ddtas_context *context;
    if (ddtas_context_create(&options, &context, message, sizeof message) != DDTAS_STATUS_OK) {
        fprintf(stderr, "ddtas_context_create: %s\n", message);
        return 1;
    }

    ddtas_settings settings;
    ddtas_settings_init(&settings, sizeof settings);
    settings.lambda_pos = settings.lambda_neg = 0.6;

    ddtas_rows batch = {.struct_size = sizeof batch, .embeddings = rows, .labels = labels, .count = COUNT, .dim = DIM};
    ddtas_loss_result result = {.struct_size = sizeof result, .gradient = gradient};
    expect(context, ddtas_loss(context, &settings, &batch, NULL, &result), "ddtas_loss");


    double square = 0;
    for (int i = 0; i < COUNT * DIM; i++)
        square += (double)gradient[i] * gradient[i];
    size_t ks[] = {1, 4};
    double recall[2];
    expect(context, ddtas_recall_at_k(context, &batch, ks, 2, recall, NULL), "ddtas_recall_at_k");

    printf("ddtas %s on the CPU: %d rows of %d\n", ddtas_version(), COUNT, DIM);
    printf("loss %.6f, |gradient| %.6f\n", result.loss, sqrt(square));
    printf("%llu active anchors, %llu positive and %llu negative pairs mined\n", (unsigned long long)result.active,
           (unsigned long long)result.mined_pos, (unsigned long long)result.mined_neg);
    printf("Recall@1 %.3f, Recall@4 %.3f\n", recall[0], recall[1]);
    ddtas_context_destroy(context);
    return result.active > 0 && square > 0 ? 0 : 1;
}
