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
 *            so they depend on no order. The total of a row without top_k, and all sums of step 4,
 *            are of fast exponentials, added 8 by 8 in fp32: within some 2^-20 of the total
 * Mapping    a cluster of thread blocks per row (see row_cluster.cuh). Memory is read once; then
 *            1. the maximum, and a bound: of the warps' maxima the k-th, which k tokens reach; or a
 *               number that so many threads of each warp reach
 *            2. the tokens that reach it go to the row's first block, if they are few, and enough
 *               for top_p, as nearly always with top_k, and on text. It ranks each against all,
 *               cuts, and draws; the other blocks are free for the next row
 *            3. else, and for larger k, the k-th largest by counting what reaches each of
 *               three numbers between the bound and the maximum, again and again
 *            4. a draw from all that are left, then the weight of what comes before the drawn
 *               token. If that is top_p's share already, the token is cut away, and so is all that
 *               comes after: draw again of what comes before. The first is kept with probability
 *               top_p, and each next more likely: 1 + log(1 / top_p) draws at most, on average
 *            In a draw, a bound that most packs fail needs an exponential per pack; what passes is
 *            computed in full. Packs whose largest token cannot win with the largest noise of all,
 *            or is cut away, need no noise
 * Requires   grid N * kBlocks, 256 threads; shared memory of a slice if it is kept
 * Bound      memory: N * V * sizeof(Element) bytes; without truncation, the random numbers: 10
 *            instructions a token
 * Tried      a histogram of weights over keys for top_p, which needs no second draw: where most
 *            tokens are alike its additions to shared memory collide; a histogram of counts for
 *            top_k; in a draw, to compare with the best of a warp instead of the block; five
 *            blocks of 224 threads on a multiprocessor: faster where random numbers are the bound,
 *            slower with top_k. No faster: bringing later rows to the second-level cache ahead; the
 *            first rows one after the other; random numbers while the slice is on its way
 * Test       tests/kernels/test_sample_tokens.py          Bench  python -m benchmarks.kernels
 * Source     Gumbel-max; Philox4x32-10: Salmon et al., SC 2011; to draw again where top_p cut the
 *            token away: the rejection sampling of FlashInfer, here with the same noise each time
 */
#include "row_cluster.cuh"

namespace ember {

constexpr u64 kNone = 0x007fffff00000000ull;      // ranks below any token: -inf
constexpr float kLargest = 3.4028234663852886e38f;  // of finite numbers
constexpr float kUnit = 2.3283064365386963e-10f;    // 2^-32
constexpr float kSlack = 1.001f;                    // of fast bounds, far above their errors
constexpr int kListed = kRowThreads;                // tokens that the row's first block ranks,
constexpr int kShare = kListed / 4;                 // and of these of one block

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

  /* Words of tokens 4 * block .. 4 * (block + kCount) - 1. */
  template <int kCount>
  __device__ __forceinline__ void words(u32 block, uint4 (&result)[kCount]) const {
    u32 k0 = key0, k1 = key1, c[kCount][4];
    // Keys of all rounds, kept from token to token, are more registers than there are.
    asm volatile("" : "+r"(k0), "+r"(k1));
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      c[i][0] = block + i;
      c[i][1] = position;
      c[i][2] = c[i][3] = 0;
    }
#pragma unroll
    for (int round = 0; round < 10; ++round) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        u32 low0, high0, low1, high1;
        multiply(c[i][0], 0xd2511f53u, low0, high0);
        multiply(c[i][2], 0xcd9e8d57u, low1, high1);
        c[i][0] = high1 ^ c[i][1] ^ k0;
        c[i][2] = high0 ^ c[i][3] ^ k1;
        c[i][1] = low1;
        c[i][3] = low0;
      }
      k0 += 0x9e3779b9u;
      k1 += 0xbb67ae85u;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) result[i] = make_uint4(c[i][0], c[i][1], c[i][2], c[i][3]);
  }
  __device__ __forceinline__ u32 word(u32 token) const {
    uint4 all[1];
    words(token / 4, all);
    return token & 2 ? (token & 1 ? all[0].w : all[0].z) : (token & 1 ? all[0].y : all[0].x);
  }
};

