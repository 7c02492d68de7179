// Stand-ins for the NVIDIA driver (driver.cpp) and for NCCL (nccl.cpp), for .ci/many.sh: g++ makes one library of both, found as libcuda.so and libnccl.so.
// GPUs are memory of the host, ranks are processes of one machine that speak over sockets. They hold `ddtas-train --ranks nccl` to the rules of the real ones
// that it has to keep: buffers in GPU memory, one GPU a rank, a communicator that does not block, no call while another is being issued, no event before it
// is. They show nothing of the speed of NCCL, of its ways through GPUs and networks, or of what real GPUs refuse.
//
// FAKE_GPUS: how many there are. FAKE_DEAD=error: NCCL notices a rank that has gone, as over a network, instead of waiting for ever.
// FAKE_ABORT=hang: a communicator that cannot be ended. FAKE_VERSION: of NCCL.
#pragma once
#include <condition_variable>
#include <cstddef>
#include <mutex>

struct Context {
    int device;
};
extern thread_local Context *current;

struct Stream {
    long issued = 0, done = 0;
};
// Of streams, and of what is below.
extern std::mutex guard;
extern std::condition_variable changed;
// Calls of NCCL that have returned and are not in their stream yet.
extern int being_issued;

bool on_gpu(const void *at, size_t bytes);
