/*
 * paged_decode: attention of one new token per row over its context in the paged KV cache.
 *
 * What       output[r, h] = softmax(scale * query[r, h] . k[0 .. L_r)) v[0 .. L_r), keys and
 *            values of KV head h / G, position p in block block_tables[r, p / S]
 * Shapes     query, output [R, H, d]; k_cache, v_cache [B, S, K, d]; block_tables [R, stride]
 *            int32; context_lens [R] int32, this token included. L_r = 0: the row is padding, and
 *            its output stays as it is
 * Types      bf16; products on tensor cores with fp32 sums, softmax in fp32 (base 2), its weights
 *            rounded to bf16 for the second product
 * Mapping    a *tile* is 16 positions of one row. The tiles of all rows, one row after another,
 *            are cut into equal shares, one per thread block, so one launch serves any mix of
 *            lengths. A warp has a KV head of its own: the warps of a block read neighbouring
 *            heads of the same positions, which lie side by side. Nothing goes through shared
 *            memory: a lane loads 16-byte pieces of K and V in just the places where the tensor
 *            core wants them (m16n8k16), and V's pairs of positions are put together by byte
 *            permutes. The first product gives its weights where the second wants them.
 *            Tile i + 1 is under way while tile i is computed
 * Combine    a row that several blocks share: each writes its part (unnormalised sum, maximum,
 *            weight) to `parts`; the last to arrive at the row's counter adds the parts in their
 *            order, so equal inputs give equal bits. Beyond 16 blocks in two levels. Counters
 *            are 0 before and after
 * Requires   d 64 or 128, G <= 8, S one of 16, 32, .. 256, 16-byte rows,
 *            fewer than 2^31 tiles in the cache
 * Bound      memory: sum_r L_r * 2 * K * d * 2 bytes
 * Tried      nothing else yet
 * Test       tests/kernels/test_paged_attention.py          Bench  python -m benchmarks.kernels
 * Source     own; paging: Kwon et al., SOSP 2023; equal shares: Stream-K, Osama et al., 2023;
 *            the split with a later sum: Flash-Decoding, Dao et al., 2023
 */
#include "device.cuh"

namespace ember {

constexpr int kTile = 16;   // positions
constexpr int kFanIn = 16;  // parts that one warp adds

struct DecodeArguments {
  const bf16* query;
  const bf16* k_cache;
  const bf16* v_cache;
  const int* block_tables;
  const int* context_lens;
  bf16* output;
  float* parts;       // [2 * blocks, K, G, d], a slot for a block's first and last row
  float2* part_sums;  // [2 * blocks, K, G] maximum (base 2, scaled) and sum of weights
  int* counters;      // [R + 2 * ceil(blocks / kFanIn), K]
  int num_rows, table_stride, num_kv_heads, group_size;
  int block_shift;      // S = kTile << block_shift
  int min_share;        // fewest tiles of a thread block
  float scale_log2;  // scale * log2(e)
};

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }

__device__ __forceinline__ uint4 load_streamed(const bf16* address) {
  uint4 word;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
               : "l"(address));
  return word;
}

/* Volatile: else the compiler reads once before the loop, and keeps what it read in registers. */
__device__ __forceinline__ uint2 load_shared(const uint2* place) {
  uint2 word;
  asm volatile("ld.volatile.shared.v2.u32 {%0, %1}, [%2];"
               : "=r"(word.x), "=r"(word.y)
               : "r"(static_cast<u32>(__cvta_generic_to_shared(place))));
  return word;
}