/* As sampling.gumbel_noise. */
__device__ __forceinline__ float gumbel(u32 word) {
  const float uniform = (__uint2float_rn(word) + 0.5f) * kUnit;
  return -logf(-log1pf(-fminf(uniform, 1.0f - 5.9604644775390625e-08f)));
}

/* The best of some tokens by score, and the rank of its logit. */
struct Best {
  u64 score, logit;
};

struct alignas(16) Listed {
  u64 logit, weight;  // rank
};

template <int kBlocks>
struct SampleShared {
  RowMail<kBlocks, 3> mail;
  u64 list_barrier;
  u64 list[kBlocks * kShare];  // of the row's first block, each block its share
  Listed listed[kListed];      // the same without gaps
  u64 places[2][kRowWarps];
  u32 bound, lead;
  int num_listed;
};

template <typename Element, int kBlocks, bool kResident>
struct RowDraw {
  using Slice = RowSlice<Element, kBlocks, kResident>;
  using Shared = SampleShared<kBlocks>;
  using Key = KeyOf<Element>;

  const Slice& slice;
  Shared& shared;
  RowExchange<kBlocks, 3>& exchange;
  const DrawRecord& settings;
  const Philox& philox;
  float max, per_log2;  // per_log2 = log2(e) / temperature

  __device__ __forceinline__ float scaled(float x) const {
    return __fdiv_rn(x - max, settings.temperature);
  }
  __device__ __forceinline__ u64 weight(float x) const {
    return static_cast<u64>(static_cast<i64>(expf(scaled(x)) * kWeightScale));
  }
  /* A number that no token with `scaled` of at least `logarithm` is below. */
  __device__ __forceinline__ float floor_at(float logarithm) const {
    return max + settings.temperature * (logarithm - 1e-3f) - fabsf(max) * 1e-6f;
  }
  __device__ __forceinline__ u64 rank_of(float x, int token, u32 word) const {
    const float score = scaled(x);
    if (settings.min_p > 0.0f && !(expf(score) >= settings.min_p)) return kNone;
    return ranked(score + gumbel(word), token);
  }

  /* The n-th largest of the warps' largest; all threads. Once. */
  __device__ __forceinline__ float nth_of_warps(int n) {
    constexpr int kEntries = kBlocks * kRowWarps;
    const int entry = threadIdx.x / 4, part = threadIdx.x % 4;
    const u64* words = exchange.words(0);
    if (entry < kEntries) {
      const u32 own = static_cast<u32>(words[entry] >> 32);
      int count = 0;
#pragma unroll
      for (int i = part; i < kEntries / 2; i += 4) {
        const uint4 pair = reinterpret_cast<const uint4*>(words)[i];
        count += (pair.y >= own) + (pair.w >= own);
      }
      count += __shfl_xor_sync(kAllLanes, count, 1);
      count += __shfl_xor_sync(kAllLanes, count, 2);
      const u32 best = __reduce_max_sync(kAllLanes, count >= n ? own : 0);
      if (threadIdx.x % kWarpSize == 0) atomicMax(&shared.bound, best);
    }
    __syncthreads();
    return from_ordered_bits(shared.bound);
  }

  /* Of a block of the row, after `list_from`; more than kShare: not all are in the list. */
  __device__ __forceinline__ u32 listed_by(int block) const {
    u32 count = 0;
    if (block < kBlocks) {
#pragma unroll
      for (int i = 0; i < kRowWarps; ++i) {
        count += static_cast<u32>(exchange.words(0)[block * kRowWarps + i]);
      }
    }
    return count;
  }

