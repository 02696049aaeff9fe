/*
 * skinny_linear: a product of few rows with a weight, which is read once; neighbours fused.
 *
 * What       total = round(input + residual) where there is a residual, else input
 *            x = rms_norm(total) with kNorm (rounded as in rms_norm.cuh), else input
 *            output[m, o] = round(x[m] . weight[o] + bias[o])
 *            kGated: output[m, i] = round(round(silu(gate)) * up), gate = round(x[m] . weight[i]),
 *            up = round(x[m] . weight[I + i])
 * Shapes     input, residual, total [M, K]; norm_weight [K]; weight [O, K] (kGated: [2I, K]);
 *            bias [O]; output [M, O] (kGated: [M, I]); contiguous. residual, total and bias may
 *            be null. M <= kRows, one of 8, 16, 32
 * Types      bf16; products on tensor cores with fp32 sums; squares, mean, silu in fp32
 * Mapping    A *tile* is 8 rows of the weight, a *stage* 1024 columns of a tile in shared memory.
 *            A thread block owns neighbouring tiles (kGated: pairs of gate and up) and goes
 *            through them kTiles at a time: all columns, stage by stage, sums in registers. Its
 *            8 warps take the columns of a stage by turns of 32, so that each adds to all sums;
 *            at the end they meet in shared memory. A ring of num_stages stages is filled ahead
 *            by the bulk copy engine (before sm_90: cp.async), a row per copy; its first round
 *            is requested before the wait for the previous kernel, since weights are constant.
 *            So a thread block must be small enough to share a multiprocessor with the kernel
 *            before it. The weight is the B operand of m16n8k16, M rows of x the A operand; which
 *            columns share a product is free, so a lane reads 16 bytes of a row, neighbours in
 *            memory, for two products. A row of a stage ends with 64 bytes of padding: so these
 *            reads meet no bank twice
 * x          kShared: put (normed) in shared memory by each thread block, else (no kNorm) read
 *            from the second-level cache into registers one chunk of columns ahead
 * Order      of a sum: by K alone. Which thread block computes it changes nothing
 * Requires   K % 32 == 0, addresses multiples of 16 bytes, kGated: kTiles even
 * Bound      memory: O * K * 2 bytes
 * Tried      nothing else yet
 * Test       tests/kernels/test_linear.py, test_add_rms_norm_linear.py, test_add_rms_norm_gate_up.py
 * Bench      python -m benchmarks.skinny_linear
 * Source     own; the ring is that of CUTLASS's pipelines
 */
#include "device.cuh"

namespace ember {

constexpr int kSkinnyWarps = 8;
constexpr int kSkinnyThreads = kSkinnyWarps * kWarpSize;
constexpr int kTileRows = 8;
constexpr int kChunk = 1024;                                    // columns of a stage
constexpr int kSteps = kChunk / 32 / kSkinnyWarps;              // of a warp in a stage
constexpr int kStagePitch = kChunk + 32;                        // elements between rows
constexpr int kStageElements = kTileRows * kStagePitch;
constexpr int kMaxStages = 16;

struct SkinnyArguments {
  const bf16* input;
  const bf16* residual;
  const bf16* norm_weight;
  const bf16* weight;
  const bf16* bias;
  bf16* output;
  bf16* total;
  int num_rows;     // M
  int width;        // K
  int num_outputs;  // O; kGated: I
  int num_stages;   // of the ring, at most kMaxStages
  float eps;
};

__device__ __forceinline__ u32 shared_address(const void* place) {
  return static_cast<u32>(__cvta_generic_to_shared(place));
}

/* Elements between two rows of x in shared memory: 64 bytes off a multiple of 128. */
__device__ __forceinline__ int pitch_of_x(int width) { return width + (width % 64 ? 64 : 32); }

// ---- the ring -------------------------------------------------------------------------

__device__ __forceinline__ void init_barrier(u32 barrier, int num_arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(num_arrivals) : "memory");
}

__device__ __forceinline__ void wait_for_phase(u32 barrier, u32 parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
#if __CUDA_ARCH__ >= 900
      "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
#else
      "mbarrier.test_wait.parity.shared.b64 done, [%0], %1;\n"
#endif
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

/* Rows of a stage as they lie in memory. */
struct StageSource {
  const bf16* rows;
  int num_rows, num_columns;
  i64 stride;
};

#if __CUDA_ARCH__ >= 900
constexpr int kArrivals = 1;

/* By one warp. */
__device__ __forceinline__ void fill(bf16* stage, u32 barrier, const StageSource& source) {
  const int lane = threadIdx.x % kWarpSize;
  const u32 row_bytes = source.num_columns * sizeof(bf16);
  if (lane == 0) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier),
                 "r"(source.num_rows * row_bytes)
                 : "memory");
  }
  __syncwarp();
  if (lane < source.num_rows) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(shared_address(stage + lane * kStagePitch)),
        "l"(source.rows + lane * source.stride), "r"(row_bytes), "r"(barrier)
        : "memory");
  }
}
#else
constexpr int kArrivals = kSkinnyThreads;