__device__ __forceinline__ void multiply_add(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3,
                                             u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

/* A warp's running result of its KV head. Lane (g, t) = (lane / 4, lane % 4) holds query heads
 * 2t and 2t + 1 of the group, dimensions 64c + 8g + 2j + {0, 1} in sums[4c + j]:
 * [dimension 0 head 0, 0 1, 1 0, 1 1]. */
template <int kHeadDim>
struct Part {
  float sums[kHeadDim / 16][4];
  float max[2], weight[2];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < kHeadDim / 16; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[m][i] = 0.0f;
    }
    max[0] = max[1] = minus_infinity();
    weight[0] = weight[1] = 0.0f;
  }

  __device__ __forceinline__ void rescale(float by0, float by1) {
#pragma unroll
    for (int m = 0; m < kHeadDim / 16; ++m) {
      sums[m][0] *= by0;
      sums[m][1] *= by1;
      sums[m][2] *= by0;
      sums[m][3] *= by1;
    }
  }

  /* To [G, d] bf16, divided by the weights. */
  __device__ __forceinline__ void write(bf16* output, int group_size, int g, int t) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int head = 2 * t + i;
      if (head >= group_size) return;
      const float inverse = 1.0f / weight[i];
#pragma unroll
      for (int c = 0; c < kHeadDim / 64; ++c) {
        uint4 word;
        word.x = pack_bf16(sums[4 * c][i] * inverse, sums[4 * c][2 + i] * inverse);
        word.y = pack_bf16(sums[4 * c + 1][i] * inverse, sums[4 * c + 1][2 + i] * inverse);
        word.z = pack_bf16(sums[4 * c + 2][i] * inverse, sums[4 * c + 2][2 + i] * inverse);
        word.w = pack_bf16(sums[4 * c + 3][i] * inverse, sums[4 * c + 3][2 + i] * inverse);
        *reinterpret_cast<uint4*>(output + head * kHeadDim + 64 * c + 8 * g) = word;
      }
    }
  }

  /* To and from [G, d] fp32 and [G] pairs; reads bypass the first-level cache, since another
   * multiprocessor wrote. */
  __device__ __forceinline__ void publish(float* part, float2* sum, int group_size, int g,
                                          int t) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int head = 2 * t + i;
      if (head >= group_size) return;
      if (g == 0) sum[head] = make_float2(max[i], weight[i]);
#pragma unroll
      for (int c = 0; c < kHeadDim / 64; ++c) {
        float4* place = reinterpret_cast<float4*>(part + head * kHeadDim + 64 * c + 8 * g);
        place[0] = make_float4(sums[4 * c][i], sums[4 * c][2 + i], sums[4 * c + 1][i],
                               sums[4 * c + 1][2 + i]);
        place[1] = make_float4(sums[4 * c + 2][i], sums[4 * c + 2][2 + i], sums[4 * c + 3][i],
                               sums[4 * c + 3][2 + i]);
      }
    }
  }

  __device__ __forceinline__ void add(const float* part, const float2* sum, int group_size, int g,
                                      int t) {
    float by[2] = {1.0f, 1.0f}, other_by[2] = {0.0f, 0.0f}, other_weight[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int head = 2 * t + i;
      if (head >= group_size) continue;
      const float2 other = __ldcg(sum + head);
      const float new_max = fmaxf(max[i], other.x);
      by[i] = exp2_fast(max[i] - new_max);
      other_by[i] = exp2_fast(other.x - new_max);
      max[i] = new_max;
      other_weight[i] = other.y * other_by[i];
    }
    rescale(by[0], by[1]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int head = 2 * t + i;
      if (head >= group_size) return;
      weight[i] = weight[i] * by[i] + other_weight[i];
#pragma unroll
      for (int c = 0; c < kHeadDim / 64; ++c) {
        const float4* place =
            reinterpret_cast<const float4*>(part + head * kHeadDim + 64 * c + 8 * g);
        const float4 low = __ldcg(place), high = __ldcg(place + 1);
        sums[4 * c][i] += low.x * other_by[i];
        sums[4 * c][2 + i] += low.y * other_by[i];
        sums[4 * c + 1][i] += low.z * other_by[i];
        sums[4 * c + 1][2 + i] += low.w * other_by[i];
        sums[4 * c + 2][i] += high.x * other_by[i];
        sums[4 * c + 2][2 + i] += high.y * other_by[i];
        sums[4 * c + 3][i] += high.z * other_by[i];
        sums[4 * c + 3][2 + i] += high.w * other_by[i];
      }
    }
  }
};