  /* Tokens from `floor` on to the first block's list. False, in all blocks, where they are too
   * many, or too few for top_p. */
  __device__ __forceinline__ bool list_from(float floor, float largest, bool by_weight,
                                            u64& total) {
    const int rank = blockIdx.x % kBlocks, lane = threadIdx.x % kWarpSize;
    u32 count = 0;
    u64 weight_listed = 0, sum = 0;
    __syncwarp();
    u32 threads = __ballot_sync(kAllLanes, largest >= floor);
    for (; threads && __reduce_add_sync(kAllLanes, count) <= kShare; threads &= threads - 1) {
      const int thread = threadIdx.x - lane + __ffs(static_cast<int>(threads)) - 1;
      for (int i = thread + lane * kRowThreads; i < slice.num_packs; i += kWarpSize * kRowThreads) {
        const RowPack<Element> pack = slice.get(i);
        u32 chosen = 0;
#pragma unroll
        for (int j = 0; j < kPackTokens; ++j) chosen |= (pack.value(j) >= floor ? 1u : 0u) << j;
        if (!chosen) continue;
        count += __popc(chosen);
        int place = atomicAdd(&shared.num_listed, __popc(chosen));
        for (; chosen; chosen &= chosen - 1, ++place) {
          if (place >= kShare) break;
          const int j = __ffs(static_cast<int>(chosen)) - 1;
          const float x = slice.element(i, j);
          send_to_block<kBlocks>(shared.list + rank * kShare + place, &shared.list_barrier, 0,
                                 ranked(x, slice.token(i) + j));
          if (by_weight) weight_listed += weight(x);
        }
      }
    }
    count = __reduce_add_sync(kAllLanes, count);
    if (by_weight) {
      sum = warp_sum(slice.sum_of_exponentials(max, per_log2));
      weight_listed = warp_sum(weight_listed);
      exchange.post(count, sum, weight_listed);
    } else {
      exchange.post(count);
    }
    exchange.wait();
    const u32 of_block = listed_by(lane);
    const bool is_long = __any_sync(kAllLanes, of_block > kShare) ||
                         __reduce_add_sync(kAllLanes, of_block) > kListed;
    if (rank == 0) {
      const u32 sent = __reduce_add_sync(kAllLanes, min(of_block, static_cast<u32>(kShare)));
      await_bytes<kBlocks>(&shared.list_barrier, sizeof(u64) * sent);
    }
    if (by_weight) total = exchange.sum(1);
    if (is_long) return false;
    if (!by_weight) return true;
    return static_cast<double>(exchange.sum(2)) >= settings.top_p * static_cast<double>(total);
  }

  /* In the row's first block. */
  __device__ __forceinline__ u64 draw_of_list(int top_k, u64 total) {
    const int lane = threadIdx.x % kWarpSize, at = threadIdx.x;
    const u32 of_block = listed_by(lane);
    u32 end = of_block;
#pragma unroll
    for (int offset = 1; offset < kBlocks; offset *= 2) {
      const u32 other = __shfl_up_sync(kAllLanes, end, offset);
      if (lane >= offset) end += other;
    }
    const int num_listed = static_cast<int>(__shfl_sync(kAllLanes, end, kBlocks - 1));
#pragma unroll 1
    for (int i = at; i < kBlocks * kShare; i += kRowThreads) {
      const int size = __shfl_sync(kAllLanes, of_block, i / kShare), place = i % kShare;
      const int begin = __shfl_sync(kAllLanes, end, i / kShare) - size;
      if (place < size) shared.listed[begin + place].logit = shared.list[i];
    }
    __syncthreads();
    const bool by_weight = settings.top_p < 1.0;
    const u64 own = at < num_listed ? shared.listed[at].logit : 0;
    const float x = value_of(own);
    u64 own_weight = 0, before = 0;
    if (by_weight) {
      if (at < num_listed) own_weight = weight(x);
      shared.listed[at].weight = own_weight;
      __syncthreads();
    }
    int num_greater = 0;
    if (at - lane < num_listed) {
      if (by_weight) {
        for (int i = 0; i < num_listed; ++i) {
          const Listed other = shared.listed[i];
          num_greater += other.logit >> 32 > own >> 32;
          before += other.logit > own ? other.weight : 0;
        }
      } else if (top_k > 0) {
        for (int i = 0; i < num_listed; ++i) {
          num_greater += shared.listed[i].logit >> 32 > own >> 32;
        }
      }
    }
    bool is_kept = at < num_listed && (top_k == 0 || num_greater < top_k);
    if (by_weight) {
      if (top_k > 0) total = block_sum(is_kept ? own_weight : 0, shared.places[0]);
      const double target = settings.top_p * static_cast<double>(total);
      is_kept = is_kept && static_cast<double>(before) < target;
    }
    const int token = token_of(own);
    return block_max(is_kept ? rank_of(x, token, philox.word(token)) : kNone, shared.places[1]);
  }

