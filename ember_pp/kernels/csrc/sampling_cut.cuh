/*
 * sampling_cut: which tokens of a row top_k and top_p keep, however many those are.
 *
 * What       a histogram of the tokens above a bound over their keys, whole numbers that order as
 *            the logits do; all blocks of the row add up the bins of all. Where a bin has more
 *            than one key, it is cut into bins itself
 * Types      sums of weights, exp((x - max) / temperature) in steps of 2^-40, are whole numbers
 *            that depend on no order. The total of a row without top_k is of fast exponentials,
 *            added 8 by 8 in fp32: within some 2^-20 of the sum of the weights
 * Source     own
 */
#pragma once
#include "row_cluster.cuh"

namespace ember {

constexpr int kBins = 512, kThreadBins = kBins / kRowThreads, kBinBits = 9;
constexpr int kAllIds = 0x7fffffff;

/* What scores and weights of a row are relative to, as torch computes them. */
struct RowScale {
  float max, temperature, per_log2;  // per_log2 = log2(e) / temperature

  __device__ __forceinline__ RowScale(float max, float temperature)
      : max(max), temperature(temperature), per_log2(kLog2e / temperature) {}

  __device__ __forceinline__ float scaled(float x) const {
    return __fdiv_rn(x - max, temperature);
  }
  /* A number that no token with `scaled` of at least `logarithm` is below. */
  __device__ __forceinline__ float floor_at(float logarithm) const {
    return max + temperature * (logarithm - 1e-3f) - fabsf(max) * 1e-6f;
  }
};

/* Out of line, as it is long and used all over. */
__device__ __noinline__ u64 weight_of(float scaled) {
  return static_cast<u64>(static_cast<i64>(expf(scaled) * kWeightScale));
}

/* Keys low .. high in bins of 2^shift, the largest first. */
struct Level {
  u32 low, high;
  int shift;
  u64 before;  // mass above `high`

  /* Bins of weights take twice the room, and are not needed where a bin is one key. */
  __device__ __forceinline__ Level(u32 low, u32 high, u64 before, bool by_weight)
      : low(low), high(high), before(before) {
    const int bits = kWarpSize - __clz(static_cast<int>(high - low));
    shift = bits <= kBinBits ? 0 : bits - (by_weight ? kBinBits - 1 : kBinBits);
  }
  __device__ __forceinline__ Level inside(int bin, u64 mass_before, bool by_weight) const {
    const u32 top = high - (static_cast<u32>(bin) << shift);
    const u32 size = 1u << shift;
    return Level(top - low < size ? low : top - size + 1, top, mass_before, by_weight);
  }
};

/* The bin at which a target is reached; negative: it is not. */
struct Crossing {
  int bin;
  u64 before, mass;
};

/* What is kept: elements above `value`, and of those equal to it the ids up to `last_id`. */
struct Cut {
  float value;
  int last_id;

  __device__ __forceinline__ bool keeps(float x, int token) const {
    return x > value || (x == value && token <= last_id);
  }
};

template <int kBlocks>
struct CutShared {
  uint2 bins[kBins / 2];  // counts, or kBins / 2 sums of weights
  u64 weights[kBlocks];
  u64 places[2][kRowWarps];
  Crossing crossing;
  int last_id;
};

template <typename Visit, typename Slice>
__device__ __forceinline__ void for_each_from(const Slice& slice, float floor, Visit visit) {
  for (int i = threadIdx.x; i < slice.num_packs; i += kRowThreads) {
    const auto pack = slice.get(i);
    if (!(pack.max() >= floor)) continue;
#pragma unroll
    for (int j = 0; j < kPackTokens; ++j) {
      if (pack.value(j) >= floor) visit(pack.value(j), slice.token(i) + j);
    }
  }
}

/* Sum over the row's blocks; `shares` [kBlocks] is used once. */
template <int kBlocks>
__device__ __forceinline__ u64 row_sum(u64 x, u64* shares, u64* places) {
  share_in_row<kBlocks>(shares, block_sum(x, places));
  row_barrier<kBlocks>();
  u64 sum = 0;
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) sum += shares[i];
  return sum;
}

/* The row's bins; clear at first. */
template <typename Element, int kBlocks, bool kResident>
struct RowBins {
  using Key = KeyOf<Element>;

  const RowSlice<Element, kBlocks, kResident>& slice;
  const RowScale& scale;
  CutShared<kBlocks>& shared;
  int turn = 0;
  bool are_clear = true;

