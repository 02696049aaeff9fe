/*
 * paged_prefill: causal attention of the new tokens of prompts over the paged KV cache. On sm_90
 * paged_prefill_wgmma.cuh computes the same.
 *
 * What       row r has the tokens starts[r] .. starts[r + 1), the last of a context of L_r. Each
 *            attends to the context up to and with itself, as in paged_decode. Rows with fewer
 *            than two tokens are left as they are
 * Shapes     query, output [T, H, d]; k_cache, v_cache [B, S, K, d]; block_tables [N, stride]
 *            int32; table_rows [R] int32, or none: table r; context_lens [R], starts [R + 1] int32
 * Types      bf16; products on tensor cores with fp32 sums, softmax in fp32 (base 2), its weights
 *            rounded to bf16 for the second product
 * Mapping    a *tile* is 128 / G tokens of a row with the G query heads of one KV head: 128 rows of
 *            a product, which read the same keys. 64 positions at a time come to shared memory,
 *            one turn ahead. 4 warps have 32 rows of the tile each; sums stay in registers. Lines
 *            of 128 bytes are swizzled (16-byte piece c of line i lies at c ^ (i % 8)), so eight
 *            lines are read without conflicts
 * Order      thread blocks stay and take work, which they find from the lengths, so the launch
 *            depends on the card alone. Whole tiles from one counter, the longest of a row first,
 *            where that leaves no block without work for long; of long contexts all tiles of one KV
 *            head together, so that their keys stay in the second-level cache. Else the positions
 *            of all tiles are cut into equal shares, whatever their lengths: prefill_plan.cuh
 * Combine    a tile that several blocks share: each writes its part to `parts`, the last to arrive
 *            at a counter adds the parts in their order, so equal inputs give equal bits. Beyond
 *            16 blocks in two levels. Counters are 0 before and after
 * Requires   d 64 or 128, G <= 8, S one of 16, 32, .. 256, 16-byte rows, fewer than 2^31 slots
 * Bound      tensor cores: sum over tokens of 4 * context * H * d operations
 * Tried      equal shares wherever whole tiles are not many: slower, for long contexts since blocks
 *            are then at different places of the same keys, for short ones by the parts; one loop
 *            body with and one without a mask: registers spilled
 * Test       tests/kernels/test_paged_attention.py          Bench  python -m benchmarks.kernels
 * Source     online softmax and tiles: FlashAttention-2, Dao, 2023; grouped heads in a tile and
 *            paging: Kwon et al., SOSP 2023, Ye et al., MLSys 2025 (FlashInfer); equal shares:
 *            Stream-K, Osama et al., 2023
 */
#include "prefill_tile.cuh"

namespace ember {

constexpr int kStep = 64;  // positions that are computed at a time
constexpr int kWarps = kPlanThreads / kWarpSize;
template <int kHeadDim>
using WarpPart = Part<kHeadDim, 0, kWarps>;

template <int kHeadDim>
struct Buffers {
  static constexpr int kLines = kHeadDim / kLine;  // of a position
  bf16 query[kLines][kTileRows][kLine];
  bf16 keys[2][kLines][kStep][kLine];
  bf16 values[2][kLines][kStep][kLine];
};

__device__ __forceinline__ void load_matrices(u32 (&words)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address));
}
__device__ __forceinline__ void load_transposed(u32 (&words)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address));
}

/* A warp's lanes' addresses in lines of 16 rows, 8 of which a matrix has: `by_row` gives the two
 * halves of 16 rows, then those of the next 8 columns; `by_column` the other way round. */
struct LaneAddress {
  u32 by_row, by_column;

  __device__ __forceinline__ LaneAddress() {
    const int lane = thread_index() % kWarpSize;
    const int low = lane % 8, bit3 = lane / 8 % 2, bit4 = lane / 16;
    by_row = (low + 8 * bit3) * kLine * sizeof(bf16) + (bit4 ^ low) * 16;
    by_column = (low + 8 * bit4) * kLine * sizeof(bf16) + (bit3 ^ low) * 16;
  }
};

/* Address of columns 16 k .. 16 k + 15 of 16 rows from `first_row` of a buffer with kRows. */
template <int kRows>
__device__ __forceinline__ u32 matrix_address(u32 buffer, u32 lane_address, int k,
                                              int first_row) {
  return buffer + (lane_address ^ ((k % 4) << 5)) + k / 4 * (kRows * kLine * sizeof(bf16)) +
         first_row * (kLine * sizeof(bf16));
}