  /* The n-th largest element of the row, which is likely not below `bound`; surely, if n tokens
   * reach that. */
  __device__ __forceinline__ float nth_of_row(int n, float bound, bool is_sure) {
    u32 low = Key::of(is_sure ? bound : minus_infinite()), high = Key::of(max) + 1;
    while (high - low > 1) {  // at least n reach low, fewer high
      const u32 step = high - low > 4 ? (high - low) / 4 : 1;
      const u32 first = is_sure ? low + step : Key::of(bound);
      const u32 second = is_sure ? min(first + step, high) : high;
      const u32 third = min(second + step, high);
      Reaching<Element> reach_a(Key::value(first));
      Reaching<Element> reach_b(second < high ? Key::value(second) : infinite());
      Reaching<Element> reach_c(third < high ? Key::value(third) : infinite());
      for (int i = threadIdx.x; i < slice.num_packs; i += kRowThreads) {
        const RowPack<Element> pack = slice.get(i);
        reach_a.take(pack);
        reach_b.take(pack);
        reach_c.take(pack);
      }
      const u32 warp_a = __reduce_add_sync(kAllLanes, reach_a.value());
      const u32 warp_b = __reduce_add_sync(kAllLanes, reach_b.value());
      const u32 warp_c = __reduce_add_sync(kAllLanes, reach_c.value());
      exchange.post(warp_a | static_cast<u64>(warp_b) << 32, warp_c);
      exchange.wait();
      const u64 both = exchange.sum(0), one = exchange.sum(1);
      const int num_a = static_cast<int>(both), num_b = static_cast<int>(both >> 32),
                num_c = static_cast<int>(one);
      if (third < high && num_c >= n) {
        low = third;
      } else if (second < high && num_b >= n) {
        low = second;
        high = third;
      } else if (num_a >= n) {
        low = first;
        high = second;
      } else {
        high = first;
      }
      is_sure = true;
    }
    return Key::value(low);
  }

  /* Takes the rank of a token that top_k and top_p keep. */
  __device__ __forceinline__ void look_at(float x, int token, u32 word, Best& best) const {
    const u64 rank = rank_of(x, token, word);
    if (rank <= best.score) return;
    best = {rank, ranked(x, token)};
    atomicMax(&shared.lead, static_cast<u32>(rank >> 32));
  }

