// sm90.cuh: instructions that only Hopper has (sm_90a), part of device.cuh.
//
// Products of a warpgroup (4 warps, 64 rows) straight from shared memory, bulk copies, and mbarriers,
// which signal their completion. Products and bulk copies access shared memory through the async
// proxy: after other writes the writers need fence_proxy_async(), then a barrier.
// The host paths are in emulation/machine.h; descriptors are encoded here for both.
#ifndef DDTAS_SM90_CUH
#define DDTAS_SM90_CUH

#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HAS_WGMMA 1

// An operand in shared memory: lines of 128 bytes (64 elements), their granules swizzled by
// granule ^ line % 8; eight lines form a block of 1,024 bytes, aligned to its size. PTX ISA, "Matrix
// Descriptor Format": start, leading and stride offsets in units of 16 bytes; 1 << 62 is the swizzle.
using Descriptor = uint64_t;
DEVICE Descriptor make_descriptor(const void *first, uint32_t leading_bytes, uint32_t stride_bytes) {
    auto field = [](uint32_t bytes) { return static_cast<uint64_t>((bytes & 0x3ffffu) >> 4); };
    return field(shared_address(first)) | field(leading_bytes) << 16 | field(stride_bytes) << 32 | uint64_t{1} << 62;
}
// K-major: a line is a row of A (a column of B), 64 of the inner dimension, as in a stage of mma_tile.cuh;
// the next eight rows are 1,024 bytes further on. The leading offset is not used.
DEVICE Descriptor k_major_descriptor(const void *stage) { return make_descriptor(stage, 16, 1024); }
// MN-major, for a `transposed` operand: a line is one of the inner dimension, 64 columns; the next eight of
// the inner dimension are 1,024 bytes further on, the next 64 columns `panel_bytes`.
DEVICE Descriptor mn_major_descriptor(const void *panels, uint32_t panel_bytes) {
    return make_descriptor(panels, panel_bytes, 1024);
}
// The operand that begins `bytes` further on.
DEVICE Descriptor advance(Descriptor descriptor, uint32_t bytes) { return descriptor + bytes / 16; }

#endif

// The body of a kernel for Hopper; on another GPU the kernel traps.
#ifdef HAS_WGMMA
#define HOPPER_ONLY(...) __VA_ARGS__
#else
#define HOPPER_ONLY(...) trap()
#endif

#if defined(__CUDACC__) && defined(HAS_WGMMA)

DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// The same for shared and global memory, before this block's bulk copies read either. Not `.global`: for that form the assembler
// leaves out the memory barrier (MEMBAR).
DEVICE void fence_proxy_async_all() { asm volatile("fence.proxy.async;" ::: "memory"); }
// Orders earlier writes of the accumulators' registers before the products that follow.
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Keeps the writes of these registers before this line: moved into the loop that follows, they would make ptxas
// wait for every product (its note C7515, which .ci/kernel_budgets.py refuses).
template <int n>
DEVICE void fence_accumulators(float (&c)[n][4]) {
#pragma unroll
    for (int i = 0; i < n; ++i) asm volatile("" : "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])::"memory");
}
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending>
DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// For warp-specialised kernels: a named barrier for `threads` threads (adjacent whole warps), numbered from 1 (0 is that of
// block_sync()); and setmaxnreg, by which one warpgroup releases registers and another takes them.
DEVICE void named_sync(uint32_t barrier, uint32_t threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
template <int registers>
DEVICE void setmaxnreg_inc() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers)); }
template <int registers>
DEVICE void setmaxnreg_dec() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers)); }

// Operands of 16, 32, 64 and 128 registers for the instructions below.
#define PLACES_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define PLACES_32                                                                                       \
    PLACES_16 ", "                                                                                      \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PLACES_64                                                                                       \
    PLACES_32 ", "                                                                                      \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                  \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PLACES_128                                                                                      \
    PLACES_64 ", "                                                                                      \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                  \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                  \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "      \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define SUMS_4(c, n) "+f"((c)[n][0]), "+f"((c)[n][1]), "+f"((c)[n][2]), "+f"((c)[n][3])
#define SUMS_16(c, n) SUMS_4(c, n), SUMS_4(c, n + 1), SUMS_4(c, n + 2), SUMS_4(c, n + 3)
#define SUMS_32(c, n) SUMS_16(c, n), SUMS_16(c, n + 4)
#define SUMS_64(c, n) SUMS_32(c, n), SUMS_32(c, n + 8)
#define SUMS_128(c, n) SUMS_64(c, n), SUMS_64(c, n + 16)

// c += a b, asynchronously: 64 rows, 8 n columns, 16 of the inner dimension; warp w of the group has rows 16 w to
// 16 w + 15. b is [columns, inner], or [inner, columns] if `transposed`; a is [rows, inner], or [inner, rows] if
// `transposed_a`. `from_zero`: c = a b.
#define WGMMA(name, type, n, shape, places, sums, a_place, b_place, transposed_a_place, transposed_place, adds_place) \
    template <bool transposed, bool transposed_a, bool from_zero = false>                                       \
    DEVICE void name(float (&c)[n][4], Descriptor a, Descriptor b) {                                        \
        asm volatile("wgmma.mma_async.sync.aligned." shape ".f32." type "." type " {" places "}, "          \
                     a_place ", " b_place ", " adds_place ", 1, 1, " transposed_a_place ", " transposed_place ";" \
                     : sums(c, 0)                                                                           \
                     : "l"(a), "l"(b), "n"(transposed_a ? 1 : 0), "n"(transposed ? 1 : 0), "n"(from_zero ? 0 : 1)); \
    }
