// races.h: what ThreadSanitizer is told, in builds where it watches the kernels.
//
// Every thread of a block is a thread to it, though all are fibers of one: what orders two
// accesses is the kernels' barriers, collectives and launches alone, not the schedule. The
// kernels are compiled with -fsanitize=thread; the emulation is not, for what it touches is the
// machine, and with DDTAS_EMULATION_RACES.
#ifndef DDTAS_EMULATION_RACES_H
#define DDTAS_EMULATION_RACES_H

#ifdef DDTAS_EMULATION_RACES
#include <sanitizer/tsan_interface.h>
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
struct Unwatched {
    Unwatched() {}
};
#endif

// Where threads meet again and again. Two tokens in turn: a thread that is already at the next
// meeting must not order what it did on the way for those that are still leaving the last.
struct Meeting {
    char tokens[2];
    unsigned turn = 0;
};

}  // namespace emulation

#endif
