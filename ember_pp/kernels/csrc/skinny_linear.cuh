/*
 * skinny_linear: a product of few rows with a weight, which is read once; neighbours fused.
 *
 * What       total = round(input + residual) where there is a residual, else input
 *            x = rms_norm(total) with a norm (rounded as in rms_norm.cuh), else input
 *            output[m, o] = round(x[m] . weight[o] + bias[o])
 *            gated: output[m, i] = round(round(silu(gate)) * up), gate = round(x[m] . weight[i]),
 *            up = round(x[m] . weight[I + i])
 * Shapes     input, residual, total [M, K]; norm_weight [K]; weight [O, K] (gated: [2I, K]);
 *            bias [O]; output [M, O] (gated: [M, I]); contiguous. residual, total, norm_weight and
 *            bias may be null. M <= kRows, one of 8, 16, 24
 * Types      bf16; products on tensor cores with fp32 sums; squares, mean, silu in fp32
 * Mapping    A *tile* is 8 rows of the weight. A thread block owns neighbouring tiles and goes
 *            through them by *units* of two (gated: gate and up; one, where the block has no more),
 *            kHeld units side by side. A *stage* is 1024 columns of a unit in shared memory. Eight
 *            warps take the columns of a stage by turns of 32, so each has a part of every sum;
 *            parts meet in shared memory. A ninth warp fills the ring of stages by the bulk copy
 *            engine (before sm_90: cp.async), a row at a time. It does not wait for the previous
 *            kernel, since weights are constant: what the ring holds is there, or on the way, when
 *            x comes. A unit is the A operand of m16n8k16, 8 rows of x the B operand; which
 *            columns share a product is free, so a lane reads 16 bytes of a row, neighbours in
 *            memory, for two products. A row of a stage ends with 64 bytes of padding: so these
 *            reads meet no bank twice
 * x          of few elements, or where it fits beside the whole share of the weight: put whole in
 *            shared memory by each thread block, and normed. Else (kStreams, no norm) a tenth warp
 *            brings it stage by stage through a ring of its own
 * Overlap    The next kernel may start at once, and does where it fits beside this one. A thread
 *            block whose share of the weight fits into half of a multiprocessor takes no more; a
 *            larger one takes all, since a deep ring is what rides out the wait for x
 * Order      of a sum: by K alone. Which thread block computes it changes nothing
 * Requires   K % 32 == 0, addresses multiples of 16 bytes
 * Bound      memory: O * K * 2 bytes
 * Tried      tiles as the B operand: twice the products for 8 rows; a norm in each thread block for
 *            any number of rows: slower than a kernel of its own from 16 KiB of x; cp.async by the
 *            warps that multiply, each lane what it reads, without barriers: as fast for large
 *            weights, but x then queues behind them; the first stage in registers before x comes:
 *            no faster; bulk copies of 1 KiB for large weights: slower
 * Test       tests/kernels/test_linear.py, test_add_rms_norm_linear.py,
 *            test_add_rms_norm_gate_up.py
 * Bench      python -m benchmarks.skinny_linear
 * Source     own; the rings are those of CUTLASS's pipelines
 */
#include "device.cuh"

namespace ember {

constexpr int kSkinnyWarps = 8;  // that multiply; one more fills the ring, one the ring of x
constexpr int kSkinnyThreads = kSkinnyWarps * kWarpSize;
constexpr int kTileRows = 8;
constexpr int kHeld = 2;                            // units that go through the columns together
constexpr int kChunk = 1024;                        // columns of a stage
constexpr int kSteps = kChunk / 32 / kSkinnyWarps;  // of a warp in a stage
constexpr int kPitch = kChunk + 32;                 // elements between rows of a stage
constexpr int kMaxStages = 16;                      // of each ring

struct SkinnyArguments {
  const bf16* input;
  const bf16* residual;
  const bf16* norm_weight;  // null: no norm
  const bf16* weight;
  const bf16* bias;
  bf16* output;
  bf16* total;
  int num_rows;       // M
  int width;          // K
  int num_outputs;    // O; gated: I
  int is_gated;
  int unit_tiles;     // 2; 1 where a thread block has one tile
  int num_stages;     // of the ring, at most kMaxStages
  int num_under_way;  // stages asked for and not there yet, at most num_stages
  int num_x_stages;   // kStreams: of the ring of x, at most kMaxStages
  int copy_columns;   // of a row of the weight that one bulk copy brings
  float eps;
};

__device__ __forceinline__ u32 shared_address(const void* place) {
  return static_cast<u32>(__cvta_generic_to_shared(place));
}

__device__ __forceinline__ float low_of(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_of(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

/* 8 elements, by cp.async. */
__device__ __forceinline__ void copy_pack(bf16* to, const bf16* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from)
               : "memory");
}

/* Of the warps that multiply. */
__device__ __forceinline__ void sync_multipliers() {
  asm volatile("bar.sync 1, %0;" ::"n"(kSkinnyThreads) : "memory");
}

// ---- rings ----------------------------------------------------------------------------

__device__ __forceinline__ void init_barrier(u32 barrier, int num_arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(num_arrivals) : "memory");
}