/* By all threads. */
__device__ __forceinline__ void fill(bf16* stage, u32 barrier, const StageSource& source) {
  constexpr int kPacks = kChunk / 8;
#pragma unroll
  for (int i = threadIdx.x; i < kTileRows * kPacks; i += kSkinnyThreads) {
    const int row = i / kPacks, column = i % kPacks * 8;
    if (row < source.num_rows && column < source.num_columns) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                       shared_address(stage + row * kStagePitch + column)),
                   "l"(source.rows + row * source.stride + column)
                   : "memory");
    }
  }
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}
#endif

/* What a thread block computes, and in which order it needs the stages. */
template <int kTiles, bool kGated>
struct Work {
  const SkinnyArguments& a;
  int first_group, num_tiles, num_chunks;  // a group is a tile, kGated: a gate and an up tile

  __device__ __forceinline__ explicit Work(const SkinnyArguments& arguments) : a(arguments) {
    const i64 num_groups = (a.num_outputs + kTileRows - 1) / kTileRows;
    first_group = static_cast<int>(num_groups * blockIdx.x / gridDim.x);
    const int end = static_cast<int>(num_groups * (blockIdx.x + 1) / gridDim.x);
    num_tiles = (end - first_group) * (kGated ? 2 : 1);
    num_chunks = (a.width + kChunk - 1) / kChunk;
  }

  __device__ __forceinline__ int columns(int chunk) const {
    return min(kChunk, a.width - chunk * kChunk);
  }

  /* First output of a tile. */
  __device__ __forceinline__ int output(int tile) const {
    return (first_group + (kGated ? tile / 2 : tile)) * kTileRows;
  }

  __device__ __forceinline__ StageSource source(int tile, int chunk) const {
    const int first = output(tile);
    const i64 row = first + (kGated && tile % 2 ? a.num_outputs : 0);
    return {a.weight + row * a.width + chunk * kChunk, min(kTileRows, a.num_outputs - first),
            columns(chunk), a.width};
  }
};

/* The stage that is to be filled next. */
template <int kTiles>
struct Place {
  int pass_tile = 0, chunk = 0, tile = 0;

  __device__ __forceinline__ void advance(int num_tiles, int num_chunks) {
    if (++tile < min(kTiles, num_tiles - pass_tile)) return;
    tile = 0;
    if (++chunk < num_chunks) return;
    chunk = 0;
    pass_tile += kTiles;
  }
};

// ---- x --------------------------------------------------------------------------------

/* x to shared memory, normed. Whole rows to warps where there are enough; else several warps
 * share a row. A thread norms what it has loaded itself. */
template <bool kNorm>
__device__ __forceinline__ void stage_x(const SkinnyArguments& a, bf16* x,
                                        const bf16* norm_weight) {
  __shared__ float squares_of[32][kSkinnyWarps];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int pitch = pitch_of_x(a.width), num_packs = a.width / 8;
  int rows_at_once = 1;
  while (rows_at_once < min(a.num_rows, kSkinnyWarps)) rows_at_once *= 2;
  const int parts = kSkinnyWarps / rows_at_once, part = warp % parts;
  const int first_pack = part * kWarpSize + lane, stride = parts * kWarpSize;

  for (int row = warp / parts; row < a.num_rows; row += rows_at_once) {
    const i64 source = static_cast<i64>(row) * a.width;
    float squares = 0.0f;
#pragma unroll 4
    for (int pack = first_pack; pack < num_packs; pack += stride) {
      Pack<bf16, 8> sum;
      sum.load(a.input + source + pack * 8);
      if constexpr (kNorm) {
        if (a.residual != nullptr) {
          Pack<bf16, 8> added;
          added.load(a.residual + source + pack * 8);
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            sum.values[i] =
                from_float<bf16>(to_float(sum.values[i]) + to_float(added.values[i]));
          }
          if (blockIdx.x == 0) sum.store(a.total + source + pack * 8);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float value = to_float(sum.values[i]);
          squares += value * value;
        }
      }
      sum.store(x + row * pitch + pack * 8);
    }
    if constexpr (kNorm) {
      squares = lane_sum<kWarpSize>(squares);
      if (lane == 0) squares_of[row][part] = squares;
    }
  }
  __syncthreads();
  if constexpr (!kNorm) return;

  for (int row = warp / parts; row < a.num_rows; row += rows_at_once) {
    float squares = 0.0f;
    for (int i = 0; i < parts; ++i) squares += squares_of[row][i];
    const float inverse_rms = rsqrtf(squares / a.width + a.eps);
#pragma unroll 4
    for (int pack = first_pack; pack < num_packs; pack += stride) {
      Pack<bf16, 8> sum, weights;
      sum.load(x + row * pitch + pack * 8);
      weights.load(norm_weight + pack * 8);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float value = rounded_to<bf16>(to_float(sum.values[i]) * inverse_rms);
        sum.values[i] = from_float<bf16>(value * to_float(weights.values[i]));
      }
      sum.store(x + row * pitch + pack * 8);
    }
  }
  __syncthreads();
}