  __device__ __forceinline__ u64* places() { return shared.places[turn ^= 1]; }
  __device__ __forceinline__ u32* counts() const { return reinterpret_cast<u32*>(shared.bins); }
  __device__ __forceinline__ u64 weight(float x) const { return weight_of(scale.scaled(x)); }

  __device__ __forceinline__ void add_weight(u32 bin, u64 weight) const {
    u32* halves = counts() + 2 * bin;
    const u32 low = static_cast<u32>(weight), before = atomicAdd(halves, low);
    const u32 high = static_cast<u32>(weight >> 32) + (before + low < before);
    if (high) atomicAdd(halves + 1, high);
  }

  __device__ __forceinline__ void fill(const Level& level, bool is_weighed) {
    if (!are_clear) {
      row_barrier<kBlocks>();  // other blocks have read them
      shared.bins[threadIdx.x] = make_uint2(0, 0);
      __syncthreads();
    }
    are_clear = false;
    for_each_from(slice, Key::value(level.low), [&](float x, int) {
      const u32 distance = level.high - Key::of(x);
      if (distance > level.high - level.low) return;  // above
      if (is_weighed) {
        add_weight(distance >> level.shift, weight(x));
      } else {
        atomicAdd(counts() + (distance >> level.shift), 1u);
      }
    });
    row_barrier<kBlocks>();
  }

  /* Of all blocks, each thread its neighbouring ones: two counts, or a sum and zero. */
  __device__ __forceinline__ void gather(bool is_weighed, u64 (&mass)[kThreadBins]) const {
    mass[0] = mass[1] = 0;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      const int rank = (blockIdx.x + i) % kBlocks;
      const uint2 words = get_from_block<kBlocks>(shared.bins + threadIdx.x, rank);
      if (is_weighed) {
        mass[0] += static_cast<u64>(words.y) << 32 | words.x;
      } else {
        mass[0] += words.x;
        mass[1] += words.y;
      }
    }
  }

  /* Counts of a level of single keys to weights, as far as `last_bin`. */
  __device__ __forceinline__ void weigh(const Level& level, int last_bin,
                                        u64 (&mass)[kThreadBins]) const {
#pragma unroll 1
    for (int i = 0; i < kThreadBins; ++i) {
      const int bin = threadIdx.x * kThreadBins + i;
      u64& own = i ? mass[1] : mass[0];
      own = own && bin <= last_bin ? own * weight(Key::value(level.high - bin)) : 0;
    }
  }

  __device__ __forceinline__ Crossing cross(const u64 (&mass)[kThreadBins], int bins_of_thread,
                                            u64 before, double target) {
    if (threadIdx.x == 0) shared.crossing.bin = -1;
    before += sum_before(mass[0] + mass[1], places());
#pragma unroll
    for (int i = 0; i < kThreadBins; ++i) {
      const bool is_reached = static_cast<double>(before + mass[i]) >= target;
      if (is_reached && static_cast<double>(before) < target) {
        shared.crossing = {static_cast<int>(threadIdx.x) * bins_of_thread + i, before, mass[i]};
      }
      before += mass[i];
    }
    __syncthreads();
    return shared.crossing;
  }

  /* The single key at which the count or weight of the tokens from above reaches `target`:
   * `level` is then of single keys, and `counts_of_bins` are this thread's of it. */
  __device__ __forceinline__ Crossing find(Level& level, bool by_weight, double target,
                                           u64 (&counts_of_bins)[kThreadBins]) {
    while (true) {
      const bool is_weighed = by_weight && level.shift > 0;
      fill(level, is_weighed);
      gather(is_weighed, counts_of_bins);
      u64 mass[kThreadBins] = {counts_of_bins[0], counts_of_bins[1]};
      if (by_weight && !is_weighed) weigh(level, kBins, mass);
      const Crossing crossing = cross(mass, is_weighed ? 1 : kThreadBins, level.before, target);
      if (crossing.bin < 0 || level.shift == 0) return crossing;
      level = level.inside(crossing.bin, crossing.before, by_weight);
    }
  }
};

/* Id of the n-th (from 1) element of this block's slice equal to `value`. */
template <typename Slice>
__device__ __forceinline__ int nth_id(const Slice& slice, float value, u64 n, u64* places,
                                      int* found_id) {
  const int share = (slice.num_packs + kRowThreads - 1) / kRowThreads;
  const int begin = threadIdx.x * share, end = min(begin + share, slice.num_packs);
  u32 found = 0;
  for (int i = begin; i < end; ++i) {
    const auto pack = slice.get(i);
#pragma unroll
    for (int j = 0; j < kPackTokens; ++j) found += pack.value(j) == value;
  }
  u64 before = sum_before(found, places);
  if (before < n && before + found >= n) {
    for (int i = begin; i < end; ++i) {
      for (int j = 0; j < kPackTokens; ++j) {
        if (slice.element(i, j) == value && ++before == n) *found_id = slice.token(i) + j;
      }
    }
  }
  __syncthreads();
  return *found_id;
}

