/*
 * attention: what the attention kernels share. Products, powers, and rows that several thread
 * blocks compute together.
 */
#pragma once

#include "device.cuh"

namespace ember {

constexpr int kTile = 16;   // positions that lie side by side in any block of the cache
constexpr int kFanIn = 16;  // parts that are added at once

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }

/* threadIdx.x, read anew: what follows from it need not be kept in registers. */
__device__ __forceinline__ int thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
}

__device__ __forceinline__ float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

/* c += a b, of m16n8k16. */
__device__ __forceinline__ void multiply_add(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3,
                                             u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* Over the 4 neighbouring lanes that have a row of a product. */
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

/* Work is cut into equal shares, one per thread block; `first` to `last` share one piece of it.
 * Each has two slots for a part, one for the piece that its share begins in. */
struct Shares {
  int first, last;  // blocks

  __device__ __forceinline__ i64 slot(int block) const { return 2 * block + (block == first); }
  __device__ __forceinline__ int first_of(int group) const { return max(first, group * kFanIn); }
  __device__ __forceinline__ int num_in(int group) const {
    return min(last, group * kFanIn + kFanIn - 1) - first_of(group) + 1;
  }
  __device__ __forceinline__ int num_groups() const { return last / kFanIn - first / kFanIn + 1; }
};

/* Barrier kBarrier for the kThreads threads that use it; 0 and all threads: __syncthreads. */
template <int kBarrier, int kThreads>
__device__ __forceinline__ void sync_threads() {
  asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "n"(kThreads) : "memory");
}

/* True in the block that arrives last of `expected`; it then sees what the others wrote. By the
 * threads of a barrier, `is_first` is one of them. */
template <int kBarrier, int kThreads>
__device__ __forceinline__ bool is_last_to_arrive(int* counter, int expected, bool is_first) {
  __shared__ u32 before;
  sync_threads<kBarrier, kThreads>();
  if (is_first) {
    __threadfence();
    before = atomicInc(reinterpret_cast<u32*>(counter), expected - 1);  // wraps to 0
    __threadfence();
  }
  sync_threads<kBarrier, kThreads>();
  const bool is_last = before == static_cast<u32>(expected - 1);
  sync_threads<kBarrier, kThreads>();  // before `before` is written again
  return is_last;
}

}  // namespace ember