/* The columns of a chunk that a warp multiplies, of all rows: lane (g, t) = (lane / 4, lane % 4)
 * has rows g, g + 8, .., columns 32 * (8 * step + warp) + 8t + 0 .. 7. */
template <int kRows>
struct Columns {
  uint4 words[kRows / 8][kSteps];

  __device__ __forceinline__ void load(const bf16* x, i64 pitch, int num_rows, int num_columns) {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int r = 0; r < kRows / 8; ++r) {
      const bf16* row = x + (8 * r + g) * pitch + 8 * t;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int column = 32 * (kSkinnyWarps * step + warp);
        words[r][step] = make_uint4(0, 0, 0, 0);
        if (8 * r + g < num_rows && column < num_columns) {
          words[r][step] = *reinterpret_cast<const uint4*>(row + column);
        }
      }
    }
  }
};

// ---- products -------------------------------------------------------------------------

__device__ __forceinline__ void multiply_add(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3,
                                             u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/* A warp's sums of a tile: lane (g, t) has rows 16b + g and 16b + g + 8, outputs 2t and 2t + 1:
 * [row g output 2t, g 2t + 1, g + 8 2t, g + 8 2t + 1]. */
template <int kRows>
struct TileSums {
  static constexpr int kBlocks = (kRows + 15) / 16;
  float sums[kBlocks][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[b][i] = 0.0f;
    }
  }

  __device__ __forceinline__ void accumulate(const bf16* stage, const Columns<kRows>& x,
                                             int num_columns) {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const bf16* row = stage + lane / 4 * kStagePitch + 8 * (lane % 4);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int column = 32 * (kSkinnyWarps * step + warp);
      if (column >= num_columns) break;  // what lies there may be NaN, which a zero keeps
      const uint4 w = *reinterpret_cast<const uint4*>(row + column);
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        const uint4 low = x.words[2 * b][step];
        uint4 high = make_uint4(0, 0, 0, 0);
        if constexpr (kRows > 8) high = x.words[2 * b + 1][step];
        multiply_add(sums[b], low.x, high.x, low.y, high.y, w.x, w.y);
        multiply_add(sums[b], low.z, high.z, low.w, high.w, w.z, w.w);
      }
    }
  }

  /* To [M, pitch]. */
  __device__ __forceinline__ void store(float* place, int pitch, int num_rows) const {
    const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int r = 0; r < kRows / 8; ++r) {
      const int row = 8 * r + g;
      if (row >= num_rows) break;
      *reinterpret_cast<float2*>(place + row * pitch + 2 * t) =
          make_float2(sums[r / 2][r % 2 * 2], sums[r / 2][r % 2 * 2 + 1]);
    }
  }
};

__device__ __forceinline__ float sum_of_warps(const float* parts, int stride) {
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kSkinnyWarps; ++warp) sum += parts[warp * stride];
  return sum;
}

/* The warps' sums [warp, M, pitch] of a pass to outputs. */
template <int kTiles, bool kGated>
__device__ __forceinline__ void write_outputs(const Work<kTiles, kGated>& work, const float* parts,
                                              int pass_tile) {
  constexpr int kPitch = kTiles * kTileRows + 8;
  constexpr int kOutputs = kTiles * kTileRows / (kGated ? 2 : 1);
  const SkinnyArguments& a = work.a;
  const int stride = a.num_rows * kPitch;
  for (int i = threadIdx.x; i < a.num_rows * kOutputs; i += kSkinnyThreads) {
    const int row = i / kOutputs, column = i % kOutputs;
    const int tile = column / kTileRows * (kGated ? 2 : 1);
    const int output = work.output(pass_tile + tile) + column % kTileRows;
    if (pass_tile + tile >= work.num_tiles || output >= a.num_outputs) continue;
    const float* place = parts + row * kPitch + tile * kTileRows + column % kTileRows;
    float result = sum_of_warps(place, stride);
    if constexpr (kGated) {
      const float gate = rounded_to<bf16>(result);
      const float up = rounded_to<bf16>(sum_of_warps(place + kTileRows, stride));
      result = rounded_to<bf16>(gate / (1.0f + expf(-gate))) * up;
    } else if (a.bias != nullptr) {
      result += to_float(a.bias[output]);
    }
    a.output[static_cast<i64>(row) * a.num_outputs + output] = from_float<bf16>(result);
  }
}