/* Where a warp's tiles lie in the cache; block ids are read 32 tiles at a time. */
struct TileFinder {
  const int* block_table;  // of this row
  int context_len, block_shift, block_ids, ids_from;

  __device__ __forceinline__ TileFinder(const DecodeArguments& a, int row)
      : block_table(a.block_tables + static_cast<i64>(row) * a.table_stride),
        context_len(a.context_lens[row]),
        block_shift(a.block_shift),
        block_ids(0),
        ids_from(-kWarpSize) {}

  /* First KV slot of a tile. Tiles are asked for in rising order. */
  __device__ __forceinline__ i64 slot(int tile) {
    if (tile >= ids_from + kWarpSize) {
      ids_from = tile;
      const int lane = threadIdx.x % kWarpSize;
      block_ids = block_table[min(tile + lane, (context_len - 1) / kTile) >> block_shift];
    }
    const int block = __shfl_sync(kAllLanes, block_ids, tile - ids_from);
    const int in_block = tile & ((1 << block_shift) - 1);
    return static_cast<i64>((block << block_shift) + in_block) * kTile;
  }

  /* Positions of a tile that the row has; the others are read at the last one it has. */
  __device__ __forceinline__ int num_valid(int tile) const {
    return min(context_len - tile * kTile, kTile);
  }
};

/* Keys of a tile: lane (g, t) has positions g and g + 8, dimensions 32c + 8t + 0 .. 7. */
template <int kHeadDim>
struct KeyTile {
  uint4 words[2][kHeadDim / 32];

  __device__ __forceinline__ void load(const bf16* tile, int row_stride, int num_valid, int g,
                                       int t) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bf16* row = tile + min(g + 8 * i, num_valid - 1) * row_stride;
#pragma unroll
      for (int c = 0; c < kHeadDim / 32; ++c) words[i][c] = load_streamed(row + 32 * c + 8 * t);
    }
  }

  /* Query heads by positions: lane (g, t) gets head g at positions 2t, 2t + 1, 2t + 8, 2t + 9.
   * The order of dimensions within a sum is that of the loads, for keys as for queries. */
  __device__ __forceinline__ void multiply(const uint2* query, float (&scores)[4]) const {
    float low[4] = {0.0f, 0.0f, 0.0f, 0.0f}, high[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
    for (int c = 0; c < kHeadDim / 32; ++c) {
      const uint2 q = load_shared(query + 2 * c * kWarpSize);
      const uint2 r = load_shared(query + (2 * c + 1) * kWarpSize);
      multiply_add(low, q.x, 0, q.y, 0, words[0][c].x, words[0][c].y);
      multiply_add(high, q.x, 0, q.y, 0, words[1][c].x, words[1][c].y);
      multiply_add(low, r.x, 0, r.y, 0, words[0][c].z, words[0][c].w);
      multiply_add(high, r.x, 0, r.y, 0, words[1][c].z, words[1][c].w);
    }
    scores[0] = low[0];
    scores[1] = low[1];
    scores[2] = high[0];
    scores[3] = high[1];
  }
};

/* Values of a tile: lane (g, t) has positions 2t, 2t + 1, 2t + 8, 2t + 9, dimensions
 * 64c + 8g + 0 .. 7. */
template <int kHeadDim>
struct ValueTile {
  uint4 words[4][kHeadDim / 64];