  /* The best of this thread's tokens that are not below `floor` and come before `cut`. */
  __device__ __forceinline__ Best draw_of_slice(float floor, u64 cut) const {
    const float cut_value = cut ? value_of(cut) : minus_infinite();
    const int cut_token = token_of(cut);
    const float least = fmaxf(floor, cut_value);
    const auto is_in = [&](float x, int token) {
      return x >= least && (x > cut_value || token < cut_token);
    };
    Best best{kNone, 0};
    __syncthreads();  // all have read the last one
    if (threadIdx.x == 0) shared.lead = static_cast<u32>(kNone >> 32);
    __syncthreads();
    if (threadIdx.x < slice.num_packs) {  // something to compare with
      const RowPack<Element> pack = slice.get(threadIdx.x);
      const float largest = pack.max();
      const int token = slice.token(threadIdx.x) + pack.first_of(largest);
      if (is_in(largest, token)) look_at(largest, token, philox.word(token), best);
    }
    __syncthreads();
    const volatile u32& lead_key = shared.lead;
    for (int i = threadIdx.x; i < slice.num_packs; i += kRowThreads) {
      const RowPack<Element> pack = slice.get(i);
      const float largest = pack.max();
      if (!(largest >= least)) continue;
      const float lead = from_ordered_bits(lead_key) * kLog2e;
      const float bound = (largest - max) * per_log2 - lead;
      if (!(bound > -33.1f)) continue;  // beyond the largest noise
      const int token = slice.token(i);
      uint4 words[2];
      philox.words(token / 4, words);
      // noise > d means: -log(1 - u) < exp(-d), of which u < exp(-d) follows.
      const u32 smallest = min(min(min(words[0].x, words[0].y), min(words[0].z, words[0].w)),
                               min(min(words[1].x, words[1].y), min(words[1].z, words[1].w)));
      if (!(__uint2float_rn(smallest) * kUnit <= exp2_fast(bound) * kSlack)) continue;
      const u32 all[kPackTokens] = {words[0].x, words[0].y, words[0].z, words[0].w,
                                    words[1].x, words[1].y, words[1].z, words[1].w};
      u32 chosen = 0;
#pragma unroll
      for (int j = 0; j < kPackTokens; ++j) {
        const float x = pack.value(j), limit = exp2_fast((x - max) * per_log2 - lead) * kSlack;
        const bool may_win = __uint2float_rn(all[j]) * kUnit <= limit;
        if (may_win && is_in(x, token + j)) chosen |= 1u << j;
      }
      for (; chosen; chosen &= chosen - 1) {
        const int j = __ffs(static_cast<int>(chosen)) - 1;
        look_at(slice.element(i, j), token + j, philox.word(token + j), best);
      }
    }
    return best;
  }

  /* Of the tokens from `kept_from`, of `total` weight if that is known (not 0). Draws until one is
   * within top_p: of what comes before a token that is not, the next. */
  __device__ __forceinline__ u64 draw_of_row(float kept_from, u64 total) {
    const bool by_weight = settings.top_p < 1.0;
    float floor = kept_from;
    if (settings.min_p > 0.0f) floor = fmaxf(floor, floor_at(logf(settings.min_p)));
    u64 cut = 0, drawn = kNone;
    while (true) {
      if (total > 0 || !by_weight) {
        const Best own = draw_of_slice(floor, cut);
        const u64 best = warp_max(own.score);
        exchange.post(best, warp_max(own.score == best ? own.logit : 0));
        exchange.wait();
        drawn = exchange.max(0);
        if (!by_weight) return drawn;
        cut = exchange.partner(0, 1, drawn);
      }
      exchange.post(warp_sum(slice.sum_of_exponentials(max, per_log2, kept_from, cut)));
      exchange.wait();
      const u64 before = exchange.sum(0);
      if (total == 0) {
        total = before;  // of all
      } else if (static_cast<double>(before) < settings.top_p * static_cast<double>(total)) {
        return drawn;
      }
      // What lies below `share` of the largest weight adds up to less than 1 - top_p.
      const float share = (0.999f * static_cast<float>(1.0 - settings.top_p) - 1e-6f) *
                          (static_cast<float>(total) / kWeightScale) / slice.vocab_size;
      floor = fmaxf(floor, floor_at(fmaxf(logf(share), -27.75f)));
    }
  }
};

