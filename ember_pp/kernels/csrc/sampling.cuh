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
 * Types      bf16, fp32; scores in fp32 as torch computes them; for sums see sampling_cut.cuh
 * Mapping    a cluster of thread blocks per row (see row_cluster.cuh). Memory is read once; then
 *            1. the maximum, and a bound that enough tokens reach, from the threads' own maxima
 *            2. few tokens reach it, as nearly always with top_k, min_p, and top_p on likely
 *               texts: they go to the row's first block, which ranks them, cuts and draws
 *            3. else the cut of sampling_cut.cuh, and a draw from all that it leaves. A bound
 *               that most packs fail needs an exponential per pack; what passes is computed in
 *               full. Packs whose largest token cannot win with the largest noise of all, or is
 *               cut away, need no noise
 * Requires   grid N * kBlocks, 256 threads; shared memory of a slice if it is kept
 * Bound      memory: N * V * sizeof(Element) bytes; without truncation nearly as much arithmetic
 * Tried      the cut of 3. for all: twice the time of a short list where that is enough
 * Test       tests/kernels/test_sample_tokens.py          Bench  python -m benchmarks.kernels
 * Source     Gumbel-max; Philox4x32-10: Salmon et al., SC 2011
 */
#include "sampling_cut.cuh"

namespace ember {

constexpr float kSlack = 1.001f;              // of fast bounds, far above their errors
constexpr u64 kNone = 0x007fffff00000000ull;  // ranks below any token: -inf
constexpr int kListed = kRowThreads;          // tokens that the row's first block ranks

/* Threads of each block that reach the bound of a short list: leaves room for more of a thread. */
template <int kBlocks>
constexpr int kReaching = kListed / kBlocks * 5 / 8;

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
};

/* As sampling.gumbel_noise. */
__device__ __noinline__ float noise_of(u32 key0, u32 key1, u32 position, u32 token) {
  const uint4 all = Philox{key0, key1, position}.words(token / 4);
  const u32 half = token & 2 ? (token & 1 ? all.w : all.z) : (token & 1 ? all.y : all.x);
  const float uniform = (__uint2float_rn(half) + 0.5f) * 2.3283064365386963e-10f;
  return -logf(-log1pf(-fminf(uniform, 1.0f - 5.9604644775390625e-08f)));
}

template <int kBlocks>
struct SampleShared {
  CutShared<kBlocks> cut;
  u64 largest[kBlocks], bounds[kBlocks], bests[kBlocks];
  u64 num_listed[kBlocks], totals[kBlocks], listed_weights[kBlocks];
  u64 list[kListed];  // of the row's first block; each block has its part
  u64 best;
  int count;
};

template <typename Element, int kBlocks, bool kResident>
struct RowDraw {
  using Slice = RowSlice<Element, kBlocks, kResident>;
  static constexpr int kShare = kListed / kBlocks;

  const Slice& slice;
  const RowScale& scale;
  const DrawRecord& settings;
  const Philox& philox;
  SampleShared<kBlocks>& shared;
  RowBins<Element, kBlocks, kResident>& bins;

  /* Of a token that top_k and top_p keep; kNone if min_p does not. */
  __device__ __forceinline__ u64 rank_of(float x, int token) const {
    const float score = scale.scaled(x);
    if (settings.min_p > 0.0f && !(expf(score) >= settings.min_p)) return kNone;
    return ranked(score + noise_of(philox.key0, philox.key1, philox.position, token), token);
  }