// ---- the kernel -----------------------------------------------------------------------

/* Shared memory: barriers, ring, x (kShared), norm weight (kNorm), sums of the warps. */
template <int kRows, int kTiles, bool kNorm, bool kGated, bool kShared>
__global__ void __launch_bounds__(kSkinnyThreads, kRows + (kShared ? 0 : 8) <= 16 ? 2 : 1)
    skinny_linear_kernel(SkinnyArguments a) {
  static_assert(kShared || !kNorm, "what is normed goes through shared memory");
  static_assert(!kGated || kTiles % 2 == 0, "a gate and its up are of one pass");
  constexpr int kPitch = kTiles * kTileRows + 8;
  extern __shared__ uint4 memory[];
  const u32 barriers = shared_address(memory);
  bf16* const ring = reinterpret_cast<bf16*>(memory) + kMaxStages * 4;
  bf16* const x = ring + a.num_stages * kStageElements;
  const int x_pitch = pitch_of_x(a.width);
  bf16* const norm_weight = x + (kShared ? a.num_rows * x_pitch : 0);
  float* const parts = reinterpret_cast<float*>(norm_weight + (kNorm ? a.width : 0));

  let_next_kernel_start();
  const int warp = threadIdx.x / kWarpSize;
  const Work<kTiles, kGated> work(a);
  const int num_tiles = work.num_tiles, num_chunks = work.num_chunks;

  Place<kTiles> next;  // to fill
#if __CUDA_ARCH__ >= 900
  for (int slot = 0; slot < a.num_stages && next.pass_tile < num_tiles; ++slot) {
    if (slot % kSkinnyWarps == warp) {
      if (threadIdx.x % kWarpSize == 0) {
        init_barrier(barriers + 8 * slot, kArrivals);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      }
      fill(ring + slot * kStageElements, barriers + 8 * slot,
           work.source(next.pass_tile + next.tile, next.chunk));
    }
    next.advance(num_tiles, num_chunks);
  }
#else
  if (threadIdx.x < a.num_stages) init_barrier(barriers + 8 * threadIdx.x, kArrivals);
  __syncthreads();
  for (int slot = 0; slot < a.num_stages && next.pass_tile < num_tiles; ++slot) {
    fill(ring + slot * kStageElements, barriers + 8 * slot,
         work.source(next.pass_tile + next.tile, next.chunk));
    next.advance(num_tiles, num_chunks);
  }
#endif
  if constexpr (kNorm) {
    for (int pack = threadIdx.x; pack < a.width / 8; pack += kSkinnyThreads) {
      Pack<bf16, 8> weights;
      weights.load(a.norm_weight + pack * 8);
      weights.store(norm_weight + pack * 8);
    }
    __syncthreads();
  }
  wait_for_previous_kernel();

  Columns<kRows> columns, ahead;
  if constexpr (kShared) {
    stage_x<kNorm>(a, x, norm_weight);
  } else {
    ahead.load(a.input, a.width, a.num_rows, work.columns(0));
    __syncthreads();
  }

  int slot = 0;
  u32 parity = 0;
  for (int pass_tile = 0; pass_tile < num_tiles; pass_tile += kTiles) {
    TileSums<kRows> sums[kTiles];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) sums[tile].clear();

    for (int chunk = 0; chunk < num_chunks; ++chunk) {
      const int num_columns = work.columns(chunk);
      if constexpr (kShared) {
        columns.load(x + chunk * kChunk, x_pitch, a.num_rows, num_columns);
      } else {
        columns = ahead;
        const int chunk_ahead = chunk + 1 < num_chunks ? chunk + 1 : 0;
        ahead.load(a.input + chunk_ahead * kChunk, a.width, a.num_rows,
                   work.columns(chunk_ahead));
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if (pass_tile + tile >= num_tiles) break;
        wait_for_phase(barriers + 8 * slot, parity);
        sums[tile].accumulate(ring + slot * kStageElements, columns, num_columns);
        if (next.pass_tile < num_tiles) {
          __syncthreads();  // all have read the stage
#if __CUDA_ARCH__ >= 900
          if (slot % kSkinnyWarps == warp)
#endif
          {
            fill(ring + slot * kStageElements, barriers + 8 * slot,
                 work.source(next.pass_tile + next.tile, next.chunk));
          }
          next.advance(num_tiles, num_chunks);
        }
        if (++slot == a.num_stages) {
          slot = 0;
          parity ^= 1;
        }
      }
    }

#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      sums[tile].store(parts + warp * a.num_rows * kPitch + tile * kTileRows, kPitch, a.num_rows);
    }
    __syncthreads();
    write_outputs(work, parts, pass_tile);
    if (pass_tile + kTiles < num_tiles) __syncthreads();  // before the next pass writes there
  }
}

}  // namespace ember
