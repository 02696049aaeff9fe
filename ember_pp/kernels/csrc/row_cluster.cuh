/*
 * row_cluster: a row of logits shared by the thread blocks of a cluster.
 *
 * What       the row is cut into kBlocks slices of whole packs, in the order of token ids. Each
 *            thread block keeps its slice in shared memory (kResident), so later passes cost no
 *            memory traffic; else they read memory again. Warps tell each other numbers through
 *            `RowExchange`
 * Layout     a pack is 8 neighbouring tokens; beyond V it is filled with -inf. A thread has every
 *            256th pack of its slice
 * Mapping    one bulk copy brings a slice that is whole 16 bytes. The copies of the blocks of a
 *            multiprocessor come one after the other, so some compute while others wait; with
 *            loads by all threads all wait together. A number goes to another block as an
 *            asynchronous store that its barrier there counts: no fence, and nobody waits but for
 *            the numbers
 * Requires   a grid of rows * kBlocks blocks in x; kBlocks = 1 below sm_90, where __syncthreads
 *            stands for the messages
 * Tried      barriers of the cluster between phases: each fences in every warp
 * Source     own
 */
#pragma once
#include "device.cuh"

namespace ember {

using u64 = unsigned long long;

constexpr int kPackTokens = 8;
constexpr int kRowThreads = 256;
constexpr int kRowWarps = kRowThreads / kWarpSize;
constexpr int kLoadsInFlight = 5;                 // packs of a thread
constexpr float kWeightScale = 1099511627776.0f;  // 2^40
constexpr float kLog2e = 1.4426950408889634f;

__device__ __forceinline__ float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

__device__ __forceinline__ float minus_infinite() { return __int_as_float(0xff800000); }
__device__ __forceinline__ float infinite() { return __int_as_float(0x7f800000); }

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

/* Place of the first element that equals x; the last place where none does. */
template <typename Pack>
__device__ __forceinline__ int first_of(const Pack& pack, float x) {
  int first = kPackTokens - 1;
#pragma unroll
  for (int i = kPackTokens - 2; i >= 0; --i) {
    if (pack.value(i) == x) first = i;
  }
  return first;
}

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
  __device__ __forceinline__ int first_of(float x) const { return ember::first_of(*this, x); }
  /* Of the elements of even and of odd places; NaN if one is. */
  __device__ __forceinline__ u32 max_pair() const {
    u32 pair;
    asm("{ .reg .b32 a, b;\n"
        "max.NaN.bf16x2 a, %1, %2;\n"
        "max.NaN.bf16x2 b, %3, %4;\n"
        "max.NaN.bf16x2 %0, a, b; }"
        : "=r"(pair)
        : "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w));
    return pair;
  }
  __device__ __forceinline__ float max() const {
    const u32 pair = max_pair();
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
  __device__ __forceinline__ int first_of(float x) const { return ember::first_of(*this, x); }
  __device__ __forceinline__ float max() const {
    float largest = value(0);
#pragma unroll
    for (int i = 1; i < kPackTokens; ++i) largest = max_or_nan(largest, value(i));
    return largest;
  }
};

/* Of all packs that a thread sees; NaN if one element is. */
template <typename Element>
struct RunningMax {
  float largest = minus_infinite();

  __device__ __forceinline__ void take(const RowPack<Element>& pack) {
    largest = max_or_nan(largest, pack.max());
  }
  __device__ __forceinline__ float value() const { return largest; }
};
template <>
struct RunningMax<bf16> {
  u32 pair = 0xff80ff80u;

  __device__ __forceinline__ void take(const RowPack<bf16>& pack) {
    const u32 other = pack.max_pair();
    asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(pair) : "r"(other));
  }
  __device__ __forceinline__ float value() const {
    return max_or_nan(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  }
};

/* How many elements are not below `least`, which is an Element. */
template <typename Element>
struct Reaching {
  float least;
  u32 count = 0;

  __device__ __forceinline__ explicit Reaching(float least) : least(least) {}
  __device__ __forceinline__ void take(const RowPack<Element>& pack) {
#pragma unroll
    for (int i = 0; i < kPackTokens; ++i) count += pack.value(i) >= least;
  }
  __device__ __forceinline__ u32 value() const { return count; }
};
#if __CUDA_ARCH__ >= 900
template <>
struct Reaching<bf16> {
  u32 least, sum = 0;

  __device__ __forceinline__ explicit Reaching(float least) : least(pack_bf16(least, least)) {}
  __device__ __forceinline__ void take(const RowPack<bf16>& pack) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      u32 mask;  // of each half all bits or none
      asm("set.ge.u32.bf16x2 %0, %1, %2;" : "=r"(mask) : "r"(pack.word(i)), "r"(least));
      sum += mask;
    }
  }
  /* Modulo 2^32, `sum` is 65535 for a low half and -65536 for a high half. */
  __device__ __forceinline__ u32 value() const {
    const u32 low = -sum & 0xffffu, low_less_high = (sum + low) >> 16;
    return low + ((low - low_less_high) & 0xffffu);
  }
};
#endif

