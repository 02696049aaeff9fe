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
 *            A thread block owns neighbouring tiles (kGated: gate and up in turn). Its 8 warps take
 *            the columns of a stage by turns of 32, so each of them has a part of every sum; parts
 *            meet in shared memory when a pass of `pass_tiles` tiles is done. A ring of num_stages
 *            stages is filled ahead by the bulk copy engine (before sm_90: cp.async), a row per
 *            copy; its first round is asked for before the wait for the previous kernel, since
 *            weights are constant. So a thread block must be small enough to share a
 *            multiprocessor with the kernels before it. Two tiles are the A operand of m16n8k16,
 *            8 rows of x the B operand; which columns share a product is free, so a lane reads 16
 *            bytes of a row, neighbours in memory, for two products. A row of a stage ends with 64
 *            bytes of padding: so these reads meet no bank twice
 * x          kShared: put (normed) in shared memory by each thread block; a warp multiplies two
 *            tiles (kHeld = 1) over all columns, then the next. Else (no kNorm) read from the
 *            second-level cache into registers, 1024 columns for 2 * kHeld tiles
 * Order      of a sum: by K alone. Which thread block computes it changes nothing
 * Requires   K % 32 == 0, addresses multiples of 16 bytes, pass_tiles a multiple of 2 * kHeld or
 *            all tiles of a thread block
 * Bound      memory: O * K * 2 bytes
 * Tried      a ninth warp that fills the ring: three thread blocks have then no room for their
 *            registers on a multiprocessor; tiles as the B operand: twice the products for 8 rows;
 *            running the code once before the wait, to have it in the cache: slower
 * Test       tests/kernels/test_linear.py, test_add_rms_norm_linear.py,
 *            test_add_rms_norm_gate_up.py
 * Bench      python -m benchmarks.skinny_linear
 * Source     own; the ring is that of CUTLASS's pipelines
 */
#include "device.cuh"

namespace ember {

constexpr int kSkinnyWarps = 8;
constexpr int kSkinnyThreads = kSkinnyWarps * kWarpSize;
constexpr int kTileRows = 8;
constexpr int kChunk = 1024;                        // columns of a stage
constexpr int kSteps = kChunk / 32 / kSkinnyWarps;  // of a warp in a stage
constexpr int kStagePitch = kChunk + 32;            // elements between rows
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
  int pass_tiles;   // tiles whose parts of sums are added up together
  int num_left;     // stages still to be asked for when the next kernel may start
  float eps;
};

__device__ __forceinline__ u32 shared_address(const void* place) {
  return static_cast<u32>(__cvta_generic_to_shared(place));
}

