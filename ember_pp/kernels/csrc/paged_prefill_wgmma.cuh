/*
 * paged_prefill_wgmma: paged_prefill for sm_90, where a group of 4 warps multiplies matrices that
 * lie in shared memory.
 *
 * What       as paged_prefill.cuh, whose types, order of work and requirements these are too
 * Shapes     query, output [T, H, d]; k_cache, v_cache [B, S, K, d]; see there
 * Mapping    tiles as there, 128 positions at a time. 4 warps plan and copy: queries of the next
 *            tile and keys and values of the next steps, two buffers of each. Two groups of 4 warps
 *            have 64 rows of the tile each; registers go over to them. A group starts the scores
 *            of a step before the sums of the one before, so that tensor cores work while it
 *            computes weights, which stay in registers
 * Order      as there; a copying thread goes on to the next tile while the last one is computed
 * Ordering   barriers in shared memory, with a phase that turns at each use: `full` after all
 *            copies of a buffer have arrived, `empty` after all warps that read it have. Copies
 *            come by the generic proxy and wgmma reads by the asynchronous one, hence the fence
 *            after a wait
 * Compiles   to nothing but for sm_90a
 * Bound      tensor cores: sum over tokens of 4 * context * H * d operations
 * Tried      products of both groups at any time instead of in turn: slower; to find the place of
 *            each copy anew, from shared memory: all other warps then waited for the copying ones
 * Test       tests/kernels/test_paged_attention.py          Bench  python -m benchmarks.kernels
 * Source     the overlap of scores and sums, and the split into copying and computing warps:
 *            FlashAttention-3, Shah et al., 2024
 */
#include "prefill_tile.cuh"

namespace ember {

constexpr int kStep = 128;  // positions that are computed at a time
constexpr int kGroups = 2;  // of 4 warps that compute
constexpr int kGroupThreads = 4 * kWarpSize;
constexpr int kWarps = kGroups * 4;

template <int kHeadDim>
using WarpPart = Part<kHeadDim, kPlanThreads / kWarpSize, kWarps>;

template <int kHeadDim>
struct Buffers {
  static constexpr int kLines = kHeadDim / kLine;  // of a position
  bf16 query[2][kLines][kTileRows][kLine];
  bf16 keys[2][kLines][kStep][kLine];
  bf16 values[2][kLines][kStep][kLine];
};

using Barrier = unsigned long long;

/* What copying and computing warps tell each other; a pair each, used in turn. */
struct Barriers {
  Barrier full_work[2], empty_work[2];  // segment and queries
  Barrier full_keys[2], empty_keys[2];
  Barrier full_values[2], empty_values[2];
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

constexpr int kComputeBarrier = 2;
constexpr int kTurnBarrier = 3;  // and 4, one for each group
constexpr bool kTakesTurns = true;
constexpr int kCopyRegisters = 40, kComputeRegisters = 232;

__device__ __forceinline__ void init_barrier(Barrier* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(count)
               : "memory");
}
__device__ __forceinline__ void arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
/* As soon as what this thread copies has arrived. */
__device__ __forceinline__ void arrive_after_copies(Barrier* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(
                   shared_address(barrier))
               : "memory");
}
/* For the end of the phase whose parity this is. */
__device__ __forceinline__ void wait(Barrier* barrier, u32 parity) {
  asm volatile(
      "{\n.reg .pred p;\n"
      "again:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra done;\nbra again;\ndone:\n}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
/* Buffers are used in turn, each in every second use: the n-th is of this phase. */
__device__ __forceinline__ u32 parity_of(u32 n) { return n / 2 % 2; }

/* For copies: what they wrote is then visible to wgmma. */
__device__ __forceinline__ void wait_for_copies(Barrier* barrier, u32 parity) {
  wait(barrier, parity);
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kLeft>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

/* Groups start their products in turn, so that one computes weights while the other multiplies. A
 * group waits for its turn, and then gives it to the other; `compute` gives the first. */
__device__ __forceinline__ void wait_for_turn(int group) {
  if (!kTakesTurns) return;
  asm volatile("bar.sync %0, %1;" ::"r"(kTurnBarrier + group), "n"(kGroups * kGroupThreads)
               : "memory");
}
__device__ __forceinline__ void give_turn_to(int group) {
  if (!kTakesTurns) return;
  asm volatile("bar.arrive %0, %1;" ::"r"(kTurnBarrier + group), "n"(kGroups * kGroupThreads)
               : "memory");
}

/* The compiler must not move reads or writes of registers of a product across this. */
template <int kCount>
__device__ __forceinline__ void hold(float (&x)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    asm volatile("" : "+f"(x[i][0]), "+f"(x[i][1]), "+f"(x[i][2]), "+f"(x[i][3])::"memory");
  }
}

/* What `x` is made of is computed before what follows: the assembler moves a wait up as far as the
 * last branch. */
__device__ __forceinline__ void compute_now(const float (&x)[2]) {
  if (x[0] + x[1] < 0.0f) asm volatile("trap;");  // never
}

/* A matrix of lines of 128 bytes, swizzled; 8 of them take 1024 bytes. `apart`: bytes from 64
 * columns to the next 64 where columns are not what is summed over, else unused. */
__device__ __forceinline__ i64 describe(u32 address, u32 apart) {
  return static_cast<i64>((address & 0x3ffff) >> 4) | static_cast<i64>(apart >> 4) << 16 |
         static_cast<i64>(1024 >> 4) << 32 | 1LL << 62;
}

/* c = a b, or c += a b; a: 64 lines, b: as many lines as c has columns. */
__device__ __forceinline__ void multiply_shared(float (&c)[16][4], i64 a, i64 b, bool adds) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, "
      "%17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, "
      "%47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
      "%62, %63"
      "}, %64, %65, p, 1, 1, 0, 0;\n}\n"
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]),
        "+f"(c[1][1]), "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]),
        "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]),
        "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]),
        "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]), "+f"(c[6][0]),
        "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]),
        "+f"(c[7][2]), "+f"(c[7][3]), "+f"(c[8][0]), "+f"(c[8][1]), "+f"(c[8][2]),
        "+f"(c[8][3]), "+f"(c[9][0]), "+f"(c[9][1]), "+f"(c[9][2]), "+f"(c[9][3]),
        "+f"(c[10][0]), "+f"(c[10][1]), "+f"(c[10][2]), "+f"(c[10][3]), "+f"(c[11][0]),
        "+f"(c[11][1]), "+f"(c[11][2]), "+f"(c[11][3]), "+f"(c[12][0]), "+f"(c[12][1]),
        "+f"(c[12][2]), "+f"(c[12][3]), "+f"(c[13][0]), "+f"(c[13][1]), "+f"(c[13][2]),
        "+f"(c[13][3]), "+f"(c[14][0]), "+f"(c[14][1]), "+f"(c[14][2]), "+f"(c[14][3]),
        "+f"(c[15][0]), "+f"(c[15][1]), "+f"(c[15][2]), "+f"(c[15][3])
      : "l"(a), "l"(b), "r"(static_cast<int>(adds)));
}