/* One step of a warp, of which the tile's first token sees `num_seen` positions. */
template <int kHeadDim>
__device__ __forceinline__ void compute_step(const PrefillArguments& a, u32 query, u32 keys,
                                             u32 values, int num_seen,
                                             WarpPart<kHeadDim>& part) {
  const LaneAddress lanes;
  constexpr int kProducts = WarpPart<kHeadDim>::kProducts;
  float scores[kProducts][kStep / 8][4] = {};
#pragma unroll 4
  for (int k = 0; k < kHeadDim / 16; ++k) {
    u32 q[kProducts][4];
#pragma unroll
    for (int m = 0; m < kProducts; ++m) {
      load_matrices(q[m], matrix_address<kTileRows>(query, lanes.by_row, k, 16 * m));
    }
#pragma unroll
    for (int n = 0; n < kStep / 16; ++n) {
      u32 b[4];
      load_matrices(b, matrix_address<kStep>(keys, lanes.by_column, k, 16 * n));
#pragma unroll
      for (int m = 0; m < kProducts; ++m) {
        multiply_add(scores[m][2 * n], q[m][0], q[m][1], q[m][2], q[m][3], b[0], b[1]);
        multiply_add(scores[m][2 * n + 1], q[m][0], q[m][1], q[m][2], q[m][3], b[2], b[3]);
      }
    }
  }
  if (num_seen < kStep) {
#pragma unroll
    for (int m = 0; m < kProducts; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int own_seen = num_seen + a.token_of(WarpPart<kHeadDim>::row(m, half)) -
                             thread_index() % 4 * 2;
#pragma unroll
        for (int n = 0; n < kStep / 8; ++n) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            if (8 * n + (i & 1) >= own_seen) scores[m][n][i] = minus_infinity();
          }
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kProducts; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = minus_infinity();
#pragma unroll
      for (int n = 0; n < kStep / 8; ++n) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          most = fmaxf(most, scores[m][n][i]);
        }
      }
      const float old_max = part.max[m][half];
      const float max = fmaxf(old_max, quad_max(most) * a.scale_log2);
      const float base = max == minus_infinity() ? 0.0f : max;
      const float by = exp2_fast(old_max - base);
      part.max[m][half] = max;
      float weight = 0.0f;
#pragma unroll
      for (int n = 0; n < kStep / 8; ++n) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          scores[m][n][i] = exp2_fast(scores[m][n][i] * a.scale_log2 - base);
          weight += scores[m][n][i];
        }
      }
      part.weight[m][half] = part.weight[m][half] * by + weight;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        part.sums[m][n][2 * half] *= by;
        part.sums[m][n][2 * half + 1] *= by;
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kStep / 16; ++k) {
    u32 p[kProducts][4];
#pragma unroll
    for (int m = 0; m < kProducts; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float(&x)[4] = scores[m][2 * k + i / 2];
        p[m][i] = pack_bf16(x[i % 2 * 2], x[i % 2 * 2 + 1]);
      }
    }
#pragma unroll
    for (int n = 0; n < kHeadDim / 16; ++n) {
      u32 b[4];
      load_transposed(b, matrix_address<kStep>(values, lanes.by_row, n, 16 * k));
#pragma unroll
      for (int m = 0; m < kProducts; ++m) {
        multiply_add(part.sums[m][2 * n], p[m][0], p[m][1], p[m][2], p[m][3], b[0], b[1]);
        multiply_add(part.sums[m][2 * n + 1], p[m][0], p[m][1], p[m][2], p[m][3], b[2], b[3]);
      }
    }
  }
}

/* The steps of `segment`; there may be none. */
template <int kHeadDim>
__device__ __forceinline__ void attend(const PrefillArguments& a, const volatile Segment& segment,
                                       Buffers<kHeadDim>& buffers, WarpPart<kHeadDim>& part) {
  SlotFinder<kStep> finder;
  const u32 keys = shared_address(buffers.keys), values = shared_address(buffers.values);
  constexpr u32 kStage = sizeof(buffers.keys[0]);
  const u32 query = shared_address(&buffers.query[0][WarpPart<kHeadDim>::first_row()]);
  part.clear();
  int step = segment.begin;
  if (step < segment.end) {
    copy_query<kHeadDim>(a, segment, shared_address(buffers.query));
    copy_step<kHeadDim>(a, segment, finder, step, a.k_cache, keys + step % 2 * kStage);
    copy_step<kHeadDim>(a, segment, finder, step, a.v_cache, values + step % 2 * kStage);
  }
  commit_copies();
#pragma unroll 1
  for (; step < segment.end; ++step) {
    wait_for_copies();
    __syncthreads();
    const u32 stage = step % 2 * kStage;
    if (step + 1 < segment.end) {
      copy_step<kHeadDim>(a, segment, finder, step + 1, a.k_cache, keys + (kStage - stage));
      copy_step<kHeadDim>(a, segment, finder, step + 1, a.v_cache, values + (kStage - stage));
      commit_copies();
    }
    // Positions of the step that the tile's first token sees; those that any of this warp's do.
    const int num_seen = segment.prefix + segment.first_token + 1 - step * kStep;
    const int first_row = WarpPart<kHeadDim>::first_row();
    if (segment.first_token + a.token_of(first_row) >= segment.num_tokens) continue;
    if (num_seen + a.token_of(first_row + kTileRows / kWarps - 1) <= 0) continue;
    compute_step<kHeadDim>(a, query, keys + stage, values + stage, num_seen, part);
  }
}

template <int kHeadDim>
__global__ void __launch_bounds__(kPlanThreads, 2)
    paged_prefill_kernel(const __grid_constant__ PrefillArguments a) {
  extern __shared__ __align__(1024) unsigned char shared[];
  Buffers<kHeadDim>& buffers = *reinterpret_cast<Buffers<kHeadDim>*>(shared);
  __shared__ Planner<kStep> planner;
  __shared__ volatile Segment segment;
  __shared__ volatile bool has_work;
  planner.scan(a);
  if (threadIdx.x == 0) planner.start(a);
  __syncthreads();
  let_next_kernel_start();
  wait_for_previous_kernel();
  if (threadIdx.x == 0 && planner.is_whole) planner.ask(a);
  while (true) {
    if (threadIdx.x == 0) has_work = planner.find_work(a, segment);
    __syncthreads();
    if (!has_work) return;
    WarpPart<kHeadDim> part;
    attend<kHeadDim>(a, segment, buffers, part);
    finish<0>(a, segment, part);
    __syncthreads();  // before buffers and segment are written again
  }
}

}  // namespace ember
