/* A forked child computes what its parent computes, in the parent's contexts and in new ones, whatever other threads
* did at the fork; and a destroyed context leaves no thread behind. */
#define _POSIX_C_SOURCE 200809L
#include "check.h"

#include <dirent.h>
#include <pthread.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { ROWS = 600, WIDTH = 64, SECONDS = 30 };

/* Large enough for every pass to be split among threads. */
static float rows[ROWS * WIDTH], gradient[ROWS * WIDTH];
static int64_t labels[ROWS];
static uint32_t indices[ROWS * 3];
static float similarities[ROWS * 3];
static float numbers[2][ROWS];
static uint32_t counts[2][ROWS];

static void draw_rows(void) {
    uint64_t seed = 5;
    for (int i = 0; i < ROWS; i++) {
        labels[i] = i % 50;
        uint64_t centre = 1000 + (uint64_t)labels[i];
        double square = 0;
        for (int d = 0; d < WIDTH; d++) {
            float value = draw(&centre) + draw(&seed);
            rows[i * WIDTH + d] = value;
            square += (double)value * value;
        }
        for (int d = 0; d < WIDTH; d++)
            rows[i * WIDTH + d] = (float)(rows[i * WIDTH + d] / sqrt(square));
    }
}

typedef struct {
    double loss, in_steps, pos, neg, recall;
    float gradient, similarity;
    uint32_t index;
} answers;

/* Calls every function of the header. */
static answers compute(ddtas_context *context) {
    answers found;
    memset(&found, 0, sizeof found);
    ddtas_rows view = {
        .struct_size = sizeof view, .embeddings = rows, .labels = labels, .count = ROWS, .dim = WIDTH};
    ddtas_loss_result result = {.struct_size = sizeof result, .gradient = gradient};
    ddtas_tangents tangents = {.struct_size = sizeof tangents, .anchors = rows};
    size_t k = 2, bytes = 0;
    char name[8];
    CHECK(ddtas_loss(context, NULL, &view, NULL, &result) == DDTAS_STATUS_OK);
    CHECK(ddtas_threshold_gradient(context, &view, NULL, &tangents, &found.pos, &found.neg) == DDTAS_STATUS_OK);
    /* The whole batch as the only part: each step's output is the next one's input. */
    ddtas_rows known = view;
    known.identity = DDTAS_IDENTITY_FROM;
    ddtas_loss_result steps = {.struct_size = sizeof steps, .min_pos = numbers[0], .max_neg = numbers[1],
                               .count_pos = counts[0], .count_neg = counts[1]};
    ddtas_part part = {.struct_size = sizeof part, .total = ROWS, .reference_numbers = ROWS,
                       .min_pos = numbers[0], .reference_min_pos = numbers[0],
                       .max_neg = numbers[1], .reference_max_neg = numbers[1],
                       .count_pos = counts[0], .reference_count_pos = counts[0],
                       .count_neg = counts[1], .reference_count_neg = counts[1]};
    CHECK(ddtas_same_class(context, NULL, &view, &known, &part, &steps) == DDTAS_STATUS_OK);
    CHECK(ddtas_sweep(context, &view, &known, &part, &steps) == DDTAS_STATUS_OK);
    part.probe_neg = steps.probe_neg;
    part.total_pos = steps.total_pos;
    CHECK(ddtas_select(context, &view, &known, &part, &steps) == DDTAS_STATUS_OK);
    CHECK(ddtas_gradient(context, &view, &known, &part, &steps) == DDTAS_STATUS_OK);
    CHECK(ddtas_recall_at_k(context, &view, &k, 1, &found.recall, NULL) == DDTAS_STATUS_OK);
    CHECK(ddtas_nearest(context, &view, NULL, 3, indices, similarities) == DDTAS_STATUS_OK);
    CHECK(ddtas_workspace_bytes(context, &bytes) == DDTAS_STATUS_OK && bytes > 0);
    CHECK(ddtas_context_device(context, name, sizeof name) == 3 && strcmp(name, "cpu") == 0);
    CHECK(ddtas_context_message(context, NULL, 0) == 0);
    found.loss = result.loss;
    found.in_steps = steps.loss;
    CHECK(fabs(steps.loss - result.loss) <= 1e-6 * result.loss);
    found.gradient = gradient[7];
    found.index = indices[5];
    found.similarity = similarities[5];
    return found;
}