__device__ __forceinline__ float low_of(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_of(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

/* Elements between two rows of x in shared memory: 64 bytes off a multiple of 128. */
__device__ __forceinline__ int pitch_of_x(int width) { return width + (width % 64 ? 64 : 32); }

// ---- the ring -------------------------------------------------------------------------

/* Two barriers per stage: one for what has come, one for what has been read. */
struct Barriers {
  u32 first;

  __device__ __forceinline__ u32 full(int slot) const { return first + 16 * slot; }
  __device__ __forceinline__ u32 empty(int slot) const { return first + 16 * slot + 8; }
};

__device__ __forceinline__ void init_barrier(u32 barrier, int num_arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(num_arrivals) : "memory");
}

__device__ __forceinline__ void arrive(u32 barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(barrier)
               : "memory");
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

/* A place in the ring and how often it was passed. */
struct Slot {
  int index = 0;
  u32 parity = 0;

  __device__ __forceinline__ void advance(int num_stages) {
    if (++index == num_stages) {
      index = 0;
      parity ^= 1;
    }
  }
};

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
constexpr int kArrivals = kWarpSize;

__device__ __forceinline__ void fill(bf16* stage, u32 barrier, const StageSource& source) {
  constexpr int kPacks = kChunk / 8;
#pragma unroll 4
  for (int i = threadIdx.x % kWarpSize; i < kTileRows * kPacks; i += kWarpSize) {
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
template <int kHeld, bool kGated>
struct Work {
  static constexpr int kGroup = 2 * kHeld;  // tiles that go through a chunk of columns together
  const SkinnyArguments& a;
  int first_group, num_tiles, num_chunks;

  __device__ __forceinline__ explicit Work(const SkinnyArguments& arguments) : a(arguments) {
    const u32 num_groups = (a.num_outputs + kTileRows - 1) / kTileRows;
    first_group = num_groups * blockIdx.x / gridDim.x;
    num_tiles = (num_groups * (blockIdx.x + 1) / gridDim.x - first_group) * (kGated ? 2 : 1);
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

/* The stage that is to be asked for next. */
template <int kHeld, bool kGated>
struct NextStage {
  const Work<kHeld, kGated>& work;
  int left, group = 0, chunk = 0, tile = 0;

  __device__ __forceinline__ explicit NextStage(const Work<kHeld, kGated>& of)
      : work(of), left(of.num_tiles * of.num_chunks) {}

  /* By one warp. */
  __device__ __forceinline__ void ask(bf16* ring, Barriers barriers, int slot) const {
    fill(ring + slot * kStageElements, barriers.full(slot), work.source(group + tile, chunk));
  }

  __device__ __forceinline__ void advance() {
    if (--left == work.a.num_left) let_next_kernel_start();
    if (++tile < min(work.kGroup, work.num_tiles - group)) return;
    tile = 0;
    if (++chunk < work.num_chunks) return;
    chunk = 0;
    group += work.kGroup;
  }
};

/* Barriers, and what the ring has room for. */
template <typename Next>
__device__ __forceinline__ void ask_first_round(Next& next, int num_stages, bf16* ring,
                                                Barriers barriers) {
  const int warp = threadIdx.x / kWarpSize;
#if __CUDA_ARCH__ < 900
  if (threadIdx.x < num_stages) init_barrier(barriers.full(threadIdx.x), kArrivals);
  if (threadIdx.x < num_stages) init_barrier(barriers.empty(threadIdx.x), kSkinnyThreads);
  __syncthreads();
#endif
#pragma unroll 1
  for (int slot = 0; slot < num_stages && next.left > 0; ++slot) {
    if (slot % kSkinnyWarps == warp) {
#if __CUDA_ARCH__ >= 900
      if (threadIdx.x % kWarpSize == 0) {  // the others see it after the next barrier of all
        init_barrier(barriers.full(slot), kArrivals);
        init_barrier(barriers.empty(slot), kSkinnyThreads);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      }
      __syncwarp();
#endif
      next.ask(ring, barriers, slot);
    }
    next.advance();
  }
}

// ---- x --------------------------------------------------------------------------------

__device__ __forceinline__ uint4 sum_of(uint4 a, uint4 b) {
  u32* words = reinterpret_cast<u32*>(&a);
  const u32* addends = reinterpret_cast<const u32*>(&b);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = pack_bf16(low_of(words[i]) + low_of(addends[i]),
                         high_of(words[i]) + high_of(addends[i]));
  }
  return a;
}

__device__ __forceinline__ float add_squares(float squares, const uint4& values) {
  const u32* words = reinterpret_cast<const u32*>(&values);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    squares += low_of(words[i]) * low_of(words[i]);
    squares += high_of(words[i]) * high_of(words[i]);
  }
  return squares;
}

__device__ __forceinline__ uint4 normed_of(uint4 values, const uint4& weight, float inverse_rms) {
  u32* words = reinterpret_cast<u32*>(&values);
  const u32* weights = reinterpret_cast<const u32*>(&weight);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const u32 normed = pack_bf16(low_of(words[i]) * inverse_rms, high_of(words[i]) * inverse_rms);
    words[i] =
        pack_bf16(low_of(normed) * low_of(weights[i]), high_of(normed) * high_of(weights[i]));
  }
  return values;
}

/* x to shared memory, normed. Whole rows to warps where there are enough; else several warps
 * share a row. A thread norms what it has loaded itself. */
template <bool kNorm>
__device__ __forceinline__ void stage_x(const SkinnyArguments& a, bf16* x,
                                        const bf16* norm_weight) {
  constexpr int kPacks = 4;  // that a thread has under way
  __shared__ float4 squares_of[32][kSkinnyWarps / 4];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int pitch = pitch_of_x(a.width), num_packs = a.width / 8;
  int rows_at_once = 1;
  while (rows_at_once < min(a.num_rows, kSkinnyWarps)) rows_at_once *= 2;
  const int parts = kSkinnyWarps / rows_at_once, part = warp % parts, first_row = warp / parts;
  const int first_pack = part * kWarpSize + lane, stride = parts * kWarpSize;

#pragma unroll 1
  for (int row = first_row; row < a.num_rows; row += rows_at_once) {
    const i64 source = static_cast<i64>(row) * a.width;
    const bool adds = kNorm && a.residual != nullptr;
    float squares = 0.0f;
#pragma unroll 1
    for (int from = first_pack; from < num_packs; from += kPacks * stride) {
      uint4 sums[kPacks], added[kPacks];
#pragma unroll
      for (int j = 0; j < kPacks; ++j) {
        const int pack = from + j * stride;
        if (pack >= num_packs) break;
        sums[j] = *reinterpret_cast<const uint4*>(a.input + source + pack * 8);
        if (adds) added[j] = *reinterpret_cast<const uint4*>(a.residual + source + pack * 8);
      }
#pragma unroll
      for (int j = 0; j < kPacks; ++j) {
        const int pack = from + j * stride;
        if (pack >= num_packs) break;
        if constexpr (kNorm) {
          if (adds) {
            sums[j] = sum_of(sums[j], added[j]);
            if (blockIdx.x == 0) {
              *reinterpret_cast<uint4*>(a.total + source + pack * 8) = sums[j];
            }
          }
          squares = add_squares(squares, sums[j]);
        }
        *reinterpret_cast<uint4*>(x + row * pitch + pack * 8) = sums[j];
      }
    }
    if constexpr (kNorm) {
      squares = lane_sum<kWarpSize>(squares);
      float* place = reinterpret_cast<float*>(squares_of[row]);
      // The parts that a row does not have are 0.
      if (lane < kSkinnyWarps && lane % parts == part) place[lane] = lane < parts ? squares : 0.0f;
    }
  }
  __syncthreads();
  if constexpr (kNorm) {
#pragma unroll 1
    for (int row = first_row; row < a.num_rows; row += rows_at_once) {
      const float4 s = squares_of[row][0], t = squares_of[row][1];
      const float squares = ((s.x + s.y) + (s.z + s.w)) + ((t.x + t.y) + (t.z + t.w));
      const float inverse_rms = rsqrtf(squares / a.width + a.eps);
#pragma unroll 2
      for (int pack = first_pack; pack < num_packs; pack += stride) {
        uint4* place = reinterpret_cast<uint4*>(x + row * pitch + pack * 8);
        const uint4 weights = *reinterpret_cast<const uint4*>(norm_weight + pack * 8);
        *place = normed_of(*place, weights, inverse_rms);
      }
    }
    __syncthreads();
  }
}

/* The columns of a chunk that a warp multiplies, of all rows: lane (g, t) = (lane / 4, lane % 4)
 * has rows g, g + 8, .., columns 32 * (8 * step + warp) + 8t + 0 .. 7. Rows that are not there are
 * the last one again: no other row's result depends on them. */
template <int kRows>
struct Columns {
  uint4 words[kRows / 8][kSteps];

  /* Of row 8b + g at its first column. */
  __device__ __forceinline__ static const bf16* row(const bf16* x, int b, int pitch,
                                                    int num_rows) {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    return x + min(8 * b + lane / 4, num_rows - 1) * pitch + 32 * warp + 8 * (lane % 4);
  }

  template <bool kWhole>
  __device__ __forceinline__ void load(const bf16* x, int pitch, int num_rows, int num_columns) {
    const int warp = threadIdx.x / kWarpSize;
#pragma unroll
    for (int b = 0; b < kRows / 8; ++b) {
      const bf16* row_of_b = row(x, b, pitch, num_rows);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const int column = 32 * kSkinnyWarps * step;
        if (kWhole || column + 32 * warp < num_columns) {
          words[b][step] = *reinterpret_cast<const uint4*>(row_of_b + column);
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

/* A warp's sums of two tiles: lane (g, t) has of block b rows 8b + 2t and 8b + 2t + 1, output g:
 * [tile 0 row 2t, tile 0 2t + 1, tile 1 2t, tile 1 2t + 1]. */
template <int kRows>
struct PairSums {
  static constexpr int kBlocks = kRows / 8;
  float sums[kBlocks][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[b][i] = 0.0f;
    }
  }

  /* Two halves of the products are summed apart, so that one need not wait for the other.
   * What lies beyond num_columns may be NaN, which a zero would keep. */
  template <bool kWhole>
  __device__ __forceinline__ void accumulate(const bf16* stage0, const bf16* stage1,
                                             const Columns<kRows>& x, int num_columns) {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int offset = lane / 4 * kStagePitch + 32 * warp + 8 * (lane % 4);
    uint4 first[kSteps], second[kSteps];
    float others[kBlocks][4] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int column = 32 * kSkinnyWarps * step;
      if (!kWhole && column + 32 * warp >= num_columns) continue;
      first[step] = *reinterpret_cast<const uint4*>(stage0 + offset + column);
      second[step] = *reinterpret_cast<const uint4*>(stage1 + offset + column);
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (!kWhole && 32 * (kSkinnyWarps * step + warp) >= num_columns) continue;
      const uint4 v = first[step], w = second[step];
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        const uint4 r = x.words[b][step];
        multiply_add(sums[b], v.x, w.x, v.y, w.y, r.x, r.y);
        multiply_add(others[b], v.z, w.z, v.w, w.w, r.z, r.w);
      }
    }
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[b][i] += others[b][i];
    }
  }

  /* The same step by step, for a few columns: reads x anew, and keeps little in registers. */
  __device__ __forceinline__ void accumulate_rest(const bf16* stage0, const bf16* stage1,
                                                  const bf16* x, int pitch, int num_rows,
                                                  int num_columns) {
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const int offset = lane / 4 * kStagePitch + 32 * warp + 8 * (lane % 4);
#pragma unroll 1
    for (int column = 0; column + 32 * warp < num_columns; column += 32 * kSkinnyWarps) {
      const uint4 v = *reinterpret_cast<const uint4*>(stage0 + offset + column);
      const uint4 w = *reinterpret_cast<const uint4*>(stage1 + offset + column);
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        const bf16* row = Columns<kRows>::row(x, b, pitch, num_rows);
        const uint4 r = *reinterpret_cast<const uint4*>(row + column);
        multiply_add(sums[b], v.x, w.x, v.y, w.y, r.x, r.y);
        multiply_add(sums[b], v.z, w.z, v.w, w.w, r.z, r.w);
      }
    }
  }

  /* To [M, pitch]. */
  __device__ __forceinline__ void store(float* place, int pitch, int num_rows,
                                        bool has_both) const {
    const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = 8 * b + 2 * t + i;
        if (row >= num_rows) break;
        place[row * pitch + g] = sums[b][i];
        if (has_both) place[row * pitch + kTileRows + g] = sums[b][2 + i];
      }
    }
  }
};