__device__ __forceinline__ void arrive(u32 barrier) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }" ::"r"(barrier)
               : "memory");
}

__device__ __forceinline__ bool has_passed(u32 barrier, u32 parity) {
  u32 passed;
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
#if __CUDA_ARCH__ >= 900
      "mbarrier.try_wait.parity.shared.b64 done, [%1], %2;\n"
#else
      "mbarrier.test_wait.parity.shared.b64 done, [%1], %2;\n"
#endif
      "selp.u32 %0, 1, 0, done;\n"
      "}\n"
      : "=r"(passed)
      : "r"(barrier), "r"(parity)
      : "memory");
  return passed != 0;
}

__device__ __forceinline__ void wait_for_phase(u32 barrier, u32 parity) {
  while (!has_passed(barrier, parity)) {
  }
}

/* A place in a ring, and how often it was passed. */
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

/* Stages in shared memory, each with a barrier for "it is there" and one for "it was read". */
struct Ring {
  bf16* stages;
  u32 barriers;
  int num_stages, stage_elements;

  __device__ __forceinline__ u32 full(int slot) const { return barriers + 16 * slot; }
  __device__ __forceinline__ u32 empty(int slot) const { return barriers + 16 * slot + 8; }
  __device__ __forceinline__ bf16* stage(int slot) const { return stages + slot * stage_elements; }
  __device__ __forceinline__ void init() const;
};

/* Rows of a stage as they lie in memory: `num_rows` neighbours; has_up: as many at `up`, which are
 * rows 8 and up of the stage. */
struct StageSource {
  const bf16* rows;
  i64 stride;
  int num_rows, num_columns;
  bool has_up = false;
  const bf16* up = nullptr;

  __device__ __forceinline__ bool has(int row) const {
    return has_up ? row < 2 * kTileRows && row % kTileRows < num_rows : row < num_rows;
  }
  __device__ __forceinline__ const bf16* address(int row) const {
    return has_up && row >= kTileRows ? up + (row - kTileRows) * stride : rows + row * stride;
  }
};

#if __CUDA_ARCH__ >= 900
constexpr int kArrivals = 1;

/* By one warp. */
__device__ __forceinline__ void copy_rows(bf16* stage, u32 barrier, const StageSource& source,
                                          int copy_columns) {
  const int lane = threadIdx.x % kWarpSize;
  if (lane == 0) {
    const u32 bytes = (source.has_up ? 2 : 1) * source.num_rows * source.num_columns * sizeof(bf16);
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
  }
  __syncwarp();
  if (!source.has(lane)) return;
  const bf16* address = source.address(lane);
#pragma unroll 1
  for (int column = 0; column < source.num_columns; column += copy_columns) {
    const u32 bytes = min(copy_columns, source.num_columns - column) * sizeof(bf16);
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(shared_address(stage + lane * kPitch + column)),
        "l"(address + column), "r"(bytes), "r"(barrier)
        : "memory");
  }
}
#else
constexpr int kArrivals = kWarpSize;

__device__ __forceinline__ void copy_rows(bf16* stage, u32 barrier, const StageSource& source,
                                          int) {
  const int num_packs = source.num_columns / 8;
#pragma unroll 1
  for (int row = 0; row < kWarpSize; ++row) {
    if (!source.has(row)) continue;
    const bf16* address = source.address(row);
#pragma unroll 4
    for (int pack = threadIdx.x % kWarpSize; pack < num_packs; pack += kWarpSize) {
      copy_pack(stage + row * kPitch + pack * 8, address + pack * 8);
    }
  }
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}
#endif

