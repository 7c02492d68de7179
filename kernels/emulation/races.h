// races.h: what ThreadSanitizer is told, in builds where it watches the kernels.
//
// Every thread of a block is a thread to it, though all are fibers of one: what orders two
// accesses is the kernels' barriers, collectives and launches alone, not the schedule. The
// kernels are compiled with -fsanitize=thread; the emulation is not, for what it touches is the
// machine, and with DDTAS_EMULATION_RACES. Nor is Rust: what a test copies to and from device memory is
// in order with the launches of its OS thread, but what orders its threads is not seen, so that programs
// of both are run with ignore_interceptors_accesses=1, or memory handed from one to another would be a race.
#ifndef DDTAS_EMULATION_RACES_H
#define DDTAS_EMULATION_RACES_H

#include <cstddef>

#ifdef DDTAS_EMULATION_RACES
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_func_entry(void *from);
extern "C" void __tsan_func_exit();
extern "C" void __tsan_read_range(void *first, size_t bytes);
extern "C" void __tsan_write_range(void *first, size_t bytes);
extern "C" void AnnotateIgnoreReadsBegin(const char *file, int line);
extern "C" void AnnotateIgnoreReadsEnd(const char *file, int line);
extern "C" void AnnotateIgnoreWritesBegin(const char *file, int line);
extern "C" void AnnotateIgnoreWritesEnd(const char *file, int line);
#endif

namespace emulation {

// What was done before a release() of a token is done before what comes after an acquire() of it.
#ifdef DDTAS_EMULATION_RACES
inline void acquire(void *token) { __tsan_acquire(token); }
inline void release(void *token) { __tsan_release(token); }
// What an instruction touches that the emulation carries out, as an access of the thread that issued it.
inline void reads(const void *from, size_t bytes) { __tsan_read_range(const_cast<void *>(from), bytes); }
inline void writes(void *to, size_t bytes) { __tsan_write_range(to, bytes); }
// A function of the emulation that a kernel calls, `from` its return address: it is not compiled for the sanitizer, which
// would else not know the line of the kernel.
struct Called {
    explicit Called(void *from) { __tsan_func_entry(from); }
    ~Called() { __tsan_func_exit(); }
};
// The machine's own copies: intercepted in the C library, though this code is not watched.
struct Unwatched {
    Unwatched() {
        AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
        AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
    }
    ~Unwatched() {
        AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
        AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    }
};
#else
inline void acquire(void *) {}
inline void release(void *) {}
inline void reads(const void *, size_t) {}
inline void writes(void *, size_t) {}
struct Called {
    explicit Called(void *) {}
};
struct Unwatched {
    Unwatched() {}
};
#endif

// Where threads meet again and again. Two tokens in turn: a thread that is already at the next
// meeting must not order what it did on the way for those that are still leaving the last. And two for each of two crews of
// threads: ThreadSanitizer's are used again for other blocks, where they would order at the first meeting what they did in
// an earlier block after its last. Of two blocks of different crews it knows that nothing orders them.
struct Meeting {
    char tokens[2][2];
    unsigned turn = 0;
    void *token(unsigned crew) { return &tokens[crew][turn % 2]; }
};

}  // namespace emulation

#endif
