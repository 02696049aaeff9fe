/*
 * sample_tokens: one token per row by temperature, top_k, top_p, min_p and counter-based noise.
 *
 * What       temperature 0: the largest logit, ties to the lowest id. Else the token with the
 *            largest (x - max) / temperature + noise(seed, position, token) of those that are left
 *            by, in this order: top_k (and all that equal the k-th), top_p (the fewest whose
 *            weights, exp((x - max) / temperature) in steps of 2^-40, reach the share of the
 *            total; of equal ones the lower ids), min_p. NaN or infinite maximum: -1
 * Shapes     logits [N, V]; slots [N] int32, negative: padding, whose token is 0; positions [N]
 *            int64; params [slots] of 32 bytes; token_ids [N] int64
 * Types      bf16, fp32; scores in fp32 as torch computes them; sums of weights in whole numbers,
 *            so they depend on no order. The total of a row without top_k is of fast exponentials,
 *            added 8 by 8 in fp32: within some 2^-20 of the sum of the weights
 * Mapping    a cluster of thread blocks per row (see row_cluster.cuh). Memory is read once; then
 *            1. the maximum, and with top_k a bound that at least k tokens reach, from the
 *               threads' own maxima
 *            2. top_p without top_k: the total weight
 *            3. the cut: a histogram of the tokens above a bound over their keys, whole numbers
 *               that order as the logits do. All blocks add up the bins of all. Where a bin has
 *               more than one key it is cut into bins itself
 *            4. the draw. A bound that most packs fail needs an exponential per pack; what passes is
 *               computed in full. Packs whose largest token cannot win with the largest noise of
 *               all, or is cut away, need no noise
 * Requires   grid N * kBlocks, 256 threads; shared memory of a slice if it is kept
 * Bound      memory: N * V * sizeof(Element) bytes; without truncation nearly as much arithmetic
 * Tried      nothing else yet
 * Test       tests/kernels/test_sample_tokens.py          Bench  python -m benchmarks.kernels
 * Source     Gumbel-max; Philox4x32-10: Salmon et al., SC 2011
 */
#include "row_cluster.cuh"

namespace ember {

constexpr int kBins = 1024, kThreadBins = kBins / kRowThreads;
constexpr int kAllIds = 0x7fffffff;
constexpr float kSlack = 1.001f;  // of fast bounds, far above their errors
constexpr u64 kNone = 0x007fffff00000000ull;  // ranks below any token: -inf

/* SlotParams.table */
struct DrawRecord {
  u64 seed;
  double top_p;
  float temperature, min_p;
  int top_k, unused;
};

struct Philox {
  u32 key0, key1, position;

  static __device__ __forceinline__ void multiply(u32 a, u32 b, u32& low, u32& high) {
    asm("{ .reg .u64 p;\nmul.wide.u32 p, %2, %3;\nmov.b64 {%0, %1}, p; }"
        : "=r"(low), "=r"(high)
        : "r"(a), "r"(b));
  }

  /* Words of tokens 4 * block .. 4 * block + 3. */
  __device__ __forceinline__ uint4 words(u32 block) const {
    u32 c0 = block, c1 = position, c2 = 0, c3 = 0, k0 = key0, k1 = key1;
    // Keys of all rounds, kept from token to token, are more registers than there are.
    asm volatile("" : "+r"(k0), "+r"(k1));
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      u32 low0, high0, low1, high1;
      multiply(c0, 0xd2511f53u, low0, high0);
      multiply(c2, 0xcd9e8d57u, low1, high1);
      c0 = high1 ^ c1 ^ k0;
      c2 = high0 ^ c3 ^ k1;
      c1 = low1;
      c3 = low0;
      k0 += 0x9e3779b9u;
      k1 += 0xbb67ae85u;
    }
    return make_uint4(c0, c1, c2, c3);
  }

  /* As sampling.gumbel_noise. */
  __device__ __forceinline__ float noise(u32 token) const {
    const uint4 all = words(token / 4);
    const u32 half = token & 2 ? (token & 1 ? all.w : all.z) : (token & 1 ? all.y : all.x);
    const float uniform = (__uint2float_rn(half) + 0.5f) * 2.3283064365386963e-10f;
    return -logf(-log1pf(-fminf(uniform, 1.0f - 5.9604644775390625e-08f)));
  }
};

