// The driver: GPU memory is host memory, copies are synchronous, a stream counts the NCCL calls issued and done in it.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>

#include "stand_in.h"

enum { CUDA_OK = 0, INVALID_VALUE = 1, INVALID_DEVICE = 101, INVALID_CONTEXT = 201, NOT_READY = 600, GPUS = 8 };

thread_local Context *current;
std::mutex guard;
std::condition_variable changed;
int being_issued;

namespace {
Context contexts[GPUS] = {{0}, {1}, {2}, {3}, {4}, {5}, {6}, {7}};
std::map<uintptr_t, size_t> allocated;

struct Event {
    Stream *stream = nullptr;
    long after = 0;
};

int here() { return current ? CUDA_OK : INVALID_CONTEXT; }
int wait_for(Stream *stream) {
    std::unique_lock<std::mutex> lock(guard);
    changed.wait(lock, [&] { return stream->done == stream->issued; });
    return here();
}
} // namespace

bool on_gpu(const void *at, size_t bytes) {
    std::lock_guard<std::mutex> lock(guard);
    auto next = allocated.upper_bound((uintptr_t)at);
    if (next == allocated.begin())
        return false;
    --next;
    return (uintptr_t)at + bytes <= next->first + next->second;
}

extern "C" {
int cuInit(unsigned) { return CUDA_OK; }
int cuGetErrorName(int, const char **name) { return *name = "FAKE_ERROR", CUDA_OK; }
int cuGetErrorString(int, const char **text) { return *text = "refused by the stand-in", CUDA_OK; }
int cuDeviceGetCount(int *count) {
    const char *gpus = getenv("FAKE_GPUS");
    return *count = gpus ? atoi(gpus) : GPUS, CUDA_OK;
}
int cuDeviceGet(int *device, int ordinal) {
    return *device = ordinal, ordinal < GPUS ? CUDA_OK : INVALID_DEVICE;
}
// Every attribute is 0: no memory pools.
int cuDeviceGetAttribute(int *value, int, int) { return *value = 0, CUDA_OK; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = &contexts[device], CUDA_OK; }
int cuDevicePrimaryCtxRelease_v2(int) { return CUDA_OK; }
int cuCtxGetCurrent(void **context) { return *context = current, CUDA_OK; }
int cuCtxSetCurrent(void *context) { return current = (Context *)context, CUDA_OK; }
int cuCtxSynchronize() { return here(); }
int cuStreamCreate(void **stream, unsigned) { return *stream = new Stream, here(); }
int cuStreamSynchronize(void *stream) { return wait_for((Stream *)stream); }
int cuStreamDestroy_v2(void *) { return here(); }
int cuEventCreate(void **event, unsigned) { return *event = new Event, here(); }
int cuEventDestroy_v2(void *) { return here(); }
int cuEventRecord(void *event, void *stream) {
    std::lock_guard<std::mutex> lock(guard);
    if (being_issued)
        return INVALID_VALUE;
    *(Event *)event = {(Stream *)stream, ((Stream *)stream)->issued};
    return here();
}
int cuEventQuery(void *event) {
    std::lock_guard<std::mutex> lock(guard);
    auto [stream, after] = *(Event *)event;
    return !stream || stream->done >= after ? CUDA_OK : NOT_READY;
}
int cuMemAlloc_v2(uintptr_t *address, size_t bytes) {
    void *memory = malloc(bytes);
    memset(memory, 0xff, bytes);
    std::lock_guard<std::mutex> lock(guard);
    allocated[*address = (uintptr_t)memory] = bytes;
    return here();
}
int cuMemFree_v2(uintptr_t address) {
    std::lock_guard<std::mutex> lock(guard);
    if (!allocated.erase(address))
        return INVALID_VALUE;
    free((void *)address);
    return here();
}
int cuMemcpyHtoDAsync_v2(uintptr_t to, const void *from, size_t bytes, void *stream) {
    if (int bad = wait_for((Stream *)stream))
        return bad;
    return on_gpu((void *)to, bytes) ? memcpy((void *)to, from, bytes), CUDA_OK : INVALID_VALUE;
}
int cuMemcpyDtoHAsync_v2(void *to, uintptr_t from, size_t bytes, void *stream) {
    if (int bad = wait_for((Stream *)stream))
        return bad;
    return on_gpu((void *)from, bytes) ? memcpy(to, (void *)from, bytes), CUDA_OK : INVALID_VALUE;
}
}