__device__ __forceinline__ void Ring::init() const {
  if (threadIdx.x < num_stages) {
    init_barrier(full(threadIdx.x), kArrivals);
    init_barrier(empty(threadIdx.x), kSkinnyThreads);
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  }
}

/* Of one warp: what it asked for. */
struct Filler {
  const Ring& ring;
  const int num_under_way, copy_columns;
  Slot next, landed;
  int asked = 0;

  __device__ __forceinline__ Filler(const Ring& of, int most, int columns)
      : ring(of), num_under_way(most), copy_columns(columns) {}

  __device__ __forceinline__ void ask(const StageSource& source) {
    if (asked == num_under_way) {
      wait_for_phase(ring.full(landed.index), landed.parity);
      landed.advance(ring.num_stages);
    } else {
      ++asked;
    }
    wait_for_phase(ring.empty(next.index), next.parity ^ 1);
    copy_rows(ring.stage(next.index), ring.full(next.index), source, copy_columns);
    next.advance(ring.num_stages);
  }
};

/* What a thread block computes. A unit is 16 rows of the weight: neighbours, or gate and up. */
struct Work {
  const SkinnyArguments& a;
  int first_output, end_output;
  int num_tiles;    // of the weight: gate and up count as two
  int unit_shift;   // outputs of a unit, as a power of two
  int num_units, num_chunks;

  __device__ __forceinline__ explicit Work(const SkinnyArguments& arguments) : a(arguments) {
    const u32 all = (a.num_outputs + kTileRows - 1) / kTileRows;
    const int first = all * blockIdx.x / gridDim.x, end = all * (blockIdx.x + 1) / gridDim.x;
    first_output = first * kTileRows;
    end_output = min(end * kTileRows, a.num_outputs);
    num_tiles = (end - first) << (a.is_gated ? 1 : 0);
    unit_shift = a.is_gated || a.unit_tiles == 1 ? 3 : 4;
    num_units = a.unit_tiles == 1 ? num_tiles : (num_tiles + 1) / 2;
    num_chunks = (a.width + kChunk - 1) / kChunk;
  }

  __device__ __forceinline__ int columns(int chunk) const {
    return min(kChunk, a.width - chunk * kChunk);
  }

  __device__ __forceinline__ int output(int unit) const {
    return first_output + (unit << unit_shift);
  }

  __device__ __forceinline__ StageSource source(int unit, int chunk) const {
    const i64 stride = a.width;
    const bf16* rows = a.weight + output(unit) * stride + chunk * kChunk;
    const int num_rows = min(1 << unit_shift, end_output - output(unit));
    return {rows, stride, num_rows, columns(chunk), a.is_gated != 0, rows + a.num_outputs * stride};
  }
};

__device__ __forceinline__ void ask_for_weights(const Work& work, const Ring& ring) {
  Filler filler(ring, work.a.num_under_way, work.a.copy_columns);
#pragma unroll 1
  for (int first = 0; first < work.num_units; first += kHeld) {
#pragma unroll 1
    for (int chunk = 0; chunk < work.num_chunks; ++chunk) {
#pragma unroll 1
      for (int unit = first; unit < min(first + kHeld, work.num_units); ++unit) {
        filler.ask(work.source(unit, chunk));
      }
    }
  }
}