  __device__ __forceinline__ void load(const bf16* tile, int row_stride, int num_valid, int g,
                                       int t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int position = 2 * t + (i & 1) + (i & 2) * 4;
      const bf16* row = tile + min(position, num_valid - 1) * row_stride;
#pragma unroll
      for (int c = 0; c < kHeadDim / 64; ++c) words[i][c] = load_streamed(row + 64 * c + 8 * g);
    }
  }

  __device__ __forceinline__ void accumulate(u32 weights0, u32 weights1,
                                             float (&sums)[kHeadDim / 16][4]) const {
#pragma unroll
    for (int c = 0; c < kHeadDim / 64; ++c) {
      const u32* rows[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) rows[i] = reinterpret_cast<const u32*>(&words[i][c]);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        multiply_add(sums[4 * c + j], __byte_perm(rows[0][j], rows[1][j], 0x5410),
                     __byte_perm(rows[0][j], rows[1][j], 0x7632),
                     __byte_perm(rows[2][j], rows[3][j], 0x5410),
                     __byte_perm(rows[2][j], rows[3][j], 0x7632), weights0, weights1);
      }
    }
  }
};

/* A query head's row of scores lies in 4 lanes. */
__device__ __forceinline__ float head_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

/* What lane (head, .) has, for the two heads of this lane's `Part`. */
__device__ __forceinline__ float of_head(float x, int t, int i) {
  return __shfl_sync(kAllLanes, x, 8 * t + 4 * i);
}

/* Tiles [begin, end) of one row for KV head `kv_head`. `query` is this lane's own shared memory,
 * [d / 16] with a stride of a warp: registers are what this loop is short of. */
template <int kHeadDim>
__device__ __forceinline__ void attend(const DecodeArguments& a, int row, int kv_head, int begin,
                                       int end, uint2* query, Part<kHeadDim>& part) {
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
  const int row_stride = a.num_kv_heads * kHeadDim;
  TileFinder finder(a, row);
  i64 offset = finder.slot(begin) * row_stride + kv_head * kHeadDim;
  KeyTile<kHeadDim> keys;
  ValueTile<kHeadDim> values;
  keys.load(a.k_cache + offset, row_stride, finder.num_valid(begin), g, t);
  values.load(a.v_cache + offset, row_stride, finder.num_valid(begin), g, t);
  const bool is_head = g < a.group_size;  // else a row of zeros
  const i64 head = (static_cast<i64>(row) * a.num_kv_heads + kv_head) * a.group_size + g;
#pragma unroll
  for (int c = 0; c < kHeadDim / 32; ++c) {
    const uint4* source =
        reinterpret_cast<const uint4*>(a.query + head * kHeadDim + 32 * c + 8 * t);
    const uint4 word = is_head ? *source : make_uint4(0, 0, 0, 0);
    query[2 * c * kWarpSize] = make_uint2(word.x, word.y);
    query[(2 * c + 1) * kWarpSize] = make_uint2(word.z, word.w);
  }
  part.clear();
  float max = minus_infinity(), weight = 0.0f;  // of head g; weight of this lane's positions
#pragma unroll 1
  for (int tile = begin; tile < end; ++tile) {
    const int num_valid = finder.num_valid(tile);
    float scores[4];
    keys.multiply(query, scores);
    const bool has_next = tile + 1 < end;
    if (has_next) {
      offset = finder.slot(tile + 1) * row_stride + kv_head * kHeadDim;
      keys.load(a.k_cache + offset, row_stride, finder.num_valid(tile + 1), g, t);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool is_valid = 2 * t + (i & 1) + (i & 2) * 4 < num_valid;
      scores[i] = is_valid ? scores[i] * a.scale_log2 : minus_infinity();
    }
    const float old_max = max;
    max = head_max(
        fmaxf(fmaxf(fmaxf(scores[0], scores[1]), fmaxf(scores[2], scores[3])), old_max));
    const float by = exp2_fast(old_max - max);
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[i] = exp2_fast(scores[i] - max);
    weight = weight * by + ((scores[0] + scores[1]) + (scores[2] + scores[3]));
    part.rescale(of_head(by, t, 0), of_head(by, t, 1));
    values.accumulate(pack_bf16(scores[0], scores[1]), pack_bf16(scores[2], scores[3]),
                      part.sums);
    if (has_next) {
      values.load(a.v_cache + offset, row_stride, finder.num_valid(tile + 1), g, t);
    }
  }
  weight += __shfl_xor_sync(kAllLanes, weight, 1);
  weight += __shfl_xor_sync(kAllLanes, weight, 2);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    part.max[i] = of_head(max, t, i);
    part.weight[i] = of_head(weight, t, i);
  }
}

