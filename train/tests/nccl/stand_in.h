// Stand-ins for the NVIDIA driver (driver.cpp) and NCCL (nccl.cpp), for .ci/many.sh: g++ builds one library of both, found as
// libcuda.so and libnccl.so. GPU memory is host memory; ranks are processes of one machine, connected by sockets. They check that
// `ddtas-train --ranks nccl` keeps these rules of the real ones: buffers in GPU memory, one GPU per rank, a nonblocking
// communicator, no call while another is being issued, and no event recorded until then. They do not show NCCL's speed, its
// transports, or errors of real GPUs.
//
// FAKE_GPUS: number of GPUs. FAKE_DEAD=error: NCCL reports a rank that has ended, as over a network, instead of waiting forever.
// FAKE_ABORT=hang: ncclCommAbort() never returns. FAKE_VERSION: NCCL's version.
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
// Protect streams and `being_issued`.
extern std::mutex guard;
extern std::condition_variable changed;
// Number of NCCL calls that have returned but are not in their stream yet.
extern int being_issued;

bool on_gpu(const void *at, size_t bytes);