/* Keys low .. high in bins of 2^shift, the largest first. */
struct Level {
  u32 low, high;
  int shift;
  u64 before;  // mass above `high`

  /* Bins of weights take twice the room, and are not needed where a bin is one key. */
  __device__ __forceinline__ Level(u32 low, u32 high, u64 before, bool by_weight)
      : low(low), high(high), before(before) {
    const int bits = kWarpSize - __clz(static_cast<int>(high - low));
    shift = bits <= 10 ? 0 : bits - (by_weight ? 9 : 10);
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

template <int kBlocks>
struct SampleShared {
  uint4 bins[kBins / 4];  // counts, or kBins / 2 sums of weights
  u64 largest[kBlocks], bounds[kBlocks], weights[kBlocks], bests[kBlocks];
  u64 places[2][kRowWarps];
  u64 best;
  Crossing crossing;
  int last_id;
};

/* What is kept: elements above `value`, and of those equal to it the ids up to `last_id`. */
struct Cut {
  float value;
  int last_id;
};

template <typename Element, int kBlocks, bool kResident>
struct RowDraw {
  using Slice = RowSlice<Element, kBlocks, kResident>;
  using Key = KeyOf<Element>;
  using Shared = SampleShared<kBlocks>;

  const Slice& slice;
  Shared& shared;
  float max, temperature, per_log2;  // per_log2 = log2(e) / temperature
  int turn = 0;
  bool are_bins_clear = true;

  __device__ __forceinline__ RowDraw(const Slice& slice, Shared& shared, float max,
                                     float temperature)
      : slice(slice), shared(shared), max(max), temperature(temperature),
        per_log2(kLog2e / temperature) {}

  __device__ __forceinline__ u64* places() { return shared.places[turn ^= 1]; }
  __device__ __forceinline__ u32* counts() const { return reinterpret_cast<u32*>(shared.bins); }
  __device__ __forceinline__ u64* sums() const { return reinterpret_cast<u64*>(shared.bins); }

  __device__ __forceinline__ float scaled(float x) const {
    return __fdiv_rn(x - max, temperature);
  }
  __device__ __forceinline__ u64 weight(float x) const {
    return static_cast<u64>(static_cast<i64>(expf(scaled(x)) * kWeightScale));
  }
  /* A number that no token with `scaled` of at least `logarithm` is below. */
  __device__ __forceinline__ float floor_at(float logarithm) const {
    return max + temperature * (logarithm - 1e-3f) - fabsf(max) * 1e-6f;
  }

  template <typename Visit>
  __device__ __forceinline__ void for_each_from(float floor, Visit visit) const {
    for (int i = threadIdx.x; i < slice.num_packs; i += kRowThreads) {
      const RowPack<Element> pack = slice.get(i);
      if (!(pack.max() >= floor)) continue;
#pragma unroll
      for (int j = 0; j < kPackTokens; ++j) {
        if (pack.value(j) >= floor) visit(pack.value(j));
      }
    }
  }

  /* Sum over the row's blocks, which call it once. */
  __device__ __forceinline__ u64 row_sum(u64 x) {
    share_in_row<kBlocks>(shared.weights, block_sum(x, places()));
    row_barrier<kBlocks>();
    u64 sum = 0;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) sum += shared.weights[i];
    return sum;
  }

  __device__ __forceinline__ u64 total_weight() {
    return row_sum(slice.sum_of_exponentials(max, per_log2));
  }

  __device__ __forceinline__ u64 weight_from(float floor) {
    u64 sum = 0;
    for_each_from(floor, [&](float x) { sum += weight(x); });
    return row_sum(sum);
  }

  __device__ __forceinline__ void fill_bins(const Level& level, bool is_weighed);

  /* The row's bins, each thread its neighbouring ones: four counts, or two sums and two zeros. */
  __device__ __forceinline__ void gather_bins(bool is_weighed, u64 (&mass)[kThreadBins]) const;

  /* Counts of a level of single keys to weights, as far as `last_bin`. */
  __device__ __forceinline__ void weigh(
      const Level& level, int last_bin, u64 (&mass)[kThreadBins]) const;

  __device__ __forceinline__ Crossing cross(
      const u64 (&mass)[kThreadBins], int bins_of_thread, u64 before, double target);

  /* The single key at which the count or weight of the tokens from above reaches `target`:
   * `level` is then of single keys, and `counts_of_bins` are this thread's of it. */
  __device__ __forceinline__ Crossing find(
      Level& level, bool by_weight, double target, u64 (&counts_of_bins)[kThreadBins]);

  /* Id of the n-th (from 1) element of this block equal to `value`. */
  __device__ __forceinline__ int nth_id(float value, u64 n);

  /* `kept` of the row's elements of a bin of one key stay, lower ids first. */
  __device__ __forceinline__ int last_id_of(float value, int bin, u64 kept);

  /* Where top_p's share ends in a bin of one key. */
  __device__ __forceinline__ Cut cut_in_bin(
      const Level& level, const Crossing& crossing, double target);

  /* top_k and top_p. */
  __device__ __forceinline__ Cut truncate(int top_k, double top_p);

  /* The best of this block's tokens that are left; `seed` is this thread's largest one. */
  __device__ __forceinline__ u64 draw(
      const Philox& philox, const Cut& cut, float min_p, float seed_value, int seed_token);
};

template <typename Element, int kBlocks, bool kResident>
__device__ __forceinline__ void RowDraw<Element, kBlocks, kResident>::fill_bins(
    const Level& level, bool is_weighed) {
  if (!are_bins_clear) {
    row_barrier<kBlocks>();  // other blocks have read them
    shared.bins[threadIdx.x] = make_uint4(0, 0, 0, 0);
    __syncthreads();
  }
  are_bins_clear = false;
  for_each_from(Key::value(level.low), [&](float x) {
    const u32 distance = level.high - Key::of(x);
    if (distance > level.high - level.low) return;  // above
    if (is_weighed) {
      atomicAdd(sums() + (distance >> level.shift), weight(x));
    } else {
      atomicAdd(counts() + (distance >> level.shift), 1u);
    }
  });
}

template <typename Element, int kBlocks, bool kResident>
__device__ __forceinline__ void RowDraw<Element, kBlocks, kResident>::gather_bins(
    bool is_weighed, u64 (&mass)[kThreadBins]) const {
#pragma unroll
  for (int i = 0; i < kThreadBins; ++i) mass[i] = 0;
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
    const int rank = (blockIdx.x + i) % kBlocks;
    const uint4 words = get_from_block<kBlocks>(shared.bins + threadIdx.x, rank);
    if (is_weighed) {
      mass[0] += static_cast<u64>(words.y) << 32 | words.x;
      mass[1] += static_cast<u64>(words.w) << 32 | words.z;
    } else {
      mass[0] += words.x;
      mass[1] += words.y;
      mass[2] += words.z;
      mass[3] += words.w;
    }
  }
}

