// device.cuh: the GPU as the kernels see it, real or emulated on a CPU.
//
// A wrapper for every instruction that C++ does not have, with a device path (nvcc)
// and a host path (emulation/machine.h, g++); Hopper's instructions are in sm90.cuh.
// Kernels use nothing else.
// The emulation checks these rules: whole warps enter collectives, whole blocks
// barriers; no thread returns before a barrier that others reach; warp_sync() comes
// before reading what another lane wrote to shared memory; no block waits for another.
#ifndef DDTAS_DEVICE_CUH
#define DDTAS_DEVICE_CUH

#include "params.h"

// 16-bit numbers are kept as bits: only tensor cores compute with them.
struct F16 {
    uint16_t bits;
};
struct Bf16 {
    uint16_t bits;
};

#ifdef __CUDACC__

#define DEVICE __device__ __forceinline__
// Programmatic dependent launch, from sm_90 on: waits until the previous grid has finished and its writes are visible, then lets
// the next grid be scheduled, so that only the starts of kernels overlap. Without the launch attribute it does nothing.
DEVICE void begin_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
#define KERNEL_OF(name, Params, threads, blocks)                                                                          \
    static DEVICE void name##_kernel(const Params &p);                                                                    \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Params p) {                \
        begin_kernel();                                                                                                   \
        name##_kernel(p);                                                                                                 \
    }                                                                                                                     \
    static DEVICE void name##_kernel(const Params &p)
// A kernel whose only argument is the parameter struct. `blocks` per multiprocessor bound its registers.
#define KERNEL(name, Params, blocks) KERNEL_OF(name, Params, THREADS, blocks)
// A kernel with another number of threads, one block a multiprocessor.
#define ROLE_KERNEL(name, Params, threads) KERNEL_OF(name, Params, threads, 1)
// Dynamic shared memory; the launch plan states its size.
extern __shared__ __align__(1024) unsigned char dynamic_shared_memory[];
#define SHARED_MEMORY(name) unsigned char *name = dynamic_shared_memory

DEVICE uint32_t thread_index() { return threadIdx.x; }
DEVICE uint32_t block_x() { return blockIdx.x; }
DEVICE uint32_t block_y() { return blockIdx.y; }
DEVICE uint32_t block_z() { return blockIdx.z; }
DEVICE uint32_t grid_x() { return gridDim.x; }

#define block_sync() __syncthreads()
#define warp_sync() __syncwarp()

