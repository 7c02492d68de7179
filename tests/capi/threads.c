/* Threads with a context each share nothing, threads that share a context take turns: each gets its own result. */
#include "check.h"

#include <pthread.h>

enum { THREADS = 4, ROUNDS = 25 };

typedef struct {
    ddtas_context *context; /* NULL: the thread creates its own */
    uint64_t seed;
    double expected;
    int wrong;
} job;

static void *run(void *argument) {
    job *job = argument;
    static _Thread_local fixture f;
    fill(&f, job->seed);
    ddtas_context *context = job->context;
    ddtas_context_options options = {.struct_size = sizeof options, .device = "cpu", .threads = 2};
    if (!context && ddtas_context_create(&options, &context, NULL, 0) != DDTAS_STATUS_OK) {
        job->wrong++;
        return NULL;
    }
    for (int round = 0; round < ROUNDS; round++) {
        /* Every third call fails; the failure must not reach other threads. */
        f.view.dtype = round % 3 == 2 ? 9 : DDTAS_DTYPE_F32;
        ddtas_status status = ddtas_loss(context, NULL, &f.view, NULL, &f.result);
        ddtas_status want = round % 3 == 2 ? DDTAS_STATUS_INVALID_VALUE : DDTAS_STATUS_OK;
        char message[64];
        ddtas_context_message(context, message, sizeof message);
        job->wrong += status != want || f.result.loss != job->expected;
    }
    if (!job->context)
        ddtas_context_destroy(context);
    return NULL;
}

static void race(ddtas_context *shared) {
    pthread_t threads[THREADS];
    job jobs[THREADS];
    ddtas_context *alone = open_context(1);
    for (int i = 0; i < THREADS; i++) {
        static fixture f;
        jobs[i] = (job){.context = shared, .seed = (uint64_t)i + 1};
        fill(&f, jobs[i].seed);
        CHECK(ddtas_loss(alone, NULL, &f.view, NULL, &f.result) == DDTAS_STATUS_OK);
        jobs[i].expected = f.result.loss;
        CHECK(i == 0 || jobs[i].expected != jobs[0].expected);
    }
    for (int i = 0; i < THREADS; i++)
        CHECK(pthread_create(&threads[i], NULL, run, &jobs[i]) == 0);
    for (int i = 0; i < THREADS; i++) {
        CHECK(pthread_join(threads[i], NULL) == 0);
        CHECK(jobs[i].wrong == 0);
    }
    ddtas_context_destroy(alone);
}

int main(void) {
    race(NULL);
    ddtas_context *shared = open_context(2);
    race(shared);
    ddtas_context_destroy(shared);
    return report("threads");
}