/* Candidates order by value, then the lower id first. */
__device__ __forceinline__ u64 ranked(float value, int token) {
  const u32 high = value == value ? ordered_bits(value) : 0xffffffffu;  // NaN above all
  return static_cast<u64>(high) << 32 | ~static_cast<u32>(token);
}
__device__ __forceinline__ float value_of(u64 rank) {
  return from_ordered_bits(static_cast<u32>(rank >> 32));
}
__device__ __forceinline__ int token_of(u64 rank) {
  return static_cast<int>(~static_cast<u32>(rank));
}

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

// ---------------------------------------------------------------------------------------
// messages between the blocks of a row

__device__ __forceinline__ u32 shared_address(const void* place) {
  return static_cast<u32>(__cvta_generic_to_shared(place));
}

__device__ __forceinline__ void init_barrier(u64* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
#endif
}
__device__ __forceinline__ void expect_bytes(u64* barrier, u32 bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
#endif
}
__device__ __forceinline__ void wait_for_bytes(u64* barrier, u32 parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile("{ .reg .pred done;\n"
               "again:\n"
               "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
               "@!done bra again; }" ::"r"(shared_address(barrier)),
               "r"(parity)
               : "memory");
#endif
}

/* Of whole 16 bytes, to this block, whose barrier counts them; one thread. */
__device__ __forceinline__ void copy_to_shared(void* to, const void* from, u32 bytes,
                                               u64* barrier) {
#if __CUDA_ARCH__ >= 900
  expect_bytes(barrier, bytes);
  if (bytes == 0) return;
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
               "[%0], [%1], %2, [%3];" ::"r"(shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
#endif
}

/* Write to the same place in another block of the row, which counts the bytes at its barrier. */
template <int kBlocks>
__device__ __forceinline__ void send_to_block(u64* place, u64* barrier, int block, u64 value) {
  if constexpr (kBlocks == 1) {
    *place = value;
  } else {
#if __CUDA_ARCH__ >= 900
    u32 address = shared_address(place), barrier_address = shared_address(barrier);
    asm volatile("mapa.shared::cluster.u32 %0, %0, %3;\n"
                 "mapa.shared::cluster.u32 %1, %1, %3;\n"
                 "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u64 [%0], %2, [%1];"
                 : "+r"(address), "+r"(barrier_address)
                 : "l"(value), "r"(block)
                 : "memory");
#endif
  }
}

/* What others send to this block; all its threads, once for a barrier. */
template <int kBlocks>
__device__ __forceinline__ void await_bytes(u64* barrier, u32 bytes) {
  if constexpr (kBlocks == 1) {
    __syncthreads();
  } else {
    if (threadIdx.x == 0) expect_bytes(barrier, bytes);
    wait_for_bytes(barrier, 0);
  }
}

// ---------------------------------------------------------------------------------------
// a row

/* Of a pack's weights, in steps of 2^-40: depends on the pack alone, and adds up in any order. */
__device__ __forceinline__ u64 whole_sum(const float (&y)[kPackTokens]) {
  const float low = (y[0] + y[1]) + (y[2] + y[3]), high = (y[4] + y[5]) + (y[6] + y[7]);
  return static_cast<u64>(__float2ll_rn((low + high) * kWeightScale));
}

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

  __device__ __forceinline__ int token(int pack) const {
    return (first_pack + pack) * kPackTokens;
  }

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

  /* After `load_max` a thread's own packs; those of others after a barrier. */
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

  /* What is whole 16 bytes may be copied at once. */
  __device__ __forceinline__ bool is_bulk() const {
#if __CUDA_ARCH__ >= 900
    return kResident && is_aligned && vocab_size % kPackTokens == 0;
#else
    return false;
#endif
  }

  /* Then `load_max`, with the same barrier, of the block alone; all threads, once. */
  __device__ __forceinline__ void begin_load(u64* barrier) const {
    if (is_bulk() && threadIdx.x == 0) {
      copy_to_shared(kept, row + token(0), static_cast<u32>(num_packs * sizeof(kept[0])), barrier);
    }
  }

  /* The one pass over memory; the largest element of this thread's packs, NaN if one is. */
  __device__ __forceinline__ float load_max(u64* barrier) const {
    RunningMax<Element> running;
    if (is_bulk()) {
      wait_for_bytes(barrier, 0);
      for (int i = threadIdx.x; i < num_packs; i += kRowThreads) running.take(kept[i]);
      return running.value();
    }
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
        running.take(packs[j]);
      }
    }
    return running.value();
  }

  /* This thread's part of the sum of 2^((x - max) * factor), by `whole_sum`. */
  __device__ __forceinline__ u64 sum_of_exponentials(float max, float factor) const {
    u64 sum = 0;
    for (int i = threadIdx.x; i < num_packs; i += kRowThreads) {
      const RowPack<Element> pack = get(i);
      float y[kPackTokens];
#pragma unroll
      for (int j = 0; j < kPackTokens; ++j) y[j] = exp2_fast((pack.value(j) - max) * factor);
      sum += whole_sum(y);
    }
    return sum;
  }

  /* The same of elements not below `floor` that come before the one ranked `cut`; 0: of all. */
  __device__ __forceinline__ u64 sum_of_exponentials(float max, float factor, float floor,
                                                     u64 cut) const {
    const float cut_value = cut ? value_of(cut) : minus_infinite();
    const int cut_token = ember::token_of(cut);
    const float least = fmaxf(floor, cut_value);
    u64 sum = 0;
    for (int i = threadIdx.x; i < num_packs; i += kRowThreads) {
      const RowPack<Element> pack = get(i);
      if (!(pack.max() >= least)) continue;
      float y[kPackTokens];
#pragma unroll
      for (int j = 0; j < kPackTokens; ++j) {
        const float x = pack.value(j);
        const bool is_before = x >= least && (x > cut_value || token(i) + j < cut_token);
        y[j] = is_before ? exp2_fast((x - max) * factor) : 0.0f;
      }
      sum += whole_sum(y);
    }
    return sum;
  }

  /* The first of this thread's tokens that equals `value`. */
  __device__ __forceinline__ int first_of(float value) const {
    for (int i = threadIdx.x; i < num_packs; i += kRowThreads) {
      const RowPack<Element> pack = get(i);
      if (pack.max() == value) return token(i) + pack.first_of(value);
    }
    return 0x7fffffff;
  }
};