/* c += a b; b: 16 lines, with as many columns as c. */
__device__ __forceinline__ void multiply_weights(float (&c)[16][4], const u32 (&a)[4], i64 b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, "
      "%17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, "
      "%47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
      "%62, %63"
      "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]),
        "+f"(c[1][1]), "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]),
        "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]),
        "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]),
        "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]), "+f"(c[6][0]),
        "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]),
        "+f"(c[7][2]), "+f"(c[7][3]), "+f"(c[8][0]), "+f"(c[8][1]), "+f"(c[8][2]),
        "+f"(c[8][3]), "+f"(c[9][0]), "+f"(c[9][1]), "+f"(c[9][2]), "+f"(c[9][3]),
        "+f"(c[10][0]), "+f"(c[10][1]), "+f"(c[10][2]), "+f"(c[10][3]), "+f"(c[11][0]),
        "+f"(c[11][1]), "+f"(c[11][2]), "+f"(c[11][3]), "+f"(c[12][0]), "+f"(c[12][1]),
        "+f"(c[12][2]), "+f"(c[12][3]), "+f"(c[13][0]), "+f"(c[13][1]), "+f"(c[13][2]),
        "+f"(c[13][3]), "+f"(c[14][0]), "+f"(c[14][1]), "+f"(c[14][2]), "+f"(c[14][3]),
        "+f"(c[15][0]), "+f"(c[15][1]), "+f"(c[15][2]), "+f"(c[15][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void multiply_weights(float (&c)[8][4], const u32 (&a)[4], i64 b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, "
      "%17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
      "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]),
        "+f"(c[1][1]), "+f"(c[1][2]), "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]),
        "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]), "+f"(c[3][2]),
        "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]),
        "+f"(c[5][0]), "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]), "+f"(c[6][0]),
        "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]), "+f"(c[7][0]), "+f"(c[7][1]),
        "+f"(c[7][2]), "+f"(c[7][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

/* Scores of 64 rows and kStep positions. */
template <int kHeadDim>
__device__ __forceinline__ void start_scores(u32 query, u32 keys, float (&scores)[kStep / 8][4]) {
  begin_products();
#pragma unroll
  for (int k = 0; k < kHeadDim / 16; ++k) {
    const u32 column = k % 4 * 32;
    const u32 q = query + k / 4 * (kTileRows * kLine * sizeof(bf16)) + column;
    const u32 b = keys + k / 4 * (kStep * kLine * sizeof(bf16)) + column;
    multiply_shared(scores, describe(q, 16), describe(b, 16), k > 0);
  }
  commit_products();
}

template <int kHeadDim>
__device__ __forceinline__ void start_sums(const u32 (&weights)[kStep / 16][4], u32 values,
                                           float (&sums)[kHeadDim / 8][4]) {
  begin_products();
#pragma unroll
  for (int k = 0; k < kStep / 16; ++k) {
    const u32 lines = 16 * kLine * sizeof(bf16);
    multiply_weights(sums, weights[k], describe(values + k * lines, kStep * kLine * sizeof(bf16)));
  }
  commit_products();
}

/* Scores become weights; `by` is what earlier sums have to be multiplied by. The tile's first
 * token sees `num_seen` of the positions. */
template <int kHeadDim>
__device__ __forceinline__ void weigh(const PrefillArguments& a, float (&scores)[kStep / 8][4],
                                      int num_seen, WarpPart<kHeadDim>& part, float (&by)[2]) {
  if (num_seen < kStep) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int own_seen =
          num_seen + a.token_of(WarpPart<kHeadDim>::row(0, half)) - thread_index() % 4 * 2;
#pragma unroll
      for (int n = 0; n < kStep / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (8 * n + i >= own_seen) scores[n][2 * half + i] = minus_infinity();
        }
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float most = fmaxf(scores[0][2 * half], scores[0][2 * half + 1]);
#pragma unroll
    for (int n = 1; n < kStep / 8; ++n) {
      most = fmaxf(most, fmaxf(scores[n][2 * half], scores[n][2 * half + 1]));
    }
    const float old_max = part.max[0][half];
    const float max = fmaxf(old_max, quad_max(most) * a.scale_log2);
    const float base = max == minus_infinity() ? 0.0f : max;
    by[half] = exp2_fast(old_max - base);
    part.max[0][half] = max;
    float weight = 0.0f;
#pragma unroll
    for (int n = 0; n < kStep / 8; ++n) {
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        scores[n][i] = exp2_fast(scores[n][i] * a.scale_log2 - base);
        weight += scores[n][i];
      }
    }
    part.weight[0][half] = part.weight[0][half] * by[half] + weight;
  }
}

/* As the second product wants them. */
__device__ __forceinline__ void round_weights(const float (&scores)[kStep / 8][4],
                                              u32 (&weights)[kStep / 16][4]) {
#pragma unroll
  for (int k = 0; k < kStep / 16; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float(&x)[4] = scores[2 * k + i / 2];
      weights[k][i] = pack_bf16(x[i % 2 * 2], x[i % 2 * 2 + 1]);
    }
  }
}

/* The steps of a segment by a group; `turn` counts those of all segments. */
template <int kHeadDim>
__device__ __forceinline__ void attend(const PrefillArguments& a, const volatile Segment& segment,
                                       Buffers<kHeadDim>& buffers, Barriers& barriers, u32 query,
                                       u32& turn, WarpPart<kHeadDim>& part) {
  part.clear();
  const int num_steps = segment.end - segment.begin;
  if (num_steps <= 0) return;
  const bool is_first_lane = thread_index() % kWarpSize == 0;
  const int group = WarpPart<kHeadDim>::thread() / kGroupThreads;
  const u32 keys = shared_address(buffers.keys), values = shared_address(buffers.values);
  constexpr u32 kBuffer = sizeof(buffers.keys[0]);
  int num_seen = segment.prefix + segment.first_token + 1 - segment.begin * kStep;
  float scores[kStep / 8][4], by[2];
  u32 weights[kStep / 16][4];
  wait_for_copies(&barriers.full_keys[turn % 2], parity_of(turn));
  start_scores<kHeadDim>(query, keys + turn % 2 * kBuffer, scores);
  wait_for_products<0>();
  hold(scores);
  if (is_first_lane) arrive(&barriers.empty_keys[turn % 2]);
  weigh<kHeadDim>(a, scores, num_seen, part, by);
  round_weights(scores, weights);
#pragma unroll 1
  for (const u32 last = turn + num_steps - 1; turn != last; ++turn) {
    const u32 next = turn + 1;
    num_seen -= kStep;
    wait_for_copies(&barriers.full_keys[next % 2], parity_of(next));
    hold(part.sums[0]);
    wait_for_turn(group);
    start_scores<kHeadDim>(query, keys + next % 2 * kBuffer, scores);
    wait_for_copies(&barriers.full_values[turn % 2], parity_of(turn));
    start_sums<kHeadDim>(weights, values + turn % 2 * kBuffer, part.sums[0]);
    give_turn_to(1 - group);
    wait_for_products<1>();
    hold(scores);
    if (is_first_lane) arrive(&barriers.empty_keys[next % 2]);
    weigh<kHeadDim>(a, scores, num_seen, part, by);
    compute_now(part.weight[0]);
    wait_for_products<0>();
    hold(part.sums[0]);
    if (is_first_lane) arrive(&barriers.empty_values[turn % 2]);
    round_weights(scores, weights);
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      part.sums[0][n][0] *= by[0];
      part.sums[0][n][1] *= by[0];
      part.sums[0][n][2] *= by[1];
      part.sums[0][n][3] *= by[1];
    }
  }
  wait_for_copies(&barriers.full_values[turn % 2], parity_of(turn));
  hold(part.sums[0]);
  start_sums<kHeadDim>(weights, values + turn % 2 * kBuffer, part.sums[0]);
  wait_for_products<0>();
  hold(part.sums[0]);
  if (is_first_lane) arrive(&barriers.empty_values[turn % 2]);
  ++turn;
}

/* What a copying thread knows of a segment, in few instructions per copy: it is they that the
 * other warps wait for. */
template <int kHeadDim>
struct StepCopier {
  static constexpr int kApart = Copier<kHeadDim>::kPositionsApart;
  static constexpr int kTiles = kStep / kTile;
  static constexpr int kSteps = kWarpSize / kTiles;  // that a warp has found tiles for

  const PrefillArguments& a;
  const Copier<kHeadDim> copier;
  const int* table;
  const int context_len;
  const u32 stride;  // of positions, in elements
  i64 own;           // of the first position of a tile in the cache, to what this thread copies
  int found, found_next;  // by each lane: a tile's place in the cache, of kTile positions each

  __device__ __forceinline__ StepCopier(const PrefillArguments& a, const volatile Segment& segment)
      : a(a),
        table(a.block_tables + static_cast<i64>(segment.table) * a.table_stride),
        context_len(segment.prefix + segment.num_tokens),
        stride(a.num_kv_heads * kHeadDim),
        own(copier.first * stride + segment.kv_head * kHeadDim + copier.piece * 8) {
    found_next = find(segment.begin * kTiles);
  }

  /* The tiles of the next kSteps steps. Those after them are read ahead. */
  __device__ __forceinline__ void go_on(int step) {
    found = found_next;
    found_next = find((step + kSteps) * kTiles);
  }

  /* Keys or values of a step, the `index`-th of those that tiles were found for; beyond the
   * context zeros, since a weight of 0 does not undo a NaN. */
  __device__ __forceinline__ void copy(const bf16* cache, int step, int index, u32 buffer) const {
    const int num_valid = context_len - step * kStep;
    if (num_valid >= kStep) {
      copy<true>(cache + own, index, buffer, num_valid);
    } else {
      copy<false>(cache + own, index, buffer, num_valid);
    }
  }

 private:
  __device__ __forceinline__ int find(int tile) const {
    tile = min(tile + thread_index() % kWarpSize, (context_len - 1) / kTile);
    const int in_block = tile & ((1 << a.block_shift) - 1);
    return (table[tile >> a.block_shift] << a.block_shift) + in_block;
  }

  template <bool kIsFull>
  __device__ __forceinline__ void copy(const bf16* cache, int index, u32 buffer,
                                       int num_valid) const {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const u32 place = __shfl_sync(kAllLanes, found, index * kTiles + tile);
      const bf16* source = cache + static_cast<unsigned long long>(place) * (stride * kTile);
#pragma unroll
      for (int i = 0; i < kTile / kApart; ++i) {
        const int turn = tile * (kTile / kApart) + i;
        const bool is_there = kIsFull || copier.first + turn * kApart < num_valid;
        copy_async(buffer + copier.template at<kStep>(turn),
                   is_there ? source + i * kApart * stride : cache, is_there);
      }
    }
  }
};

/* What the copying warps do for a segment. */
template <int kHeadDim>
__device__ __forceinline__ void copy_segment(const PrefillArguments& a,
                                             const volatile Segment& segment,
                                             Buffers<kHeadDim>& buffers, Barriers& barriers,
                                             u32 query, u32& turn) {
  const int begin = segment.begin, end = segment.end;
  if (begin >= end) return;
  const u32 keys = shared_address(buffers.keys), values = shared_address(buffers.values);
  constexpr u32 kBuffer = sizeof(buffers.keys[0]);
  StepCopier<kHeadDim> copier(a, segment);
  copy_query<kHeadDim>(a, segment, query);
#pragma unroll 1
  for (int step = begin; step < end; ++step, ++turn) {
    const u32 buffer = turn % 2, before = parity_of(turn) ^ 1;  // the first wait is for nothing
    const int index = (step - begin) % StepCopier<kHeadDim>::kSteps;
    if (index == 0) copier.go_on(step);
    wait(&barriers.empty_keys[buffer], before);
    copier.copy(a.k_cache, step, index, keys + buffer * kBuffer);
    arrive_after_copies(&barriers.full_keys[buffer]);
    wait(&barriers.empty_values[buffer], before);
    copier.copy(a.v_cache, step, index, values + buffer * kBuffer);
    arrive_after_copies(&barriers.full_values[buffer]);
  }
}

template <int kHeadDim>
__device__ __forceinline__ void plan_and_copy(const PrefillArguments& a,
                                              Planner<kStep>& planner,
                                              volatile Segment (&segments)[2],
                                              volatile bool (&has_work)[2],
                                              Buffers<kHeadDim>& buffers, Barriers& barriers) {
  u32 turn = 0;
  if (threadIdx.x == 0 && planner.is_whole) planner.ask(a);
#pragma unroll 1
  for (u32 count = 0;; ++count) {
    const u32 place = count % 2;
    wait(&barriers.empty_work[place], parity_of(count) ^ 1);
    if (threadIdx.x == 0) has_work[place] = planner.find_work(a, segments[place]);
    sync_threads<kPlanBarrier, kPlanThreads>();
    if (threadIdx.x == 0) arrive(&barriers.full_work[place]);
    if (!has_work[place]) return;
    copy_segment<kHeadDim>(a, segments[place], buffers, barriers,
                           shared_address(buffers.query[place]), turn);
  }
}

template <int kHeadDim>
__device__ __forceinline__ void compute(const PrefillArguments& a,
                                        volatile Segment (&segments)[2],
                                        volatile bool (&has_work)[2], Buffers<kHeadDim>& buffers,
                                        Barriers& barriers) {
  u32 turn = 0;
  if (threadIdx.x / kGroupThreads == kGroups) give_turn_to(0);
#pragma unroll 1
  for (u32 count = 0;; ++count) {
    const u32 place = count % 2;
    wait(&barriers.full_work[place], parity_of(count));
    if (!has_work[place]) return;
    WarpPart<kHeadDim> part;
    const int first_row = (threadIdx.x / kGroupThreads - 1) * 64;
    attend<kHeadDim>(a, segments[place], buffers, barriers,
                     shared_address(&buffers.query[place][0][first_row]), turn, part);
    finish<kComputeBarrier>(a, segments[place], part);
    arrive(&barriers.empty_work[place]);  // by all that read the segment
  }
}
#endif

template <int kHeadDim>
__global__ void __launch_bounds__(kPlanThreads + kGroups* kGroupThreads, 1)
    paged_prefill_wgmma_kernel(const __grid_constant__ PrefillArguments a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char shared[];
  Buffers<kHeadDim>& buffers = *reinterpret_cast<Buffers<kHeadDim>*>(shared);
  __shared__ Planner<kStep> planner;
  __shared__ Barriers barriers;
  __shared__ volatile Segment segments[2];
  __shared__ volatile bool has_work[2];
  if (threadIdx.x < kPlanThreads) planner.scan(a);
  if (threadIdx.x == 0) {
    planner.start(a);
    for (int i = 0; i < 2; ++i) {
      init_barrier(&barriers.full_work[i], 1);
      init_barrier(&barriers.empty_work[i], kWarps * kWarpSize);
      init_barrier(&barriers.full_keys[i], kPlanThreads);
      init_barrier(&barriers.empty_keys[i], kWarps);
      init_barrier(&barriers.full_values[i], kPlanThreads);
      init_barrier(&barriers.empty_values[i], kWarps);
    }
  }
  __syncthreads();
  let_next_kernel_start();
  wait_for_previous_kernel();
  if (threadIdx.x < kPlanThreads) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCopyRegisters));
    plan_and_copy<kHeadDim>(a, planner, segments, has_work, buffers, barriers);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kComputeRegisters));
    compute<kHeadDim>(a, segments, has_work, buffers, barriers);
  }
#endif
}

}  // namespace ember
