/*
 * row_cluster: a row of logits shared by the thread blocks of a cluster.
 *
 * What       the row is cut into kBlocks slices of whole packs, in the order of token ids. Each
 *            thread block keeps its slice in shared memory (kResident) as it reads it, so later
 *            passes cost no memory traffic; else they read memory again. Blocks exchange a few
 *            numbers through each other's shared memory
 * Layout     a pack is 8 neighbouring tokens; beyond V it is filled with -inf
 * Requires   a grid of rows * kBlocks blocks in x; kBlocks = 1 below sm_90
 * Source     own
 */
#pragma once
#include "device.cuh"

namespace ember {

using u64 = unsigned long long;

constexpr int kPackTokens = 8;
constexpr int kRowThreads = 256;
constexpr int kRowWarps = kRowThreads / kWarpSize;
constexpr int kLoadsInFlight = 5;             // packs of a thread
constexpr float kWeightScale = 1099511627776.0f;  // 2^40
constexpr float kLog2e = 1.4426950408889634f;

__device__ __forceinline__ float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

__device__ __forceinline__ float minus_infinite() { return __int_as_float(0xff800000); }

/* Larger of two, NaN if one is. */
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}

/* An integer that orders as the number does; -0 counts as 0. Not for NaN. */
__device__ __forceinline__ u32 ordered_bits(float x) {
  const u32 bits = __float_as_uint(x + 0.0f);
  return bits ^ (static_cast<u32>(static_cast<int>(bits) >> 31) | 0x80000000u);
}
__device__ __forceinline__ float from_ordered_bits(u32 key) {
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

/* Keys of an element type: whole numbers without gaps between neighbouring elements. */
template <typename Element>
struct KeyOf;
template <>
struct KeyOf<float> {
  static __device__ __forceinline__ u32 of(float x) { return ordered_bits(x); }
  static __device__ __forceinline__ float value(u32 key) { return from_ordered_bits(key); }
};
template <>
struct KeyOf<bf16> {  // of a number between two elements: that of the lower one
  static __device__ __forceinline__ u32 of(float x) { return ordered_bits(x) >> 16; }
  static __device__ __forceinline__ float value(u32 key) {
    return from_ordered_bits(key & 0x8000u ? key << 16 : key << 16 | 0xffffu);
  }
};

template <typename Element>
struct RowPack;

template <>
struct RowPack<bf16> {
  uint4 words;

  __device__ __forceinline__ void load(const bf16* address) {
    words = *reinterpret_cast<const uint4*>(address);
  }
  __device__ __forceinline__ void load_streamed(const bf16* address) {
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                 : "l"(address));
  }
  __device__ __forceinline__ void load_part(const bf16* address, int count) {
    u32 parts[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const u32 low = 2 * i < count ? address[2 * i].bits : 0xff80u;
      const u32 high = 2 * i + 1 < count ? address[2 * i + 1].bits : 0xff80u;
      parts[i] = low | high << 16;
    }
    words = make_uint4(parts[0], parts[1], parts[2], parts[3]);
  }
  __device__ __forceinline__ u32 word(int i) const {
    return i < 2 ? (i == 0 ? words.x : words.y) : (i == 2 ? words.z : words.w);
  }
  __device__ __forceinline__ float value(int i) const {
    return __uint_as_float(i % 2 ? word(i / 2) & 0xffff0000u : word(i / 2) << 16);
  }
  /* NaN if one is. */
  __device__ __forceinline__ float max() const {
    u32 pair;
    asm("{ .reg .b32 a, b;\n"
        "max.NaN.bf16x2 a, %1, %2;\n"
        "max.NaN.bf16x2 b, %3, %4;\n"
        "max.NaN.bf16x2 %0, a, b; }"
        : "=r"(pair)
        : "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w));
    return max_or_nan(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  }
};

template <>
struct RowPack<float> {
  float4 low, high;

  __device__ __forceinline__ void load(const float* address) {
    low = *reinterpret_cast<const float4*>(address);
    high = *reinterpret_cast<const float4*>(address + 4);
  }
  __device__ __forceinline__ void load_streamed(const float* address) { load(address); }
  __device__ __forceinline__ void load_part(const float* address, int count) {
    float values[kPackTokens];
#pragma unroll
    for (int i = 0; i < kPackTokens; ++i) values[i] = i < count ? address[i] : minus_infinite();
    low = make_float4(values[0], values[1], values[2], values[3]);
    high = make_float4(values[4], values[5], values[6], values[7]);
  }
  __device__ __forceinline__ float value(int i) const {
    const float4 half = i < 4 ? low : high;
    return i % 4 < 2 ? (i % 4 == 0 ? half.x : half.y) : (i % 4 == 2 ? half.z : half.w);
  }
  __device__ __forceinline__ float max() const {
    float largest = value(0);
#pragma unroll
    for (int i = 1; i < kPackTokens; ++i) largest = max_or_nan(largest, value(i));
    return largest;
  }
};

/* The largest element that a thread has seen, the first of equal ones. */
struct Largest {
  float value = minus_infinite();
  int pack = -1;  // of the slice
};

/* A thread block's part of a row. */
template <typename Element, int kBlocks, bool kResident>
struct RowSlice {
  const Element* row;
  RowPack<Element>* kept;  // shared memory
  int vocab_size, first_pack, num_packs;
  bool is_aligned;

  __device__ __forceinline__ RowSlice(const Element* logits, int index, int vocab_size,
                                      void* shared)
      : row(logits + static_cast<i64>(index) * vocab_size),
        kept(static_cast<RowPack<Element>*>(shared)),
        vocab_size(vocab_size) {
    const int total = (vocab_size + kPackTokens - 1) / kPackTokens;
    const int share = (total + kBlocks - 1) / kBlocks;
    first_pack = min(static_cast<int>(blockIdx.x % kBlocks) * share, total);
    num_packs = min(share, total - first_pack);
    is_aligned = reinterpret_cast<u64>(row) % 16 == 0;
  }

  __device__ __forceinline__ int token(int pack) const { return (first_pack + pack) * kPackTokens; }

  __device__ __forceinline__ RowPack<Element> read(int pack) const {
    const int first = token(pack), count = vocab_size - first;
    RowPack<Element> result;
    if (is_aligned && count >= kPackTokens) {
      if constexpr (kResident) {
        result.load_streamed(row + first);
      } else {
        result.load(row + first);
      }
    } else {
      result.load_part(row + first, count);
    }
    return result;
  }

  /* After the block's barrier that follows `load`; a thread's own packs at once. */
  __device__ __forceinline__ RowPack<Element> get(int pack) const {
    if constexpr (kResident) {
      return kept[pack];
    } else {
      return read(pack);
    }
  }

  __device__ __forceinline__ float element(int pack, int i) const {
    const Element* from = kResident ? reinterpret_cast<const Element*>(kept + pack)
                                    : row + token(pack);
    return to_float(from[i]);
  }

  /* The one pass over memory. */
  __device__ __forceinline__ Largest load() const {
    Largest largest;
    for (int base = threadIdx.x; base < num_packs; base += kLoadsInFlight * kRowThreads) {
      RowPack<Element> packs[kLoadsInFlight];
#pragma unroll
      for (int j = 0; j < kLoadsInFlight; ++j) {
        const int pack = base + j * kRowThreads;
        if (pack < num_packs) packs[j] = read(pack);
      }
#pragma unroll
      for (int j = 0; j < kLoadsInFlight; ++j) {
        const int pack = base + j * kRowThreads;
        if (pack >= num_packs) continue;
        if constexpr (kResident) kept[pack] = packs[j];
        const float value = packs[j].max();
        if (value > largest.value) largest.pack = pack;
        largest.value = max_or_nan(largest.value, value);
      }
    }
    return largest;
  }

  /* This thread's part of the sum of 2^((x - max) * factor), in steps of 2^-40. A pack's sum
   * depends on the pack alone, and what is added is whole. */
  __device__ __forceinline__ u64 sum_of_exponentials(float max, float factor) const {
    u64 sum = 0;
    for (int i = threadIdx.x; i < num_packs; i += kRowThreads) {
      const RowPack<Element> pack = get(i);
      float y[kPackTokens];
#pragma unroll
      for (int j = 0; j < kPackTokens; ++j) y[j] = exp2_fast((pack.value(j) - max) * factor);
      const float low = (y[0] + y[1]) + (y[2] + y[3]), high = (y[4] + y[5]) + (y[6] + y[7]);
      sum += static_cast<u64>(__float2ll_rn((low + high) * kWeightScale));
    }
    return sum;
  }

  /* Token id of a thread's largest element; any where it is not finite. */
  __device__ __forceinline__ int token_of(const Largest& largest) const {
    if (largest.pack < 0) return 0;
    const RowPack<Element> pack = get(largest.pack);
    int first = kPackTokens - 1;
#pragma unroll
    for (int i = kPackTokens - 2; i >= 0; --i) {
      if (pack.value(i) == largest.value) first = i;
    }
    return token(largest.pack) + first;
  }
};

/* Candidates order by value, then the lower id first. */
__device__ __forceinline__ u64 ranked(float value, int token) {
  const u32 high = value == value ? ordered_bits(value) : 0xffffffffu;  // NaN above all
  return static_cast<u64>(high) << 32 | ~static_cast<u32>(token);
}
__device__ __forceinline__ float value_of(u64 rank) {
  return from_ordered_bits(static_cast<u32>(rank >> 32));
}
__device__ __forceinline__ int token_of(u64 rank) { return static_cast<int>(~static_cast<u32>(rank)); }

// ---------------------------------------------------------------------------------------
// within a thread block

__device__ __forceinline__ u64 warp_max(u64 x) {
  const u32 high = __reduce_max_sync(kAllLanes, static_cast<u32>(x >> 32));
  const u32 low = static_cast<u32>(x >> 32) == high ? static_cast<u32>(x) : 0;
  return static_cast<u64>(high) << 32 | __reduce_max_sync(kAllLanes, low);
}

__device__ __forceinline__ u64 warp_sum(u64 x) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, offset);
  }
  return x;
}