/* Which blocks share a row, and where their parts lie. */
struct RowShares {
  int first, last;  // blocks

  __device__ __forceinline__ i64 slot(int block) const { return 2 * block + (block == first); }
  __device__ __forceinline__ int first_of(int group) const { return max(first, group * kFanIn); }
  __device__ __forceinline__ int num_in(int group) const {
    return min(last, group * kFanIn + kFanIn - 1) - first_of(group) + 1;
  }
  __device__ __forceinline__ int num_groups() const { return last / kFanIn - first / kFanIn + 1; }
};

/* True in the warp that arrives last of `expected`; it then sees what the others published. */
__device__ __forceinline__ bool is_last_to_arrive(int* counter, int expected) {
  __threadfence();
  __syncwarp();
  int before = 0;
  if (threadIdx.x % kWarpSize == 0) {
    before = atomicInc(reinterpret_cast<u32*>(counter), expected - 1);  // wraps to 0
  }
  before = __shfl_sync(kAllLanes, before, 0);
  __threadfence();
  return before == expected - 1;
}

/* The sum of `count` parts: the block `first`, then those at the next multiples of `step`. */
template <int kHeadDim>
__device__ __forceinline__ void add_parts(const DecodeArguments& a, const RowShares& shares,
                                          int kv_head, int first, int step, int count,
                                          Part<kHeadDim>& part) {
  const int lane = threadIdx.x % kWarpSize;
  part.clear();
#pragma unroll 1
  for (int i = 0; i < count; ++i) {
    const int block = i == 0 ? first : (first / step + i) * step;
    const i64 head = (shares.slot(block) * a.num_kv_heads + kv_head) * a.group_size;
    part.add(a.parts + head * kHeadDim, a.part_sums + head, a.group_size, lane / 4, lane % 4);
  }
}

template <int kHeadDim>
__device__ __forceinline__ void publish(const DecodeArguments& a, i64 slot, int kv_head,
                                        const Part<kHeadDim>& part) {
  const int lane = threadIdx.x % kWarpSize;
  const i64 head = (slot * a.num_kv_heads + kv_head) * a.group_size;
  part.publish(a.parts + head * kHeadDim, a.part_sums + head, a.group_size, lane / 4, lane % 4);
}

template <int kHeadDim>
__device__ __forceinline__ void write(const DecodeArguments& a, int row, int kv_head,
                                      const Part<kHeadDim>& part) {
  const int lane = threadIdx.x % kWarpSize;
  const i64 head = (static_cast<i64>(row) * a.num_kv_heads + kv_head) * a.group_size;
  part.write(a.output + head * kHeadDim, a.group_size, lane / 4, lane % 4);
}

/* After this block's part of a shared row was published: the last to come here writes the row.
 * Not inlined, so that its registers do not add to those of the loop over tiles. */
template <int kHeadDim>
__device__ __noinline__ void combine(const DecodeArguments& a, int row, int kv_head, int first,
                                     int last) {
  const RowShares shares{first, last};
  const int group = blockIdx.x / kFanIn, num_groups = shares.num_groups();
  int* row_counter = a.counters + row * a.num_kv_heads + kv_head;
  int* counter = row_counter;
  if (num_groups > 1) {
    // A group has two rows at most that other groups share: one from before it, one beyond it.
    const int side = first < group * kFanIn ? 0 : 1;
    counter = a.counters + (a.num_rows + 2 * group + side) * a.num_kv_heads + kv_head;
  }
  if (!is_last_to_arrive(counter, shares.num_in(group))) return;
  Part<kHeadDim> part;
  add_parts(a, shares, kv_head, shares.first_of(group), 1, shares.num_in(group), part);
  if (num_groups > 1) {
    publish(a, shares.slot(shares.first_of(group)), kv_head, part);
    if (!is_last_to_arrive(row_counter, num_groups)) return;
    add_parts(a, shares, kv_head, first, kFanIn, num_groups, part);
  }
  write(a, row, kv_head, part);
}