/* A key that n of the warp's threads reach. */
template <typename Element>
__device__ __forceinline__ u32 nth_in_warp(u32 key, int n) {
  u32 reached = 0;
#pragma unroll 1
  for (u32 bit = 0x80000000u; bit >= (sizeof(Element) == 2 ? 0x10000u : 1u); bit /= 2) {
    if (__popc(__ballot_sync(kAllLanes, key >= (reached | bit))) >= n) reached |= bit;
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
  extern __shared__ __align__(16) uint4 kept[];
  __shared__ SampleShared<kBlocks> shared;
  const int row = blockIdx.x / kBlocks, rank = blockIdx.x % kBlocks;
  RowExchange<kBlocks, 3> exchange(shared.mail);
  if (threadIdx.x == 0) {
    init_barrier(&shared.list_barrier);
    shared.num_listed = 0;
    shared.bound = 0;
  }
  exchange.open();
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int slot = slots[row];
  const RowSlice<Element, kBlocks, kResident> slice(logits, row, vocab_size, kept);
  if (slot < 0) {
    if (rank == 0 && threadIdx.x == 0) token_ids[row] = 0;
    return;
  }
  slice.begin_load(&shared.mail.load_barrier);
  const DrawRecord& settings = params[slot];
  const Philox philox{static_cast<u32>(settings.seed), static_cast<u32>(settings.seed >> 32),
                      static_cast<u32>(positions[row])};
  const bool is_greedy = settings.temperature == 0.0f;
  const int top_k = settings.top_k < vocab_size ? settings.top_k : 0;
  const float largest = slice.load_max(&shared.mail.load_barrier);
  constexpr int kWarps = kBlocks * kRowWarps;
  const bool is_far = top_k > kWarps && !is_greedy;
  const u32 key = largest == largest ? ordered_bits(largest) : 0xffffffffu;  // NaN above all
  const u32 warp_key = __reduce_max_sync(kAllLanes, key);
  u32 first = 0xffffffffu;
  if (is_greedy) {
    if (key == warp_key) first = static_cast<u32>(slice.first_of(largest));
    first = __reduce_min_sync(kAllLanes, first);
  }
  const u64 own = static_cast<u64>(warp_key) << 32 | static_cast<u32>(~first);
  exchange.wait_open();
  if (is_far) {
    exchange.post(own, ~nth_in_warp<Element>(key, min((top_k + kWarps - 1) / kWarps, kWarpSize)));
  } else {
    exchange.post(own);
  }
  exchange.wait();
  const u64 top = exchange.max(0);
  const float max = value_of(top);
  const bool is_broken = !(fabsf(max) <= kLargest);
  if (is_greedy || is_broken) {
    if (rank == 0 && threadIdx.x == 0) token_ids[row] = is_broken ? -1 : token_of(top);
    return;
  }

  RowDraw<Element, kBlocks, kResident> draw{
      slice, shared, exchange, settings, philox, max, kLog2e / settings.temperature};
  const bool by_weight = top_k == 0 && settings.top_p < 1.0;
  float floor = -kLargest;  // that all tokens reach which top_k keeps
  bool is_exact = top_k == 0, may_list = by_weight || (top_k > 0 && top_k <= kWarps);
  if (may_list) {
    floor = draw.nth_of_warps(top_k > 0 ? top_k : kWarps * 15 / 16);
  } else if (is_far) {
    const u32 least = ~static_cast<u32>(exchange.max(1)), lowest = ordered_bits(-kLargest);
    floor = from_ordered_bits(least > lowest ? least : lowest);
  } else if (top_k == 0 && settings.min_p > 0.0f) {
    floor = draw.floor_at(logf(settings.min_p));
    may_list = true;
  }
  floor = fmaxf(floor, -kLargest);
  u64 total = 0, best;
  while (true) {
    if (may_list && draw.list_from(floor, largest, by_weight, total)) {
      if (rank != 0) return;
      best = draw.draw_of_list(top_k, total);
      break;
    }
    if (is_exact) {
      best = draw.draw_of_row(top_k > 0 ? floor : -kLargest, total);
      break;
    }
    floor = fmaxf(draw.nth_of_row(top_k, floor, top_k <= kWarps * kWarpSize), -kLargest);
    is_exact = true;
    may_list = top_k > kWarps && top_k <= kListed * 3 / 4;
  }
  if (rank == 0 && threadIdx.x == 0) token_ids[row] = token_of(best);
}

}  // namespace ember