/* Maximum or sum over the thread block; every thread gets it. `places` is shared memory of a
 * word per warp that nobody else uses until the next barrier. */
__device__ __forceinline__ u64 block_max(u64 x, u64* places) {
  x = warp_max(x);
  if (threadIdx.x % kWarpSize == 0) places[threadIdx.x / kWarpSize] = x;
  __syncthreads();
  const int lane = threadIdx.x % kWarpSize;
  return warp_max(lane < kRowThreads / kWarpSize ? places[lane] : 0);
}
__device__ __forceinline__ u64 block_sum(u64 x, u64* places) {
  x = warp_sum(x);
  if (threadIdx.x % kWarpSize == 0) places[threadIdx.x / kWarpSize] = x;
  __syncthreads();
  const int lane = threadIdx.x % kWarpSize;
  return warp_sum(lane < kRowThreads / kWarpSize ? places[lane] : 0);
}

/* Sum over the threads before this one. */
__device__ __forceinline__ u64 sum_before(u64 x, u64* places) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  u64 sum = x;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const u64 other = __shfl_up_sync(kAllLanes, sum, offset);
    if (lane >= offset) sum += other;
  }
  if (lane == kWarpSize - 1) places[warp] = sum;
  __syncthreads();
  return warp_sum(lane < warp ? places[lane] : 0) + sum - x;
}