template <typename Element, int kBlocks, bool kResident>
__device__ __forceinline__ void RowDraw<Element, kBlocks, kResident>::weigh(
    const Level& level, int last_bin, u64 (&mass)[kThreadBins]) const {
#pragma unroll
  for (int i = 0; i < kThreadBins; ++i) {
    const int bin = threadIdx.x * kThreadBins + i;
    if (bin > last_bin) mass[i] = 0;
    if (mass[i]) mass[i] *= weight(Key::value(level.high - bin));
  }
}

template <typename Element, int kBlocks, bool kResident>
__device__ __forceinline__ Crossing RowDraw<Element, kBlocks, kResident>::cross(
    const u64 (&mass)[kThreadBins], int bins_of_thread, u64 before, double target) {
  if (threadIdx.x == 0) shared.crossing.bin = -1;
  u64 own = 0;
#pragma unroll
  for (int i = 0; i < kThreadBins; ++i) own += mass[i];
  before += sum_before(own, places());
  if (static_cast<double>(before) < target && static_cast<double>(before + own) >= target) {
#pragma unroll
    for (int i = 0; i < kThreadBins; ++i) {
      const bool is_reached = static_cast<double>(before + mass[i]) >= target;
      if (is_reached && static_cast<double>(before) < target) {
        shared.crossing = {static_cast<int>(threadIdx.x) * bins_of_thread + i, before, mass[i]};
      }
      before += mass[i];
    }
  }
  __syncthreads();
  return shared.crossing;
}

