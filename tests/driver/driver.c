/* A fake CUDA driver for tests/driver.rs: it tracks contexts, counts calls and runs no kernel. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int result;
enum { OK = 0, INVALID_VALUE = 1, INVALID_CONTEXT = 201, INVALID_HANDLE = 400, ABSENT = 500, KERNELS = 256 };

static char primary; /* its address is the primary context of the only GPU */
static _Thread_local void *current;
static char *kernels[KERNELS];
static int kernel_count, images;
/* Set and read by tests. */
int fake_major = 8, fake_failures, fake_retained, fake_launches, fake_overlapped;
/* Number of allocations, waits, copies between host and GPU, look-ups of kernels and retained contexts. */
int fake_asked;

static void ask(void) { __atomic_add_fetch(&fake_asked, 1, __ATOMIC_RELAXED); }

void fake_kernel(const char *name) { kernels[kernel_count++] = strdup(name); }

static result fail(result code) {
    __atomic_add_fetch(&fake_failures, 1, __ATOMIC_RELAXED);
    return code;
}
/* The result of a call that needs the GPU's context to be current in the calling thread. */
static result here(void) { return current == &primary ? OK : fail(INVALID_CONTEXT); }
/* A stream that was destroyed, set by a test; null: none. The driver refuses it, or crashes. */
void *fake_destroyed;
/* The result of a call on a stream. */
static result on(void *stream) { return stream && stream == fake_destroyed ? fail(INVALID_HANDLE) : here(); }

result cuInit(unsigned flags) { return flags ? fail(INVALID_VALUE) : OK; }
result cuDriverGetVersion(int *version) { return *version = 13000, OK; }
result cuGetErrorName(result code, const char **name) { return (void)code, *name = "FAKE_ERROR", OK; }
result cuDeviceGetCount(int *count) { return *count = 1, OK; }
result cuDeviceGet(int *device, int ordinal) { return *device = ordinal, ordinal ? fail(INVALID_VALUE) : OK; }
result cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    *value = attribute == 75 ? fake_major : attribute == 76 ? 0 : attribute == 16 ? 4 : 0;
    return OK;
}
result cuDevicePrimaryCtxRetain(void **context, int device) {
    return ask(), (void)device, fake_retained++, *context = &primary, OK;
}
result cuDevicePrimaryCtxRelease_v2(int device) { return (void)device, fake_retained--, OK; }
result cuCtxGetCurrent(void **context) { return *context = current, OK; }
result cuCtxSetCurrent(void *context) { return current = context, OK; }
result cuCtxSynchronize(void) { return ask(), here(); }
result cuStreamCreate(void **stream, unsigned flags) { return (void)flags, *stream = &primary, here(); }
result cuStreamSynchronize(void *stream) { return ask(), on(stream); }
result cuStreamDestroy_v2(void *stream) { return on(stream); }
/* Added to the ids of streams, which are their addresses: as if all had been destroyed and made anew. */
int fake_reborn;
result cuStreamGetId(void *stream, uint64_t *id) { return *id = (uintptr_t)stream + fake_reborn, on(stream); }
/* The streams that are in a capture, set by a test; null: none. */
void *fake_captured, *fake_captured_too;
int fake_waits;
static int captured(void *stream) { return stream && (stream == fake_captured || stream == fake_captured_too); }
/* What an event holds: where it was recorded last. */
enum { NOWHERE, OUTSIDE, IN_CAPTURE };
result cuStreamGetCaptureInfo_v3(void *stream, int *status, uint64_t *number, void *graph, void *nodes, void *edges,
                                 void *count) {
    (void)graph, (void)nodes, (void)edges, (void)count;
    *status = captured(stream), *number = 7;
    return on(stream);
}
result cuStreamWaitEvent(void *stream, void *event, unsigned flags) {
    (void)flags, fake_waits++;
    /* An event of a capture cannot be waited for outside of it; one from outside would be no part of the graph. */
    return event && *(int *)event == (captured(stream) ? IN_CAPTURE : OUTSIDE) ? on(stream) : fail(INVALID_VALUE);
}
result cuEventCreate(void **event, unsigned flags) {
    return (void)flags, *event = calloc(1, sizeof(int)), here();
}
result cuEventRecord(void *event, void *stream) {
    return event ? (*(int *)event = captured(stream) ? IN_CAPTURE : OUTSIDE, on(stream)) : fail(INVALID_VALUE);
}
result cuEventDestroy_v2(void *event) { return free(event), here(); }
result cuModuleLoadData(void **module, const void *image) {
    return (void)image, *module = (void *)(uintptr_t)++images, here();
}
result cuModuleUnload(void *module) { return (void)module, images--, here(); }
/* All kernels are in the first image. */
result cuModuleGetFunctionCount(unsigned *count, void *module) {
    return ask(), *count = (uintptr_t)module == 1 ? (unsigned)kernel_count : 0, here();
}
result cuModuleEnumerateFunctions(void **functions, unsigned count, void *module) {
    (void)module;
    for (unsigned i = 0; i < count; i++)
        functions[i] = kernels[i];
    return here();
}
result cuModuleGetFunction(void **function, void *module, const char *name) {
    return (void)function, (void)module, (void)name, fail(ABSENT);
}
result cuFuncGetName(const char **name, void *function) { return *name = function, OK; }
result cuFuncSetAttribute(void *function, int attribute, int value) {
    return ask(), (void)function, (void)attribute, (void)value, here();
}
/* CUlaunchAttribute and CUlaunchConfig of cuda.h. */
struct attribute {
    int id;
    char pad[4];
    int value[16];
};
struct config {
    unsigned x, y, z, tx, ty, tz, shared;
    void *stream;
    struct attribute *attributes;
    unsigned count;
};
/* The only attribute accepted is programmatic stream serialization (6), from sm_90 on. */
result cuLaunchKernelEx(const struct config *config, void *function, void **parameters, void **extra) {
    (void)function, (void)parameters, (void)extra;
    fake_launches++;
    if (config->count > (fake_major >= 9) || !config->x || !config->tx)
        return fail(INVALID_VALUE);
    if (config->count) {
        if (config->attributes->id != 6 || config->attributes->value[0] != 1)
            return fail(INVALID_VALUE);
        fake_overlapped++;
    }
    return on(config->stream);
}
/* All bits of new memory are set, which reads as "no row is bad". */
result cuMemAlloc_v2(uint64_t *address, size_t bytes) {
    ask();
    void *memory = malloc(bytes);
    *address = (uintptr_t)memory;
    return memory ? memset(memory, 0xff, bytes), here() : fail(2);
}
result cuMemGetInfo_v2(size_t *free, size_t *total) { return *free = *total = (size_t)1 << 30, here(); }
result cuMemFree_v2(uint64_t address) { return ask(), free((void *)(uintptr_t)address), here(); }
result cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *stream) {
    return ask(), memcpy((void *)(uintptr_t)to, from, bytes), on(stream);
}
result cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *stream) {
    return ask(), memcpy(to, (void *)(uintptr_t)from, bytes), on(stream);
}
result cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, void *stream) {
    return memset((void *)(uintptr_t)to, value, bytes), on(stream);
}