/* ends[r + 1] = tiles of rows 0 .. r; ends[0] = 0. All threads of the block. */
template <int kThreads>
__device__ __forceinline__ void scan_tiles(const int* context_lens, int num_rows, int* ends) {
  __shared__ int warp_ends[kWarpSize];
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int rows_each = (num_rows + kThreads - 1) / kThreads;
  const int begin = min(static_cast<int>(threadIdx.x) * rows_each, num_rows);
  const int end = min(begin + rows_each, num_rows);
  int own = 0;
#pragma unroll 1
  for (int row = begin; row < end; ++row) own += (context_lens[row] + kTile - 1) / kTile;
  int sum = own;  // inclusive over the warp
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int other = __shfl_up_sync(kAllLanes, sum, offset);
    if (lane >= offset) sum += other;
  }
  if (lane == kWarpSize - 1) warp_ends[warp] = sum;
  __syncthreads();
  int before = sum - own;
  for (int i = 0; i < warp; ++i) before += warp_ends[i];
  if (threadIdx.x == 0) ends[0] = 0;
#pragma unroll 1
  for (int row = begin; row < end; ++row) {
    before += (context_lens[row] + kTile - 1) / kTile;
    ends[row + 1] = before;
  }
  __syncthreads();
}

/* The row of a tile: the first whose end is beyond it. */
__device__ __forceinline__ int row_of(const volatile int* ends, int num_rows, int tile) {
  int low = 0, high = num_rows - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (ends[middle + 1] > tile) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

template <int kHeadDim, int kWarps>
__global__ void __launch_bounds__(kWarps* kWarpSize, 16 / kWarps)
    paged_decode_kernel(const __grid_constant__ DecodeArguments a) {
  extern __shared__ int shared_ends[];  // [R + 2], the last is the share of a block
  __shared__ uint2 queries[kWarps][kHeadDim / 16][kWarpSize];
  scan_tiles<kWarps * kWarpSize>(a.context_lens, a.num_rows, shared_ends);
  // Volatile: read again for each row, so as not to hold registers while one is computed.
  const volatile int* ends = shared_ends;
  const volatile int& share = shared_ends[a.num_rows + 1];
  if (threadIdx.x == 0) {
    const int total = ends[a.num_rows], num_blocks = gridDim.x;
    shared_ends[a.num_rows + 1] = max((total + num_blocks - 1) / num_blocks, a.min_share);
  }
  __syncthreads();
  const int kv_head = blockIdx.y * kWarps + threadIdx.x / kWarpSize;
  let_next_kernel_start();
  wait_for_previous_kernel();
  if (static_cast<int>(blockIdx.x) * share >= ends[a.num_rows]) return;

  for (int row = row_of(ends, a.num_rows, blockIdx.x * share); row < a.num_rows; ++row) {
    const int row_begin = ends[row], row_end = ends[row + 1];
    const int begin = blockIdx.x * share, end = begin + share;
    if (row_begin >= end) break;
    if (row_begin == row_end) continue;  // padding
    Part<kHeadDim> part;
    attend(a, row, kv_head, max(begin, row_begin) - row_begin, min(end, row_end) - row_begin,
           &queries[threadIdx.x / kWarpSize][0][threadIdx.x % kWarpSize], part);
    const RowShares shares{ends[row] / share, (ends[row + 1] - 1) / share};
    if (shares.first == shares.last) {
      write(a, row, kv_head, part);
    } else {
      publish(a, shares.slot(blockIdx.x), kv_head, part);
      combine<kHeadDim>(a, row, kv_head, shares.first, shares.last);
    }
  }
}

}  // namespace ember