template <class T>
DEVICE T shuffle_xor(T value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
template <class T>
DEVICE T shuffle_up(T value, int by) { return __shfl_up_sync(0xffffffffu, value, by); }
template <class T>
DEVICE T shuffle(T value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
// CUDA has a `ballot` of its own, for old GPUs.
DEVICE uint32_t ballot_sync(bool vote) { return __ballot_sync(0xffffffffu, vote); }

DEVICE void atomic_add(uint32_t *target, uint32_t value) { atomicAdd(target, value); }
DEVICE void atomic_add(uint64_t *target, uint64_t value) {
    atomicAdd(reinterpret_cast<unsigned long long *>(target), static_cast<unsigned long long>(value));
}
DEVICE void atomic_add(int64_t *target, int64_t value) {
    atomic_add(reinterpret_cast<uint64_t *>(target), static_cast<uint64_t>(value));
}
// Counts this block as arrived and returns how many arrived before. Blocks that arrive later see what it wrote before (also what
// its other threads wrote before a barrier).
DEVICE uint32_t count_arrival(uint32_t *arrived) {
    __threadfence();
    uint32_t before = atomicAdd(arrived, 1u);
    __threadfence();
    return before;
}
DEVICE uint64_t atomic_fetch_add(uint64_t *target, uint64_t value) {
    return atomicAdd(reinterpret_cast<unsigned long long *>(target), static_cast<unsigned long long>(value));
}
// Reads a value that other threads may be changing by atomics.
DEVICE uint32_t atomic_load(const uint32_t *from) {
    uint32_t value;
    asm volatile("ld.relaxed.gpu.u32 %0, [%1];" : "=r"(value) : "l"(from));
    return value;
}
DEVICE uint32_t atomic_fetch_increment(uint32_t *target) { return atomicAdd(target, 1u); }
DEVICE void atomic_max(uint32_t *target, uint32_t value) { atomicMax(target, value); }
DEVICE void atomic_min(uint32_t *target, uint32_t value) { atomicMin(target, value); }

DEVICE uint32_t shared_address(const void *pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes from global to shared memory, both 16-byte aligned; complete after the wait that covers it.
DEVICE void cp_async(void *to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
// The same, or writes zeros if not `there`.
DEVICE void cp_async_if(bool there, void *to, const void *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0) : "memory");
}
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `pending` of this thread's groups are in flight.
template <int pending>
DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Loads four 8x8 matrices of 16-bit numbers (or 8x4 of 32-bit ones); lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void ldmatrix(uint32_t (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
DEVICE void ldmatrix_transposed(uint32_t (&r)[4], const void *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// c += a b on tensor cores: a 16 x k, b k x 8, fragments as PTX lays them out.
DEVICE void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Compiler barrier: keeps loads below it there; in flight all at once they would need a register each.
DEVICE void compiler_barrier() { asm volatile("" ::: "memory"); }

// Makes the value opaque to the compiler, which would otherwise recompute it in each branch that uses it.
DEVICE void opaque(uint32_t &value) { asm volatile("" : "+r"(value)); }

// The condition of a branch that only some lanes of a warp take, before an aligned instruction of Hopper's: a warp_sync() must come
// between, which the emulation checks.
DEVICE bool some_lanes(bool condition) { return condition; }

// Ends the program: the kernel is not for this GPU.
DEVICE void trap() { __trap(); }

// Converts two values and drops one: that instruction is faster.
DEVICE uint16_t to_f16_bits(float value) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(0.0f), "f"(value));
    return static_cast<uint16_t>(pair);
}
// Two numbers, the first in the lower half.
DEVICE uint32_t to_f16_pair(float first, float second) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
    return pair;
}
DEVICE uint16_t to_bf16_bits(float value) {
    uint16_t bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
DEVICE float from_f16_bits(uint16_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
// a - b, clamped to [0, 1].
DEVICE float saturated_difference(float a, float b) {
    float value;
    asm("sub.sat.f32 %0, %1, %2;" : "=f"(value) : "f"(a), "f"(b));
    return value;
}
DEVICE uint32_t bits_of(float value) { return __float_as_uint(value); }
DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
// Shifts `bits` up by one and puts the sign of `value` into the lowest bit.
DEVICE void shift_in_sign(uint32_t &bits, float value) { bits = __funnelshift_l(bits_of(value), bits, 1); }
DEVICE int popc(uint32_t bits) { return __popc(bits); }
// Index of the lowest bit that is set, and of the highest; `bits` must not be 0.
DEVICE int lowest_bit(uint32_t bits) { return __ffs(static_cast<int>(bits)) - 1; }
DEVICE uint32_t highest_bit(uint32_t bits) {
    uint32_t index;
    asm("bfind.u32 %0, %1;" : "=r"(index) : "r"(bits));
    return index;
}
// A product that the compiler cannot fuse into a multiply-add, so that a bound has the same bits in every kernel.
DEVICE double multiply_rn(double a, double b) { return __dmul_rn(a, b); }
DEVICE uint64_t bits_of(double value) { return static_cast<uint64_t>(__double_as_longlong(value)); }
// One instruction each; relative error 2^-22, subnormals are flushed to 0.
DEVICE float exp2_fast(float value) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
}
DEVICE float reciprocal_fast(float value) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
}
#define INFINITE __int_as_float(0x7f800000)

#else
#include "emulation/machine.h"
#endif
#include "ptx/sm90.cuh"

// Conversions by type.
DEVICE float to_float(float value) { return value; }
DEVICE float to_float(F16 value) { return from_f16_bits(value.bits); }
DEVICE float to_float(Bf16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }
template <class T>
DEVICE T from_float(float value);
template <>
DEVICE float from_float<float>(float value) { return value; }
template <>
DEVICE F16 from_float<F16>(float value) { return F16{to_f16_bits(value)}; }
template <>
DEVICE Bf16 from_float<Bf16>(float value) { return Bf16{to_bf16_bits(value)}; }

// Unsigned keys with the order of the floats, for atomic_max. No float has the key 0.
DEVICE uint32_t ordered_key(float value) {
    uint32_t bits = bits_of(value);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
DEVICE float key_value(uint32_t key) {
    return float_of(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

DEVICE uint32_t lane_index() { return thread_index() % 32; }
DEVICE uint32_t warp_index() { return thread_index() / 32; }

// Sum over the lanes of a warp, in a fixed order, in every lane.
template <class T>
DEVICE T warp_sum(T value) {
    for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    return value;
}

// Sum over the lanes up to and including this one.
DEVICE uint32_t warp_scan(uint32_t value) {
    for (uint32_t by = 1; by < 32; by *= 2) {
        uint32_t other = shuffle_up(value, static_cast<int>(by));
        if (lane_index() >= by) value += other;
    }
    return value;
}

// Sum over the block in a fixed order, in every thread. `scratch` has THREADS / 32 values.
template <class T>
DEVICE T block_sum(T value, T *scratch) {
    value = warp_sum(value);
    if (lane_index() == 0) scratch[warp_index()] = value;
    block_sync();
    T total = scratch[0];
    for (uint32_t warp = 1; warp < THREADS / 32; ++warp) total += scratch[warp];
    block_sync();  // the scratch may be written again
    return total;
}

// Whether this block is the last of `blocks` to arrive; it then sees what the others wrote before. No block waits for another.
// Called by the whole block; `last` is in shared memory.
DEVICE bool is_last_block(uint32_t *arrived, uint32_t blocks, uint32_t *last) {
    block_sync();
    if (thread_index() == 0) *last = count_arrival(arrived) == blocks - 1;
    block_sync();
    return *last != 0;
}

#endif