/* What all warps of a row tell each other: up to kWords numbers each, in two sets, as a warp may be
 * an exchange ahead of another. */
template <int kBlocks, int kWords>
struct alignas(16) RowMail {
  u64 words[2][kWords][kBlocks * kRowWarps];
  u64 barriers[2], load_barrier;
};

/* Exchanges of a row's warps, each of which takes part in all: it posts, waits, and reads before it
 * posts again. So once a wait ends, all have read what the exchange before brought, and its set is
 * free. Waiting says nothing of other memory that warps wrote. */
template <int kBlocks, int kWords>
struct RowExchange {
  RowMail<kBlocks, kWords>& mail;
  int turn = -1;

  /* Then `open`, and `wait_open` before the first post. */
  __device__ __forceinline__ explicit RowExchange(RowMail<kBlocks, kWords>& mail) : mail(mail) {
    if (threadIdx.x == 0) {
      init_barrier(mail.barriers);
      init_barrier(mail.barriers + 1);
      init_barrier(&mail.load_barrier);
    }
  }
  __device__ __forceinline__ void open() const {
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0) asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
    __syncthreads();
#if __CUDA_ARCH__ >= 900
    if constexpr (kBlocks > 1) asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
  }
  __device__ __forceinline__ void wait_open() const {
#if __CUDA_ARCH__ >= 900
    if constexpr (kBlocks > 1) asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
  }

  /* Of this warp, the same in all lanes; lane i tells block i. */
  template <typename... Words>
  __device__ __forceinline__ void post(Words... values) {
    ++turn;
    constexpr int kCount = sizeof...(Words);
    static_assert(kCount <= kWords, "more than there is room for");
    const u64 all[kCount] = {static_cast<u64>(values)...};
    const int lane = threadIdx.x % kWarpSize;
    const int from = (blockIdx.x % kBlocks) * kRowWarps + threadIdx.x / kWarpSize;
    u64* barrier = mail.barriers + turn % 2;
    if constexpr (kBlocks > 1) {
      if (threadIdx.x == 0) expect_bytes(barrier, kCount * kBlocks * kRowWarps * sizeof(u64));
    }
    if (lane < kBlocks) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        send_to_block<kBlocks>(mail.words[turn % 2][i] + from, barrier, lane, all[i]);
      }
    }
  }
  __device__ __forceinline__ void wait() const {
    if constexpr (kBlocks == 1) {
      __syncthreads();
    } else {
      wait_for_bytes(mail.barriers + turn % 2, turn / 2 % 2);
    }
  }

  /* Of the last exchange. */
  __device__ __forceinline__ const u64* words(int index) const {
    return mail.words[turn % 2][index];
  }
  __device__ __forceinline__ u64 max(int index) const {
    u64 own = 0;
#pragma unroll
    for (int i = threadIdx.x % kWarpSize; i < kBlocks * kRowWarps; i += kWarpSize) {
      own = words(index)[i] > own ? words(index)[i] : own;
    }
    return warp_max(own);
  }
  __device__ __forceinline__ u64 sum(int index) const {
    u64 own = 0;
#pragma unroll
    for (int i = threadIdx.x % kWarpSize; i < kBlocks * kRowWarps; i += kWarpSize) {
      own += words(index)[i];
    }
    return warp_sum(own);
  }
  /* Word `other` of the warp whose word `index` is `value`. */
  __device__ __forceinline__ u64 partner(int index, int other, u64 value) const {
    u64 own = 0;
#pragma unroll
    for (int i = threadIdx.x % kWarpSize; i < kBlocks * kRowWarps; i += kWarpSize) {
      if (words(index)[i] == value) own = words(other)[i];
    }
    return warp_max(own);
  }
};

}  // namespace ember