__device__ __forceinline__ void ask_for_x(const Work& work, const Ring& ring) {
  const SkinnyArguments& a = work.a;
  Filler filler(ring, ring.num_stages, kChunk);
#pragma unroll 1
  for (int first = 0; first < work.num_units; first += kHeld) {
#pragma unroll 1
    for (int chunk = 0; chunk < work.num_chunks; ++chunk) {
      filler.ask({a.input + chunk * kChunk, a.width, a.num_rows, work.columns(chunk)});
    }
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

/* Elements between two rows of x, where it lies whole: 64 bytes off a multiple of 128. */
__device__ __forceinline__ int pitch_of_x(int width) { return width + (width % 64 ? 64 : 32); }

/* Whole x to shared memory, normed, M <= 8, or as it is. `parts` warps share a row. A thread norms
 * what it has loaded itself. */
struct XStager {
  static constexpr int kPacks = 2;  // that a thread has under way
  const SkinnyArguments& a;
  bf16 *x, *norm_weight;
  int pitch, num_packs, parts, part, row, first_pack, stride;

  __device__ __forceinline__ XStager(const SkinnyArguments& arguments, bf16* to, bf16* weight)
      : a(arguments), x(to), norm_weight(weight) {
    const int warp = threadIdx.x / kWarpSize;
    pitch = pitch_of_x(a.width);
    num_packs = a.width / 8;
    parts = kSkinnyWarps / (a.num_rows > 4 ? 8 : a.num_rows > 2 ? 4 : a.num_rows);
    part = warp % parts;
    row = warp / parts;
    first_pack = part * kWarpSize + threadIdx.x % kWarpSize;
    stride = parts * kWarpSize;
  }

  __device__ __forceinline__ void stage_norm_weight() const {
#pragma unroll 1
    for (int pack = first_pack; pack < num_packs; pack += stride) {
      Pack<bf16, 8> weights;
      weights.load(a.norm_weight + pack * 8);
      weights.store(norm_weight + pack * 8);
    }
  }

  /* As it is. */
  __device__ __forceinline__ void copy_all() const {
#pragma unroll 1
    for (int r = row; r < a.num_rows; r += kSkinnyWarps / parts) {
#pragma unroll 4
      for (int pack = first_pack; pack < num_packs; pack += stride) {
        copy_pack(x + r * pitch + pack * 8, a.input + static_cast<i64>(r) * a.width + pack * 8);
      }
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    sync_multipliers();
  }

  /* Returns the sum of squares of what this thread has. */
  __device__ __forceinline__ float stage_row() const {
    const i64 source = static_cast<i64>(row) * a.width;
    float squares = 0.0f;
#pragma unroll 1
    for (int from = first_pack; from < num_packs; from += kPacks * stride) {
      uint4 sums[kPacks], added[kPacks];
#pragma unroll
      for (int j = 0; j < kPacks; ++j) {
        const int pack = from + j * stride;
        if (pack >= num_packs) break;
        sums[j] = *reinterpret_cast<const uint4*>(a.input + source + pack * 8);
        if (a.residual != nullptr) {
          added[j] = *reinterpret_cast<const uint4*>(a.residual + source + pack * 8);
        }
      }
#pragma unroll
      for (int j = 0; j < kPacks; ++j) {
        const int pack = from + j * stride;
        if (pack >= num_packs) break;
        if (a.residual != nullptr) {
          sums[j] = sum_of(sums[j], added[j]);
          if (pack % gridDim.x == blockIdx.x) {
            *reinterpret_cast<uint4*>(a.total + source + pack * 8) = sums[j];
          }
        }
        squares = add_squares(squares, sums[j]);
        *reinterpret_cast<uint4*>(x + row * pitch + pack * 8) = sums[j];
      }
    }
    return squares;
  }

  __device__ __forceinline__ void norm_all() const {
    __shared__ float4 squares_of[kSkinnyWarps][kSkinnyWarps / 4];  // of rows, M <= 8
    const int lane = threadIdx.x % kWarpSize;
    const float squares = lane_sum<kWarpSize>(row < a.num_rows ? stage_row() : 0.0f);
    float* squares_of_row = reinterpret_cast<float*>(squares_of[row]);
    if (lane < kSkinnyWarps && lane % parts == part) {  // parts that a row does not have are 0
      squares_of_row[lane] = lane < parts ? squares : 0.0f;
    }
    sync_multipliers();
    if (row < a.num_rows) {
      const float4 s = squares_of[row][0], t = squares_of[row][1];
      const float sum = ((s.x + s.y) + (s.z + s.w)) + ((t.x + t.y) + (t.z + t.w));
      const float inverse_rms = rsqrtf(sum / a.width + a.eps);
#pragma unroll 1
      for (int pack = first_pack; pack < num_packs; pack += stride) {
        uint4* place = reinterpret_cast<uint4*>(x + row * pitch + pack * 8);
        const uint4 weights = *reinterpret_cast<const uint4*>(norm_weight + pack * 8);
        *place = normed_of(*place, weights, inverse_rms);
      }
    }
    sync_multipliers();
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

/* The columns that a warp multiplies of a stage, of 8 rows: lane (g, t) = (lane / 4, lane % 4) has
 * row g, columns 32 * (8 * step + warp) + 8t + 0 .. 7. */
__device__ __forceinline__ void load_columns(uint4 (&words)[kSteps], const bf16* row,
                                             int num_columns = kChunk) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    if (32 * kSkinnyWarps * step >= num_columns) continue;
    words[step] = *reinterpret_cast<const uint4*>(row + 32 * kSkinnyWarps * step);
  }
}

/* A warp's sums of a unit: lane (g, t) has of block b rows 8b + 2t and 8b + 2t + 1, output g:
 * [tile 0 row 2t, tile 0 2t + 1, tile 1 2t, tile 1 2t + 1]. */
template <int kRows>
struct UnitSums {
  static constexpr int kBlocks = kRows / 8;
  static constexpr int kChains = kRows == 8 ? 2 : 1;  // of products that wait for each other
  float sums[kChains][kBlocks][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kChains * kBlocks * 4; ++i) (&sums[0][0][0])[i] = 0.0f;
  }

  /* Of a stage. Where it has one tile that is both; the second's sums are not stored. What lies
   * beyond num_columns may be NaN, which a zero would keep. */
  __device__ __forceinline__ void accumulate(const bf16* stage, bool has_both,
                                             const uint4 (&x)[kBlocks][kSteps], int num_columns) {
    uint4 first[kSteps], second[kSteps];
    load_columns(first, stage);
    if (has_both) {
      load_columns(second, stage + kTileRows * kPitch);
    } else {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) second[step] = first[step];
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (32 * kSkinnyWarps * step >= num_columns) continue;
      const uint4 v = first[step], w = second[step];
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        const uint4 r = x[b][step];
        multiply_add(sums[0][b], v.x, w.x, v.y, w.y, r.x, r.y);
        multiply_add(sums[kChains - 1][b], v.z, w.z, v.w, w.w, r.z, r.w);
      }
    }
  }

  /* To [M, pitch]. */
  __device__ __forceinline__ void store(float* place, int pitch, int num_rows) const {
    const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = 8 * b + 2 * t + i;
        if (row >= num_rows) break;
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          const int j = 2 * tile + i;
          const float sum = sums[0][b][j] + (kChains == 2 ? sums[kChains - 1][b][j] : 0.0f);
          place[row * pitch + tile * kTileRows + g] = sum;
        }
      }
    }
  }
};