  /* Tokens from `floor` into the list; with `by_weight` the total weight too. Where they are too
   * many for it, or too few for top_p, false; the same in all blocks of the row. */
  __device__ __forceinline__ bool list_from(float floor, bool by_weight) {
    const int rank = blockIdx.x % kBlocks;
    u64 total = 0, weight = 0;
    if (by_weight) total = slice.sum_of_exponentials(scale.max, scale.per_log2);
    for_each_from(slice, floor, [&](float x, int token) {
      const int place = atomicAdd(&shared.count, 1);
      if (place >= kShare) return;
      put_in_block<kBlocks>(shared.list + rank * kShare + place, 0, ranked(x, token));
      if (by_weight) weight += bins.weight(x);
    });
    if (by_weight) {
      total = block_sum(total, bins.places());
      weight = block_sum(weight, bins.places());
      share_in_row<kBlocks>(shared.totals, total);
      share_in_row<kBlocks>(shared.listed_weights, weight);
    } else {
      __syncthreads();
    }
    share_in_row<kBlocks>(shared.num_listed, shared.count);
    row_barrier<kBlocks>();
    bool is_short = true;
    total = weight = 0;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      is_short = is_short && shared.num_listed[i] <= kShare;
      total += shared.totals[i];
      weight += shared.listed_weights[i];
    }
    if (!by_weight) return is_short;
    return is_short && static_cast<double>(weight) >= settings.top_p * static_cast<double>(total);
  }

  __device__ __forceinline__ u64 total_of_row() const {
    u64 total = 0;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) total += shared.totals[i];
    return total;
  }

  /* In the row's first block: of the list, by all settings. */
  __device__ __forceinline__ u64 draw_of_list(int top_k) {
    u64* sorted = reinterpret_cast<u64*>(shared.cut.bins);
    const int share = threadIdx.x / kShare, place = threadIdx.x % kShare;
    const bool is_listed = place < shared.num_listed[share];
    const u64 own = is_listed ? shared.list[threadIdx.x] : 0;
    int num_before = 0, num_listed = 0;
    for (int i = 0; i < kBlocks; ++i) {
      const int count = shared.num_listed[i];
      for (int j = 0; j < count; ++j) num_before += shared.list[i * kShare + j] > own;
      num_listed += count;
    }
    if (is_listed) sorted[num_before] = own;
    __syncthreads();
    // From here each thread has the token of its own place.
    const int at = threadIdx.x;
    const u64 candidate = at < num_listed ? sorted[at] : 0;
    const float x = value_of(candidate);
    bool is_kept = at < num_listed && (top_k == 0 || x >= value_of(sorted[top_k - 1]));
    if (settings.top_p < 1.0) {
      const u64 weight = is_kept ? bins.weight(x) : 0;
      const u64 before = sum_before(weight, bins.places());
      const u64 total = top_k == 0 ? total_of_row() : block_sum(weight, bins.places());
      is_kept = is_kept && static_cast<double>(before) <
                               settings.top_p * static_cast<double>(total);
    }
    return block_max(is_kept ? rank_of(x, token_of(candidate)) : kNone, bins.places());
  }

  /* The best of this block's tokens that are left; `seed` is this thread's largest one. */
  __device__ __forceinline__ u64 draw_of_slice(const Cut& cut, float floor, float seed_value,
                                               int seed_token) {
    u64 best = kNone;
    if (seed_value > minus_infinite() && cut.keeps(seed_value, seed_token)) {
      best = rank_of(seed_value, seed_token);
    }
    best = block_max(best, bins.places());
    if (threadIdx.x == 0) shared.best = best;
    __syncthreads();
    const volatile u32& best_score = reinterpret_cast<const volatile u32*>(&shared.best)[1];
    for (int i = threadIdx.x; i < slice.num_packs; i += kRowThreads) {
      const RowPack<Element> pack = slice.get(i);
      const float largest = pack.max();
      if (!(largest >= floor)) continue;
      const float lead = from_ordered_bits(best_score) * kLog2e;
      const float bound = (largest - scale.max) * scale.per_log2 - lead;
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
        const float x = pack.value(j);
        const float limit = exp2_fast((x - scale.max) * scale.per_log2 - lead) * kSlack;
        const bool may_win = __uint2float_rn(words[j]) * kUnit <= limit;
        if (may_win && x > minus_infinite() && x >= floor && cut.keeps(x, token + j)) {
          chosen |= 1u << j;
        }
      }
      while (chosen) {
        const int j = __ffs(static_cast<int>(chosen)) - 1;
        chosen &= chosen - 1;
        const u64 rank = rank_of(slice.element(i, j), token + j);
        if (rank > kNone) atomicMax(&shared.best, rank);
      }
    }
    __syncthreads();
    return shared.best;
  }
};

/* Largest key that at least `wanted` of the block's threads reach. */
template <typename Element>
__device__ __forceinline__ u32 reached_key(u32 key, int wanted) {
  u32 reached = 0;
#pragma unroll 1
  for (int bit = 8 * sizeof(Element) - 1; bit >= 0; --bit) {
    const u32 trial = reached | 1u << bit;
    if (__syncthreads_count(key >= trial) >= wanted) reached = trial;
  }
  return reached;
}

