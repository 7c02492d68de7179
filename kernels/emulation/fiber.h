// fiber.h: stacks and the switch between them, announced to the sanitizers.
#ifndef DDTAS_EMULATION_FIBER_H
#define DDTAS_EMULATION_FIBER_H

#include <cstddef>

namespace emulation {

struct Fiber {
    void *stack_pointer = nullptr;
    unsigned char *stack = nullptr;  // null for the OS thread's own
    size_t stack_bytes = 0;
    size_t place = 0;            // where its first frame begins (kStagger)
    void *fake_stack = nullptr;  // AddressSanitizer's
    void *watched = nullptr;     // ThreadSanitizer's thread
};

// Prepares a fiber that begins at `main`, which must never return. The stack is allocated once.
void start_fiber(Fiber &fiber, void (*main)());

// Frees what start_fiber allocated; nothing may run on it.
void end_fiber(Fiber &fiber);

// Suspends `from` (for good if `last`) and resumes `to`.
void switch_fiber(Fiber &from, Fiber &to, bool last);

}  // namespace emulation

#endif
