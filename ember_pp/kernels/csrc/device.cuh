/*
 * device: what all kernels share. Element types, packed accesses, reductions, launch order.
 *
 * No header of CUDA, of the C++ library or of torch is included: the run-time compiler ships
 * none, so users need no CUDA toolkit. bf16 is a storage type; arithmetic is fp32.
 *
 * Legend of all files: T tokens, D hidden, H query heads, K KV heads, G = H / K, d head dim,
 * B blocks, S block size in tokens, V vocabulary, I intermediate.
 */
#pragma once

namespace ember {

using u32 = unsigned int;
using i64 = long long;

constexpr int kWarpSize = 32;
constexpr u32 kAllLanes = 0xffffffffu;

struct bf16 {
  unsigned short bits;
};

__device__ __forceinline__ float to_float(bf16 x) {
  return __uint_as_float(static_cast<u32>(x.bits) << 16);
}
__device__ __forceinline__ float to_float(float x) { return x; }

template <typename Element>
__device__ __forceinline__ Element from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
  bf16 rounded;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(x));
  return rounded;
}

/* Two floats as one word of bf16, `low` in the low half. */
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
  u32 word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

/* x as it is after it was stored in memory as an Element. */
template <typename Element>
__device__ __forceinline__ float rounded_to(float x) {
  return to_float(from_float<Element>(x));
}

template <int kBytes>
struct WordOf;
template <>
struct WordOf<16> {
  using type = uint4;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<4> {
  using type = u32;
};
template <>
struct WordOf<2> {
  using type = unsigned short;
};

/* kCount elements that one access moves; the address must be a multiple of its size. */
template <typename Element, int kCount>
struct alignas(sizeof(Element) * kCount) Pack {
  using Word = typename WordOf<sizeof(Element) * kCount>::type;
  Element values[kCount];

  __device__ __forceinline__ void load(const Element* address) {
    *reinterpret_cast<Word*>(values) = *reinterpret_cast<const Word*>(address);
  }
  __device__ __forceinline__ void store(Element* address) const {
    *reinterpret_cast<Word*>(address) = *reinterpret_cast<const Word*>(values);
  }
};

/* Sum over groups of kLanes neighbouring lanes (a power of two); every lane gets it. */
template <int kLanes>
__device__ __forceinline__ float lane_sum(float x) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, offset);
  }
  return x;
}

/* Sum over the thread block, in an order that depends on its size alone; every thread gets it.
 * To be called once per kernel: there is no barrier after the last read. */
__device__ __forceinline__ float block_sum(float x) {
  __shared__ float warp_sums[kWarpSize];
  x = lane_sum<kWarpSize>(x);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  if (lane == 0) warp_sums[warp] = x;
  __syncthreads();
  const int num_warps = blockDim.x / kWarpSize;
  return lane_sum<kWarpSize>(lane < num_warps ? warp_sums[lane] : 0.0f);
}

/* Of the card, in nanoseconds: the same for all processes that use it. */
__device__ __forceinline__ i64 card_time() {
  i64 time;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
  return time;
}

/* To memory that the host or another card looks at meanwhile. */
__device__ __forceinline__ void store_seen(i64* address, i64 value) {
  asm volatile("st.volatile.global.s64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}
__device__ __forceinline__ void store_seen(u32* address, u32 value) {
  asm volatile("st.volatile.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

/*
 * Programmatic dependent launch (sm_90 and later; elsewhere a kernel starts when the one before
 * has ended, and both of these do nothing).
 *
 * A kernel may start while the one before still runs. Until `wait_for_previous_kernel` it may
 * read only weights, and the inputs of the step, which a copy or `begin_step` brought before the
 * first kernel: with neither does anything overlap; and it writes nothing. Every kernel calls it,
 * so once it returns all earlier kernels have ended.
 */
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace ember