template <typename Element, int kBlocks, bool kResident>
__device__ __forceinline__ Crossing RowDraw<Element, kBlocks, kResident>::find(
    Level& level, bool by_weight, double target, u64 (&counts_of_bins)[kThreadBins]) {
  while (true) {
    const bool is_weighed = by_weight && level.shift > 0;
    fill_bins(level, is_weighed);
    row_barrier<kBlocks>();
    gather_bins(is_weighed, counts_of_bins);
    u64 mass[kThreadBins];
#pragma unroll
    for (int i = 0; i < kThreadBins; ++i) mass[i] = counts_of_bins[i];
    if (by_weight && !is_weighed) weigh(level, kBins, mass);
    const Crossing crossing =
        cross(mass, is_weighed ? kThreadBins / 2 : kThreadBins, level.before, target);
    if (crossing.bin < 0 || level.shift == 0) return crossing;
    level = level.inside(crossing.bin, crossing.before, by_weight);
  }
}

template <typename Element, int kBlocks, bool kResident>
__device__ __forceinline__ int RowDraw<Element, kBlocks, kResident>::nth_id(
    float value, u64 n) {
  const int share = (slice.num_packs + kRowThreads - 1) / kRowThreads;
  const int begin = threadIdx.x * share, end = min(begin + share, slice.num_packs);
  u32 found = 0;
  for (int i = begin; i < end; ++i) {
    const RowPack<Element> pack = slice.get(i);
#pragma unroll
    for (int j = 0; j < kPackTokens; ++j) found += pack.value(j) == value;
  }
  u64 before = sum_before(found, places());
  if (before < n && before + found >= n) {
    for (int i = begin; i < end; ++i) {
      const RowPack<Element> pack = slice.get(i);
#pragma unroll
      for (int j = 0; j < kPackTokens; ++j) {
        before += pack.value(j) == value;
        if (pack.value(j) == value && before == n) shared.last_id = slice.token(i) + j;
      }
    }
  }
  __syncthreads();
  return shared.last_id;
}

template <typename Element, int kBlocks, bool kResident>
__device__ __forceinline__ int RowDraw<Element, kBlocks, kResident>::last_id_of(
    float value, int bin, u64 kept) {
  const int lane = threadIdx.x % kWarpSize, rank = blockIdx.x % kBlocks;
  const u64 count = lane < kBlocks ? get_from_block<kBlocks>(counts() + bin, lane) : 0;
  const u64 before = warp_sum(lane < rank ? count : 0);
  const u64 here = __shfl_sync(kAllLanes, count, rank);
  if (kept >= before + here) return kAllIds;
  if (kept <= before) return -1;
  return nth_id(value, kept - before);
}

template <typename Element, int kBlocks, bool kResident>
__device__ __forceinline__ Cut RowDraw<Element, kBlocks, kResident>::cut_in_bin(
    const Level& level, const Crossing& crossing, double target) {
  const float value = Key::value(level.high - crossing.bin);
  const u64 each = weight(value), count = crossing.mass / each;
  u64 kept = static_cast<u64>(ceil((target - static_cast<double>(crossing.before)) / each));
  kept = kept < 1 ? 1 : (kept > count ? count : kept);
  while (kept > 1 && static_cast<double>(crossing.before + (kept - 1) * each) >= target) --kept;
  while (kept < count && static_cast<double>(crossing.before + kept * each) < target) ++kept;
  return {value, last_id_of(value, crossing.bin, kept)};
}