__device__ __forceinline__ float sum_of_warps(const float* parts, int stride) {
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kSkinnyWarps; ++warp) sum += parts[warp * stride];
  return sum;
}

/* Elements between two rows of sums: 2 of them are 8 or 24 banks apart. */
__device__ __forceinline__ int pitch_of_sums(int tiles) { return tiles * kTileRows + 4; }

/* The warps' sums [warp, M, pitch] of tiles first .. end - 1 to outputs. */
template <int kHeld, bool kGated>
__device__ __forceinline__ void write_outputs(const Work<kHeld, kGated>& work, const float* parts,
                                              int first, int end) {
  const SkinnyArguments& a = work.a;
  const int pitch = pitch_of_sums(a.pass_tiles), stride = a.num_rows * pitch;
  const u32 num_outputs = (end - first) * kTileRows / (kGated ? 2 : 1);
#pragma unroll 1
  for (u32 i = threadIdx.x; i < a.num_rows * num_outputs; i += kSkinnyThreads) {
    const u32 row = i / num_outputs, column = i - row * num_outputs;
    const int tile = column / kTileRows * (kGated ? 2 : 1);
    const int output = work.output(first + tile) + column % kTileRows;
    if (output >= a.num_outputs) continue;
    const float* place = parts + row * pitch + tile * kTileRows + column % kTileRows;
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

/* Thread blocks, of any kernels like this, whose registers a multiprocessor has room for. */
template <int kRows, bool kShared>
#if __CUDA_ARCH__ == 900
constexpr int kMinBlocks = kRows == 8 && kShared ? 3 : kRows <= 16 ? 2 : 1;
#else
constexpr int kMinBlocks = !kShared ? 1 : kRows == 8 ? 3 : kRows == 16 ? 2 : 1;
#endif

/* Shared memory: barriers, ring, x (kShared), norm weight (kNorm), sums of the warps. */
template <int kRows, int kHeld, bool kNorm, bool kGated, bool kShared>
__global__ void __launch_bounds__(kSkinnyThreads, (kMinBlocks<kRows, kShared>))
    skinny_linear_kernel(SkinnyArguments a) {
  static_assert(kShared || !kNorm, "what is normed goes through shared memory");
  static_assert(kShared == (kHeld == 1), "registers are for what is not shared");
  extern __shared__ uint4 memory[];
  const Barriers barriers{shared_address(memory)};
  bf16* const ring = reinterpret_cast<bf16*>(memory + kMaxStages);
  bf16* const x = ring + a.num_stages * kStageElements;
  const int x_pitch = kShared ? pitch_of_x(a.width) : a.width;
  bf16* const norm_weight = x + (kShared ? a.num_rows * x_pitch : 0);
  float* const parts = reinterpret_cast<float*>(norm_weight + (kNorm ? a.width : 0));
  const int warp = threadIdx.x / kWarpSize;

  const Work<kHeld, kGated> work(a);
  const int num_tiles = work.num_tiles, num_chunks = work.num_chunks;
  NextStage<kHeld, kGated> next(work);
  if (next.left <= a.num_left) let_next_kernel_start();
  ask_first_round(next, a.num_stages, ring, barriers);
  if constexpr (kNorm) {
    for (int pack = threadIdx.x; pack < a.width / 8; pack += kSkinnyThreads) {
      Pack<bf16, 8> weights;
      weights.load(a.norm_weight + pack * 8);
      weights.store(norm_weight + pack * 8);
    }
  }
  __syncthreads();
  wait_for_previous_kernel();

  if constexpr (kShared) stage_x<kNorm>(a, x, norm_weight);
  const bf16* const source = kShared ? x : a.input;
  Slot slot;
#pragma unroll 1
  for (int first = 0; first < num_tiles; first += a.pass_tiles) {
    const int end = min(first + a.pass_tiles, num_tiles), pitch = pitch_of_sums(a.pass_tiles);
#pragma unroll 1
    for (int group = first; group < end; group += work.kGroup) {
      PairSums<kRows> sums[kHeld];
#pragma unroll
      for (int pair = 0; pair < kHeld; ++pair) sums[pair].clear();
#pragma unroll 1
      for (int chunk = 0; chunk < num_chunks; ++chunk) {
        const int num_columns = work.columns(chunk);
        const bool is_whole = num_columns == kChunk;
        Columns<kRows> columns;
        const bf16* place = source + chunk * kChunk;
        if (is_whole) {
          columns.template load<true>(place, x_pitch, a.num_rows, num_columns);
        } else if (!kShared) {
          columns.template load<false>(place, x_pitch, a.num_rows, num_columns);
        }
#pragma unroll
        for (int pair = 0; pair < kHeld; ++pair) {
          const int tile = group + 2 * pair;
          if (tile >= end) break;
          const bool has_both = tile + 1 < end;
          Slot slots[2] = {slot, slot};
          slots[1].advance(a.num_stages);
          wait_for_phase(barriers.full(slots[0].index), slots[0].parity);
          if (has_both) wait_for_phase(barriers.full(slots[1].index), slots[1].parity);
          const bf16* stage0 = ring + slots[0].index * kStageElements;
          // Where there is one tile it is both; the second's sums are not stored.
          const bf16* stage1 = ring + (has_both ? slots[1] : slots[0]).index * kStageElements;
          if (is_whole) {
            sums[pair].template accumulate<true>(stage0, stage1, columns, num_columns);
          } else if constexpr (kShared) {
            sums[pair].accumulate_rest(stage0, stage1, place, x_pitch, a.num_rows, num_columns);
          } else {
            sums[pair].template accumulate<false>(stage0, stage1, columns, num_columns);
          }
          slot = slots[1];
          if (has_both) slot.advance(a.num_stages);
          if (next.left == 0) continue;
#pragma unroll 1
          for (int i = 0; i < (has_both ? 2 : 1) && next.left > 0; ++i) {
            const Slot read = i == 0 ? slots[0] : slots[1];
            arrive(barriers.empty(read.index));
            if (read.index % kSkinnyWarps == warp) {
              wait_for_phase(barriers.empty(read.index), read.parity);
              next.ask(ring, barriers, read.index);
            }
            next.advance();
          }
        }
      }
#pragma unroll
      for (int pair = 0; pair < kHeld; ++pair) {
        const int tile = group + 2 * pair;
        if (tile >= end) break;
        float* place = parts + warp * a.num_rows * pitch + (tile - first) * kTileRows;
        sums[pair].store(place, pitch, a.num_rows, tile + 1 < end);
      }
    }
    __syncthreads();
    write_outputs(work, parts, first, end);
    if (end < num_tiles) __syncthreads();  // before the next pass writes there
  }
}

}  // namespace ember