/* A token of a row whose maximum is known; in the row's first block. */
template <typename Element, int kBlocks, bool kResident>
__device__ __forceinline__ u64 draw_row(RowDraw<Element, kBlocks, kResident>& draw, int top_k,
                                        bool is_bound, float seed_value, int seed_token) {
  const DrawRecord& settings = draw.settings;
  SampleShared<kBlocks>& shared = draw.shared;
  const bool by_weight = top_k == 0 && settings.top_p < 1.0;
  u64 lowest = shared.bounds[0], highest = lowest;
#pragma unroll
  for (int i = 1; i < kBlocks; ++i) {
    lowest = min(lowest, shared.bounds[i]);
    highest = max(highest, shared.bounds[i]);
  }
  const float min_p_floor = settings.min_p > 0.0f ? draw.scale.floor_at(logf(settings.min_p))
                                                  : minus_infinite();
  if (is_bound || (top_k == 0 && !by_weight && settings.min_p > 0.0f)) {
    // Of top_k all must be listed whose weights its total has, so min_p does not raise the floor.
    const float floor = is_bound ? KeyOf<Element>::value(by_weight ? highest : lowest)
                                 : min_p_floor;
    if (draw.list_from(floor, by_weight)) {
      return blockIdx.x % kBlocks == 0 ? draw.draw_of_list(top_k) : 0;
    }
  }
  Cut cut{minus_infinite(), kAllIds};
  if (top_k > 0) {
    cut = cut_by_count(draw.bins, top_k, static_cast<u32>(lowest), settings.top_p);
  } else if (by_weight) {
    cut = cut_by_weight(draw.bins, settings.top_p, draw.total_of_row(), minus_infinite());
  }
  const float floor = fmaxf(cut.value, min_p_floor);
  const u64 best = draw.draw_of_slice(cut, floor, seed_value, seed_token);
  share_in_row<kBlocks>(shared.bests, best);
  row_barrier<kBlocks>();
  return best_of<kBlocks>(shared.bests);
}

template <typename Element, int kBlocks, bool kResident>
__global__ void
#if __CUDA_ARCH__ >= 900
__cluster_dims__(kBlocks, 1, 1)
#endif
    __launch_bounds__(kRowThreads, 4)
        sample_tokens_kernel(const Element* logits, const int* slots, const i64* positions,
                             const DrawRecord* params, i64* token_ids, int vocab_size,
                             int num_running) {
  extern __shared__ uint4 kept[];
  __shared__ SampleShared<kBlocks> shared;
  const int row = blockIdx.x / kBlocks;
  const bool is_first = blockIdx.x % kBlocks == 0 && threadIdx.x == 0;
  shared.cut.bins[threadIdx.x] = make_uint2(0, 0);
  if (threadIdx.x == 0) shared.count = 0;
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
  // VARIANT_BEFORE
  const Largest largest = slice.load();
  // VARIANT_AFTER
  const int token = slice.token_of(largest);
  const bool is_greedy = settings.temperature == 0.0f;
  const int top_k = settings.top_k < vocab_size ? settings.top_k : 0;
  const int wanted = top_k ? (top_k + kBlocks - 1) / kBlocks : kReaching<kBlocks>;
  const bool has_bound = !is_greedy && (top_k > 0 || settings.top_p < 1.0) &&
                         wanted <= kRowThreads;
  u32 bound = KeyOf<Element>::of(minus_infinite());
  if (has_bound) {
    bound = max(bound, reached_key<Element>(KeyOf<Element>::of(largest.value), wanted));
  }
  const u64 here = block_max(ranked(largest.value, token), shared.cut.places[0]);
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
  const RowScale scale(max, settings.temperature);
  RowBins<Element, kBlocks, kResident> bins{slice, scale, shared.cut};
  RowDraw<Element, kBlocks, kResident> draw{slice, scale, settings, philox, shared, bins};
  const u64 best = draw_row(draw, top_k, has_bound && wanted <= kReaching<kBlocks>, largest.value, token);
  if (is_first) token_ids[row] = token_of(best);
}

}  // namespace ember