constexpr int kPassColumns = kHeld * 2 * kTileRows;
constexpr int kSumsPitch = kPassColumns + 4;  // 2 rows are 8 banks apart

__device__ __forceinline__ float sum_of_warps(const float* parts, int stride) {
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kSkinnyWarps; ++warp) sum += parts[warp * stride];
  return sum;
}

/* The warps' sums [warp, M, kSumsPitch] of units first .. first + kHeld - 1 to outputs. */
__device__ __forceinline__ void write_outputs(const Work& work, const float* parts, int first) {
  const SkinnyArguments& a = work.a;
  const int stride = a.num_rows * kSumsPitch, column = threadIdx.x % kPassColumns;
  const int output = work.output(first) + column;
  if (column >= kHeld << work.unit_shift || output >= work.end_output) return;
  const int unit = column >> work.unit_shift;
  const int place = unit * 2 * kTileRows + column - (unit << work.unit_shift);
#pragma unroll 1
  for (int row = threadIdx.x / kPassColumns; row < a.num_rows;
       row += kSkinnyThreads / kPassColumns) {
    const float* from = parts + row * kSumsPitch + place;
    float result = sum_of_warps(from, stride);
    if (a.is_gated) {
      const float gate = rounded_to<bf16>(result);
      const float up = rounded_to<bf16>(sum_of_warps(from + kTileRows, stride));
      result = rounded_to<bf16>(gate / (1.0f + expf(-gate))) * up;
    } else if (a.bias != nullptr) {
      result += to_float(a.bias[output]);
    }
    a.output[static_cast<i64>(row) * a.num_outputs + output] = from_float<bf16>(result);
  }
}