// ---------------------------------------------------------------------------------------
// within a cluster

template <int kBlocks>
__device__ __forceinline__ u64 best_of(const u64* ranks) {
  u64 best = ranks[0];
#pragma unroll
  for (int i = 1; i < kBlocks; ++i) best = max(best, ranks[i]);
  return best;
}

template <int kBlocks>
__device__ __forceinline__ void arrive_in_row() {
#if __CUDA_ARCH__ >= 900
  if constexpr (kBlocks > 1) asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}

template <int kBlocks>
__device__ __forceinline__ void wait_in_row() {
  if constexpr (kBlocks == 1) __syncthreads();
#if __CUDA_ARCH__ >= 900
  if constexpr (kBlocks > 1) asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

/* All threads of the row's blocks; what they wrote in shared memory before is seen after. */
template <int kBlocks>
__device__ __forceinline__ void row_barrier() {
  arrive_in_row<kBlocks>();
  wait_in_row<kBlocks>();
}

template <int kBlocks>
__device__ __forceinline__ u32 place_in_block(const void* place, int rank) {
  u32 address = static_cast<u32>(__cvta_generic_to_shared(place));
#if __CUDA_ARCH__ >= 900
  if constexpr (kBlocks > 1) {
    asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(rank));
  }
#endif
  return address;
}

/* Write to the same place in another block of the row. */
template <int kBlocks>
__device__ __forceinline__ void put_in_block(u64* place, int rank, u64 value) {
  if constexpr (kBlocks == 1) {
    *place = value;
  } else {
#if __CUDA_ARCH__ >= 900
    asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(place_in_block<kBlocks>(place, rank)),
                 "l"(value)
                 : "memory");
#endif
  }
}

/* Every block's value at its rank in `places` [kBlocks] of all blocks, after a `row_barrier`. */
template <int kBlocks>
__device__ __forceinline__ void share_in_row(u64* places, u64 value) {
  if (threadIdx.x < kBlocks) {
    put_in_block<kBlocks>(places + blockIdx.x % kBlocks, threadIdx.x, value);
  }
}

/* The same place in another block of the row. */
template <int kBlocks>
__device__ __forceinline__ u32 get_from_block(const u32* place, int rank) {
  u32 word;
#if __CUDA_ARCH__ >= 900
  if constexpr (kBlocks > 1) {
    asm volatile("ld.shared::cluster.u32 %0, [%1];"
                 : "=r"(word)
                 : "r"(place_in_block<kBlocks>(place, rank))
                 : "memory");
    return word;
  }
#endif
  word = *place;
  return word;
}
template <int kBlocks>
__device__ __forceinline__ uint4 get_from_block(const uint4* place, int rank) {
  uint4 words;
#if __CUDA_ARCH__ >= 900
  if constexpr (kBlocks > 1) {
    asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                 : "r"(place_in_block<kBlocks>(place, rank))
                 : "memory");
    return words;
  }
#endif
  words = *place;
  return words;
}

}  // namespace ember