WGMMA(wgmma_f16, "f16", 4, "m64n32k16", PLACES_16, SUMS_16, "%16", "%17", "%18", "%19", "%20")
WGMMA(wgmma_bf16, "bf16", 8, "m64n64k16", PLACES_32, SUMS_32, "%32", "%33", "%34", "%35", "%36")
WGMMA(wgmma_f16, "f16", 8, "m64n64k16", PLACES_32, SUMS_32, "%32", "%33", "%34", "%35", "%36")
WGMMA(wgmma_bf16, "bf16", 16, "m64n128k16", PLACES_64, SUMS_64, "%64", "%65", "%66", "%67", "%68")
WGMMA(wgmma_f16, "f16", 16, "m64n128k16", PLACES_64, SUMS_64, "%64", "%65", "%66", "%67", "%68")
WGMMA(wgmma_bf16, "bf16", 32, "m64n256k16", PLACES_128, SUMS_128, "%128", "%129", "%130", "%131", "%132")
WGMMA(wgmma_f16, "f16", 32, "m64n256k16", PLACES_128, SUMS_128, "%128", "%129", "%130", "%131", "%132")

// An mbarrier, in shared memory: a phase ends when `count` threads have arrived and all announced bytes have.
using Barrier = uint64_t;
// Called by one thread; the others may use the barrier after a block_sync().
DEVICE void mbarrier_init(Barrier *barrier, uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// One arrival. Threads that waited for the phase see what this thread wrote before.
DEVICE void mbarrier_arrive(Barrier *barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// One arrival, which also announces the bytes of bulk copies.
DEVICE void mbarrier_arrive_expect_tx(Barrier *barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
// Waits for the end of the phase with this parity: 0 for the first, 1 for the second, 0 for the third. The lanes of a
// warp return one by one: warp_sync() before anything that needs them together.
DEVICE void mbarrier_wait(Barrier *barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again_%=:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again_%=;\n"
        "}\n" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}
// Bulk copy of `bytes` bytes from global to shared memory, counted by the barrier.
DEVICE void cp_async_bulk(void *to, const void *from, uint32_t bytes, Barrier *barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

// Bulk copy of `bytes` bytes from shared to global memory, in this thread's group; size and addresses are multiples of 16.
// The threads that wrote the source call fence_proxy_async() first, then a barrier.
DEVICE void bulk_store(void *to, const void *from, uint32_t bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)), "r"(bytes)
                 : "memory");
}
DEVICE void bulk_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until this thread's bulk stores have read their sources, which may then be overwritten.
DEVICE void bulk_store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

// If `bit` is set in `bits`, stores `value` at shared address `at` and advances it: by predicates and without a branch, which
// the compiler does not manage for an `if`.
DEVICE void append_if(uint32_t &at, uint32_t bits, uint32_t bit, float value) {
    asm volatile(
        "{\n"
        ".reg .pred there;\n"
        ".reg .b32 one;\n"
        "and.b32 one, %1, %2;\n"
        "setp.ne.b32 there, one, 0;\n"
        "@there st.shared.f32 [%0], %3;\n"
        "@there add.u32 %0, %0, 4;\n"
        "}\n"
        : "+r"(at)
        : "r"(bits), "r"(bit), "f"(value)
        : "memory");
}
// Unless `word` is 0, stores its lower half at shared address `first` + its upper half; also without a branch.
DEVICE void store_element(uint32_t first, uint32_t word) {
    asm volatile(
        "{\n"
        ".reg .pred there;\n"
        ".reg .b32 at;\n"
        ".reg .b16 low;\n"
        "setp.ne.b32 there, %1, 0;\n"
        "shr.u32 at, %1, 16;\n"
        "add.u32 at, at, %0;\n"
        "cvt.u16.u32 low, %1;\n"
        "@there st.shared.u16 [at], low;\n"
        "}\n" ::"r"(first),
        "r"(word)
        : "memory");
}
// As append_if, but outside the `bytes` bytes from `first` on it only advances.
DEVICE void append_within(uint32_t &at, uint32_t bits, uint32_t bit, float value, uint32_t first, uint32_t bytes) {
    asm volatile(
        "{\n"
        ".reg .pred there, within;\n"
        ".reg .b32 one;\n"
        "and.b32 one, %1, %2;\n"
        "setp.ne.b32 there, one, 0;\n"
        "sub.u32 one, %0, %4;\n"
        "setp.lt.and.u32 within, one, %5, there;\n"
        "@within st.shared.f32 [%0], %3;\n"
        "@there add.u32 %0, %0, 4;\n"
        "}\n"
        : "+r"(at)
        : "r"(bits), "r"(bit), "f"(value), "r"(first), "r"(bytes)
        : "memory");
}

#endif

#ifdef HAS_WGMMA
// Sets sums to 0, fenced from the products that add to them.
template <int n>
DEVICE void clear(float (&sums)[n][4]) {
#pragma unroll
    for (int column = 0; column < n; ++column) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[column][i] = 0.0f;
    }
    fence_accumulators(sums);
}
#endif

#endif