template <typename Element, int kBlocks, bool kResident>
__device__ __forceinline__ Cut RowDraw<Element, kBlocks, kResident>::truncate(
    int top_k, double top_p) {
  Cut cut{minus_infinite(), kAllIds};
  const u32 top = Key::of(max);
  u64 counts_of_bins[kThreadBins];
  if (top_k > 0) {
    u64 bound = shared.bounds[0];
#pragma unroll
    for (int i = 1; i < kBlocks; ++i) bound = min(bound, shared.bounds[i]);
    Level level(static_cast<u32>(bound), top, 0, false);
    const bool is_whole = level.shift == 0;
    const Crossing crossing = find(level, false, top_k, counts_of_bins);
    if (crossing.bin >= 0) cut.value = Key::value(level.high - crossing.bin);
    if (top_p < 1.0 && is_whole && crossing.bin >= 0) {
      weigh(level, crossing.bin, counts_of_bins);
      u64 own = 0;
#pragma unroll
      for (int i = 0; i < kThreadBins; ++i) own += counts_of_bins[i];
      const double target = top_p * static_cast<double>(block_sum(own, places()));
      const Crossing share_end = cross(counts_of_bins, kThreadBins, 0, target);
      return share_end.bin < 0 ? cut : cut_in_bin(level, share_end, target);
    }
  }
  if (!(top_p < 1.0)) return cut;
  const u64 total = top_k > 0 ? weight_from(cut.value) : total_weight();
  // What lies below `share` of the largest weight adds up to less than 1 - top_p.
  const float share = (0.999f * static_cast<float>(1.0 - top_p) - 1e-6f) *
                      (static_cast<float>(total) / kWeightScale) / slice.vocab_size;
  const float floor = fmaxf(floor_at(fmaxf(logf(share), -27.75f)), cut.value);
  const double target = top_p * static_cast<double>(total);
  Level level(Key::of(floor), top, 0, true);
  const Crossing crossing = find(level, true, target, counts_of_bins);
  if (crossing.bin < 0) return {Key::value(level.low), kAllIds};
  return cut_in_bin(level, crossing, target);
}

template <typename Element, int kBlocks, bool kResident>
__device__ __forceinline__ u64 RowDraw<Element, kBlocks, kResident>::draw(
    const Philox& philox, const Cut& cut, float min_p, float seed_value, int seed_token) {
  const auto is_kept = [&](float x, int token) {
    return x > cut.value || (x == cut.value && token <= cut.last_id);
  };
  const auto rank_of = [&](float x, int token) {
    const float score = scaled(x);
    if (min_p > 0.0f && !(expf(score) >= min_p)) return kNone;
    return ranked(score + philox.noise(token), token);
  };
  u64 best = kNone;
  if (seed_value > minus_infinite() && is_kept(seed_value, seed_token)) {
    best = rank_of(seed_value, seed_token);
  }
  best = block_max(best, places());
  if (threadIdx.x == 0) shared.best = best;
  __syncthreads();

  const float floor =
      min_p > 0.0f ? fmaxf(cut.value, floor_at(logf(min_p))) : cut.value;
  volatile u64& shared_best = shared.best;
  for (int i = threadIdx.x; i < slice.num_packs; i += kRowThreads) {
    const RowPack<Element> pack = slice.get(i);
    const float largest = pack.max();
    if (!(largest >= floor)) continue;
    const float lead = value_of(shared_best) * kLog2e;
    const float bound = (largest - max) * per_log2 - lead;
    if (!(bound > -33.1f)) continue;  // beyond the largest noise
    const int token = slice.token(i);
    const uint4 low = philox.words(token / 4), high = philox.words(token / 4 + 1);
    // noise > d means: -log(1 - u) < exp(-d), of which u < exp(-d) follows.
    const u32 least = min(min(min(low.x, low.y), min(low.z, low.w)),
                          min(min(high.x, high.y), min(high.z, high.w)));
    constexpr float kUnit = 2.3283064365386963e-10f;  // 2^-32
    if (!(__uint2float_rn(least) * kUnit <= exp2_fast(bound) * kSlack)) continue;
    const u32 words[kPackTokens] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    u32 chosen = 0;
#pragma unroll
    for (int j = 0; j < kPackTokens; ++j) {
      const float x = pack.value(j), limit = exp2_fast((x - max) * per_log2 - lead) * kSlack;
      const bool may_win = __uint2float_rn(words[j]) * kUnit <= limit;
      if (may_win && x > minus_infinite() && x >= floor && is_kept(x, token + j)) {
        chosen |= 1u << j;
      }
    }
    while (chosen) {
      const int j = __ffs(static_cast<int>(chosen)) - 1;
      chosen &= chosen - 1;
      const u64 rank = rank_of(slice.element(i, j), token + j);
      if (rank > shared_best) atomicMax(&shared.best, rank);
    }
  }
  __syncthreads();
  return shared.best;
}

