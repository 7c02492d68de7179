// fiber.cpp: a switch of some 16 instructions on x86-64 and aarch64.
//
// ucontext makes a system call at every switch, and a tile takes a million switches.

#include "fiber.h"

#include <cstdint>
#include <cstdlib>

#include "races.h"

#if defined(__SANITIZE_ADDRESS__)
#include <pthread.h>
#include <sanitizer/asan_interface.h>
#endif

// Pushes the callee-saved registers, stores the stack pointer and loads the new one. It ends with a jump instead of a `ret`,
// which the processor would always mispredict.
extern "C" void ddtas_emulation_switch(void **old_stack_pointer, void *new_stack_pointer);

#if defined(__x86_64__)
asm(R"(
.text
.globl ddtas_emulation_switch
.type ddtas_emulation_switch, @function
ddtas_emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    popq %rcx
    jmpq *%rcx
.size ddtas_emulation_switch, .-ddtas_emulation_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl ddtas_emulation_switch
.type ddtas_emulation_switch, @function
ddtas_emulation_switch:
    sub sp, sp, #160
    stp x19, x20, [sp]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x2, sp
    str x2, [x0]
    mov sp, x1
    ldp x19, x20, [sp]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
.size ddtas_emulation_switch, .-ddtas_emulation_switch
)");
#else
#error "the emulation runs on x86-64 and aarch64"
#endif

namespace emulation {
namespace {

// Kernels keep a few hundred bytes of fragments; sanitizers make frames several times larger.
constexpr size_t kStackBytes = 192 * 1024;
// Stacks begin at different offsets in their pages; otherwise all would compete for the same cache lines.
constexpr size_t kStagger = 17 * 64, kPlaces = 60;

#if defined(__SANITIZE_ADDRESS__)
void enter(Fiber &fiber) { __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr); }

void leave(Fiber &from, Fiber &to, bool last) {
    if (to.stack_bytes == 0) {
        // The OS thread's own stack: asked for once.
        pthread_attr_t attributes;
        void *base = nullptr;
        pthread_getattr_np(pthread_self(), &attributes);
        pthread_attr_getstack(&attributes, &base, &to.stack_bytes);
        pthread_attr_destroy(&attributes);
        to.stack = static_cast<unsigned char *>(base);
    }
    __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
}
#elif defined(DDTAS_EMULATION_RACES)
void enter(Fiber &) {}
void leave(Fiber &from, Fiber &to, bool) {
    if (from.watched == nullptr) from.watched = __tsan_get_current_fiber();  // the OS thread
    __tsan_switch_to_fiber(to.watched, __tsan_switch_to_fiber_no_sync);
}
#else
void enter(Fiber &) {}
void leave(Fiber &, Fiber &, bool) {}
#endif

thread_local void (*next_main)() = nullptr;

void trampoline() {
    Fiber from_zero;
    enter(from_zero);
    next_main();
    std::abort();
}

}  // namespace

void start_fiber(Fiber &fiber, void (*main)()) {
    next_main = main;
    if (fiber.stack == nullptr) {
        fiber.stack = static_cast<unsigned char *>(std::malloc(kStackBytes));
        if (fiber.stack == nullptr) std::abort();
        fiber.stack_bytes = kStackBytes;
        static thread_local size_t made = 0;
        fiber.place = made++ % kPlaces;
#if defined(DDTAS_EMULATION_RACES)
        fiber.watched = __tsan_create_fiber(0);
#endif
    }
    fiber.fake_stack = nullptr;
#if defined(__SANITIZE_ADDRESS__)
    // The frames of the fiber that ended here were never left one by one.
    ASAN_UNPOISON_MEMORY_REGION(fiber.stack, kStackBytes);
#endif
    auto top = reinterpret_cast<uintptr_t>(fiber.stack + kStackBytes - fiber.place * kStagger) & ~static_cast<uintptr_t>(63);
    auto *words = reinterpret_cast<void **>(top);
#if defined(__x86_64__)
    // A return address of 0 above ends backtraces; 6 registers below, then the entry.
    *--words = nullptr;
    *--words = reinterpret_cast<void *>(trampoline);
    for (int i = 0; i < 6; ++i) *--words = nullptr;
#else
    words -= 20;
    for (int i = 0; i < 20; ++i) words[i] = nullptr;
    words[11] = reinterpret_cast<void *>(trampoline);
#endif
    fiber.stack_pointer = words;
}

void end_fiber(Fiber &fiber) {
    if (fiber.stack == nullptr) return;
#if defined(DDTAS_EMULATION_RACES)
    __tsan_destroy_fiber(fiber.watched);
#endif
    std::free(fiber.stack);
    fiber = Fiber{};
}

void switch_fiber(Fiber &from, Fiber &to, bool last) {
    leave(from, to, last);
    ddtas_emulation_switch(&from.stack_pointer, to.stack_pointer);
    enter(from);
}

}  // namespace emulation
