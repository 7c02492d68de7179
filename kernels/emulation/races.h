// races.h: annotations for ThreadSanitizer, in builds that check the kernels for races.
//
// To ThreadSanitizer every thread of a block is a thread, though all are fibers of one OS thread: two accesses are
// ordered only by the kernels' barriers, collectives and launches, not by the schedule. Kernels are compiled with
// -fsanitize=thread, the emulation with DDTAS_EMULATION_RACES instead, since it accesses the machine's own state.
// Rust is not instrumented either: a test's copies to and from device memory are ordered with the launches of its OS
// thread, but the order among its threads is not seen. So programs run with ignore_interceptors_accesses=1;
// otherwise memory handed from one thread to another would be a race.
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

// What precedes a release() of a token happens before what follows an acquire() of it.
#ifdef DDTAS_EMULATION_RACES
inline void acquire(void *token) { __tsan_acquire(token); }
inline void release(void *token) { __tsan_release(token); }
// Memory that an emulated instruction accesses, as an access of the thread that issued it.
inline void reads(const void *from, size_t bytes) { __tsan_read_range(const_cast<void *>(from), bytes); }
inline void writes(void *to, size_t bytes) { __tsan_write_range(to, bytes); }
// A function of the emulation that a kernel calls, with return address `from`. It is not instrumented, and without this the
// sanitizer would not know the kernel's line.
struct Called {
    explicit Called(void *from) { __tsan_func_entry(from); }
    ~Called() { __tsan_func_exit(); }
};
// Excludes the machine's own copies: the C library's functions are intercepted even in code that is not instrumented.
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

// A barrier that threads pass repeatedly. It has two alternating tokens: a thread that has arrived at the next meeting must not
// order its accesses before those of threads that are still leaving the last one. And two for each of two crews of fibers:
// ThreadSanitizer's threads are reused for other blocks, and at their first meeting would order what they did in an earlier block
// after its last meeting. Blocks of different crews are not ordered.
struct Meeting {
    char tokens[2][2];
    unsigned turn = 0;
    void *token(unsigned crew) { return &tokens[crew][turn % 2]; }
};

}  // namespace emulation

#endif