static int same(answers a, answers b) {
    return a.loss == b.loss && a.in_steps == b.in_steps && a.pos == b.pos && a.neg == b.neg && a.recall == b.recall && a.gradient == b.gradient &&
           a.index == b.index && a.similarity == b.similarity;
}

/* Waits for a child that ends with 0 if nothing failed in it. */
static void child_ended_well(pid_t child) {
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(!WIFSIGNALED(status)); /* SIGALRM: the child hung */
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void forked(ddtas_context *context, answers want, int again) {
    pid_t child = fork();
    CHECK(child >= 0);
    if (child > 0) {
        child_ended_well(child);
        return;
    }
    alarm(SECONDS);
    failures = 0;
    /* The child does not inherit the parent's last loss. */
    double pos, neg;
    ddtas_rows view = {
        .struct_size = sizeof view, .embeddings = rows, .labels = labels, .count = ROWS, .dim = WIDTH};
    ddtas_tangents tangents = {.struct_size = sizeof tangents, .anchors = rows};
    REFUSED(context, ddtas_threshold_gradient(context, &view, NULL, &tangents, &pos, &neg), DDTAS_STATUS_OUT_OF_ORDER,
            "loss");
    CHECK(same(compute(context), want));
    ddtas_context *fresh = open_context(2);
    CHECK(same(compute(fresh), want));
    if (again)
        forked(context, want, 0);
    ddtas_context_destroy(fresh);
    ddtas_context_destroy(context);
    _exit(failures > 0);
}

static volatile int stop;

static void *keep_it_locked(void *context) {
    static float other_gradient[ROWS * WIDTH];
    ddtas_rows view = {
        .struct_size = sizeof view, .embeddings = rows, .labels = labels, .count = ROWS, .dim = WIDTH};
    ddtas_loss_result result = {.struct_size = sizeof result, .gradient = other_gradient};
    while (!stop)
        ddtas_loss(context, NULL, &view, NULL, &result);
    return NULL;
}

static int threads_now(void) {
    DIR *tasks = opendir("/proc/self/task");
    int count = 0;
    while (tasks && readdir(tasks))
        count++;
    if (tasks)
        closedir(tasks);
    return count;
}

/* The kernel may still list a thread for a moment after it was joined. */
static void wait_for_threads(int most) {
    struct timespec moment = {.tv_nsec = 1000000};
    for (int i = 0; i < 1000 && threads_now() > most; i++)
        nanosleep(&moment, NULL);
}

static void destroy_waits(int before) {
    wait_for_threads(before);
    ddtas_context *context = open_context(6);
    compute(context);
    CHECK(threads_now() >= before + 6);
    ddtas_context_destroy(context);
    wait_for_threads(before);
    CHECK(threads_now() == before);
}

int main(void) {
    int threads_before = threads_now();
    draw_rows();
    for (size_t threads = 1; threads <= 3; threads++) {
        ddtas_context *context = open_context(threads);
        answers want = compute(context);
        CHECK(want.loss > 0);
        forked(context, want, 1);
        CHECK(same(compute(context), want));

        pthread_t other;
        stop = 0;
        CHECK(pthread_create(&other, NULL, keep_it_locked, context) == 0);
        for (int i = 0; i < 5; i++) {
            struct timespec moment = {.tv_nsec = 3000000};
            nanosleep(&moment, NULL);
            forked(context, want, 0);
        }
        stop = 1;
        CHECK(pthread_join(other, NULL) == 0);
        ddtas_context_destroy(context);
    }
    destroy_waits(threads_before);
    return report("fork");
}