// ---- the kernel -----------------------------------------------------------------------

/* Shared memory: barriers, ring, x or its ring, norm weight, sums of the warps. */
template <int kRows, bool kStreams>
__global__ void __launch_bounds__(kSkinnyThreads + (kStreams ? 2 : 1) * kWarpSize,
                                  kRows == 8 ? 2 : 1) skinny_linear_kernel(SkinnyArguments a) {
  static_assert(kStreams || kRows <= 16, "whole x is for few rows");
  constexpr int kBlocks = kRows / 8;
  extern __shared__ uint4 memory[];
  let_next_kernel_start();
  const Work work(a);
  bf16* const stages = reinterpret_cast<bf16*>(memory + 2 * kMaxStages);
  const Ring ring{stages, shared_address(memory), a.num_stages, a.unit_tiles * kTileRows * kPitch};
  bf16* const x = stages + a.num_stages * ring.stage_elements;
  const Ring x_ring{x, shared_address(memory + kMaxStages), a.num_x_stages, a.num_rows * kPitch};
  bf16* const norm_weight = x + (kStreams ? a.num_x_stages * x_ring.stage_elements
                                          : a.num_rows * pitch_of_x(a.width));
  float* const parts =
      reinterpret_cast<float*>(norm_weight + (a.norm_weight != nullptr ? a.width : 0));
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  ring.init();
  if constexpr (kStreams) x_ring.init();
  __syncthreads();
  if (warp == kSkinnyWarps) {
    ask_for_weights(work, ring);
    return;
  }
  if (kStreams && warp > kSkinnyWarps) {
    wait_for_previous_kernel();
    ask_for_x(work, x_ring);
    return;
  }

  if constexpr (kStreams) {
    wait_for_previous_kernel();
  } else {
    const XStager stager(a, x, norm_weight);
    if (a.norm_weight != nullptr) stager.stage_norm_weight();
    wait_for_previous_kernel();
    if (a.norm_weight != nullptr) {
      stager.norm_all();
    } else {
      stager.copy_all();
    }
  }
  const int lane_column = 32 * warp + 8 * (lane % 4), lane_row = lane / 4;
  Slot slot, x_slot;
#pragma unroll 1
  for (int first = 0; first < work.num_units; first += kHeld) {
    UnitSums<kRows> sums[kHeld];
#pragma unroll
    for (int held = 0; held < kHeld; ++held) sums[held].clear();
    uint4 columns[kBlocks][kSteps] = {};  // rows that are not there stay 0
#pragma unroll 1
    for (int chunk = 0; chunk < work.num_chunks; ++chunk) {
      const int num_columns = work.columns(chunk) - 32 * warp;
      const bf16* rows = kStreams ? x_ring.stage(x_slot.index) : x + chunk * kChunk;
      const int pitch = kStreams ? kPitch : pitch_of_x(a.width);
      if constexpr (kStreams) wait_for_phase(x_ring.full(x_slot.index), x_slot.parity);
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        const int row = 8 * b + lane_row;
        const bf16* from = rows + row * pitch + lane_column;
        if (row < a.num_rows) load_columns(columns[b], from, num_columns);
      }
#pragma unroll
      for (int held = 0; held < kHeld; ++held) {
        if (first + held >= work.num_units) break;
        wait_for_phase(ring.full(slot.index), slot.parity);
        sums[held].accumulate(ring.stage(slot.index) + lane_row * kPitch + lane_column,
                              a.unit_tiles == 2, columns, num_columns);
        arrive(ring.empty(slot.index));
        slot.advance(a.num_stages);
      }
      if constexpr (kStreams) {
        arrive(x_ring.empty(x_slot.index));
        x_slot.advance(a.num_x_stages);
      }
    }
    if (first > 0) sync_multipliers();  // what was there has been read
#pragma unroll
    for (int held = 0; held < kHeld; ++held) {
      float* place = parts + warp * a.num_rows * kSumsPitch + held * 2 * kTileRows;
      sums[held].store(place, kSumsPitch, a.num_rows);
    }
    sync_multipliers();
    write_outputs(work, parts, first);
  }
}

}  // namespace ember