/* Largest key that at least `wanted` of the block's threads reach. */
template <typename Element>
__device__ __forceinline__ u32 reached_key(u32 key, int wanted) {
  u32 reached = 0;
#pragma unroll
  for (int bit = 8 * sizeof(Element) - 1; bit >= 0; --bit) {
    const u32 trial = reached | 1u << bit;
    if (__syncthreads_count(key >= trial) >= wanted) reached = trial;
  }
  return reached;
}

template <typename Element, int kBlocks, bool kResident>
__global__ void
#if __CUDA_ARCH__ >= 900
__cluster_dims__(kBlocks, 1, 1)
#endif
    __launch_bounds__(kRowThreads, 4)
        sample_tokens_kernel(const Element* logits, const int* slots, const i64* positions,
                             const DrawRecord* params, i64* token_ids, int vocab_size) {
  extern __shared__ uint4 kept[];
  __shared__ SampleShared<kBlocks> shared;
  const int row = blockIdx.x / kBlocks;
  const bool is_first = blockIdx.x % kBlocks == 0 && threadIdx.x == 0;
  shared.bins[threadIdx.x] = make_uint4(0, 0, 0, 0);
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int slot = slots[row];
  if (slot < 0) {
    if (is_first) token_ids[row] = 0;
    return;
  }
  arrive_in_row<kBlocks>();  // memory of another block may be written once it has started
  const DrawRecord settings = params[slot];
  const Philox philox{static_cast<u32>(settings.seed), static_cast<u32>(settings.seed >> 32),
                      static_cast<u32>(positions[row])};
  const RowSlice<Element, kBlocks, kResident> slice(logits, row, vocab_size, kept);
  const Largest largest = slice.load();
  const int token = slice.token_of(largest);
  const bool is_greedy = settings.temperature == 0.0f;
  const int top_k = settings.top_k < vocab_size ? settings.top_k : 0;
  u32 bound = 0;
  const int wanted = (top_k + kBlocks - 1) / kBlocks;
  if (!is_greedy && top_k > 0 && wanted <= kRowThreads) {
    bound = reached_key<Element>(KeyOf<Element>::of(largest.value), wanted);
  }
  bound = max(bound, KeyOf<Element>::of(minus_infinite()));
  const u64 here = block_max(ranked(largest.value, token), shared.places[0]);
  wait_in_row<kBlocks>();
  share_in_row<kBlocks>(shared.largest, here);
  share_in_row<kBlocks>(shared.bounds, bound);
  row_barrier<kBlocks>();
  const u64 top = best_of<kBlocks>(shared.largest);
  const float max = value_of(top);
  const bool is_broken = !(fabsf(max) <= 3.4028234663852886e38f);
  if (is_greedy || is_broken) {
    if (is_first) token_ids[row] = is_broken ? -1 : token_of(top);
    return;
  }

  RowDraw<Element, kBlocks, kResident> draw(slice, shared, max, settings.temperature);
  const Cut cut = draw.truncate(top_k, settings.top_p);
  const u64 best = draw.draw(philox, cut, settings.min_p, largest.value, token);
  share_in_row<kBlocks>(shared.bests, best);
  row_barrier<kBlocks>();
  if (is_first) token_ids[row] = token_of(best_of<kBlocks>(shared.bests));
}

}  // namespace ember