/* `kept` of the row's elements in a bin of one key stay, the lower ids. */
template <typename Element, int kBlocks, bool kResident>
__device__ __forceinline__ int last_id_of(RowBins<Element, kBlocks, kResident>& bins, float value,
                                          int bin, u64 kept) {
  const int lane = threadIdx.x % kWarpSize, rank = blockIdx.x % kBlocks;
  const u64 count = lane < kBlocks ? get_from_block<kBlocks>(bins.counts() + bin, lane) : 0;
  const u64 before = warp_sum(lane < rank ? count : 0);
  const u64 here = __shfl_sync(kAllLanes, count, rank);
  if (kept >= before + here) return kAllIds;
  if (kept <= before) return -1;
  return nth_id(bins.slice, value, kept - before, bins.places(), &bins.shared.last_id);
}

/* Where top_p's share ends in a bin of one key. */
template <typename Element, int kBlocks, bool kResident>
__device__ __forceinline__ Cut cut_in_bin(RowBins<Element, kBlocks, kResident>& bins,
                                          const Level& level, const Crossing& crossing,
                                          double target) {
  const float value = KeyOf<Element>::value(level.high - crossing.bin);
  const u64 each = bins.weight(value), count = crossing.mass / each;
  u64 kept = static_cast<u64>(ceil((target - static_cast<double>(crossing.before)) /
                                   static_cast<double>(each)));
  kept = kept < 1 ? 1 : (kept > count ? count : kept);
  while (kept > 1 && static_cast<double>(crossing.before + (kept - 1) * each) >= target) --kept;
  while (kept < count && static_cast<double>(crossing.before + kept * each) < target) ++kept;
  return {value, last_id_of(bins, value, crossing.bin, kept)};
}

/* By top_p of `total`, of what is not below `kept_from`. */
template <typename Element, int kBlocks, bool kResident>
__device__ __forceinline__ Cut cut_by_weight(RowBins<Element, kBlocks, kResident>& bins,
                                             double top_p, u64 total, float kept_from) {
  // What lies below `share` of the largest weight adds up to less than 1 - top_p.
  const float share = (0.999f * static_cast<float>(1.0 - top_p) - 1e-6f) *
                      (static_cast<float>(total) / kWeightScale) / bins.slice.vocab_size;
  const float floor = fmaxf(bins.scale.floor_at(fmaxf(logf(share), -27.75f)), kept_from);
  const double target = top_p * static_cast<double>(total);
  using Key = KeyOf<Element>;
  Level level(Key::of(floor), Key::of(bins.scale.max), 0, true);
  u64 counts_of_bins[kThreadBins];
  const Crossing crossing = bins.find(level, true, target, counts_of_bins);
  if (crossing.bin < 0) return {Key::value(level.low), kAllIds};
  return cut_in_bin(bins, level, crossing, target);
}

/* By top_k, of which at least k tokens reach the key `bound`, then by top_p of what that left. */
template <typename Element, int kBlocks, bool kResident>
__device__ __forceinline__ Cut cut_by_count(RowBins<Element, kBlocks, kResident>& bins, int top_k,
                                            u32 bound, double top_p) {
  using Key = KeyOf<Element>;
  Level level(bound, Key::of(bins.scale.max), 0, false);
  const bool is_whole = level.shift == 0;
  u64 mass[kThreadBins];
  const Crossing crossing = bins.find(level, false, top_k, mass);
  if (crossing.bin < 0) return {minus_infinite(), kAllIds};  // none is left out
  const Cut cut{Key::value(level.high - crossing.bin), kAllIds};
  if (!(top_p < 1.0)) return cut;
  if (is_whole) {
    bins.weigh(level, crossing.bin, mass);
    const u64 total = block_sum(mass[0] + mass[1], bins.places());
    const double target = top_p * static_cast<double>(total);
    const Crossing end = bins.cross(mass, kThreadBins, 0, target);
    return end.bin < 0 ? cut : cut_in_bin(bins, level, end, target);
  }
  u64 sum = 0;
  for_each_from(bins.slice, cut.value, [&](float x, int) { sum += bins.weight(x); });
  const u64 total = row_sum<kBlocks>(sum, bins.shared.weights, bins.places());
  return cut_by_weight(bins, top_p, total, cut.value);
}

}  // namespace ember
