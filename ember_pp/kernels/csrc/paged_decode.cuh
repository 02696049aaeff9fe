/*
 * paged_decode: attention of one new token per row over its context in the paged KV cache.
 *
 * What       output[t, h] = softmax(scale * query[t, h] . k[0 .. L_r)) v[0 .. L_r) for the token
 *            t = starts[r], keys and values of KV head h / G, position p in block
 *            block_tables[table_rows[r], p / S]; without table_rows, block_tables[r, p / S]
 * Shapes     query, output [T, H, d]; k_cache, v_cache [B, S, K, d]; block_tables [N, stride]
 *            int32; table_rows, starts, context_lens [R] int32, this token included. L_r = 0: the
 *            row is padding or has more tokens than one, and its output stays as it is
 * Types      bf16; products on tensor cores with fp32 sums, softmax in fp32 (base 2), its weights
 *            rounded to bf16 for the second product
 * Mapping    a *tile* is 16 positions of one row. The tiles of all rows, one row after another,
 *            are cut into equal shares, one per thread block, so one launch serves any mix of
 *            lengths. A block has kHeads neighbouring KV heads; kSplits warps take the tiles of
 *            one in turn. In the loop over tiles nothing goes through shared memory but the
 *            queries: a lane loads 16-byte pieces of K and V in just the places where the tensor
 *            core wants them (m16n8k16), and V's pairs of positions are put together by byte
 *            permutes. The first product gives its weights where the second wants them.
 *            Tile i + 1 is under way while tile i is computed. Old positions are read before
 *            the wait for the previous kernel, which stores the newest one only
 * Combine    the warps of a head add what they have in shared memory. A row that several blocks
 *            share: each writes its part (unnormalised sum, maximum, weight) to `parts`; the last
 *            to arrive at the row's counter adds the parts in their order, so equal inputs give
 *            equal bits. Beyond 16 blocks in two levels. Counters are 0 before and after
 * Requires   d 64 or 128, G <= kGroup <= 8, S one of 16, 32, .. 256, 16-byte rows,
 *            fewer than 2^31 tiles in the cache
 * Bound      memory: sum_r L_r * 2 * K * d * 2 bytes
 * Tried      a head for each of 8 warps, without shared memory: slower for few rows, whose parts
 *            then meet in memory, and no faster for many; asking for the tiles after the next to
 *            come to the second-level cache (1 to 4 of them): slower wherever memory is the
 *            bound, the more the further ahead; adding up to 64 parts in one level: slower
 * Test       tests/kernels/test_paged_attention.py          Bench  python -m benchmarks.kernels
 * Source     own; paging: Kwon et al., SOSP 2023; equal shares: Stream-K, Osama et al., 2023;
 *            the split with a later sum: Flash-Decoding, Dao et al., 2023
 */
#include "attention.cuh"

namespace ember {

struct DecodeArguments {
  const bf16* query;
  const bf16* k_cache;
  const bf16* v_cache;
  const int* block_tables;
  const int* table_rows;  // or null
  const int* context_lens;
  const int* starts;
  bf16* output;
  float* parts;        // [2 * blocks, K, G, d], a slot for a block's first and last row
  float2* part_stats;  // [2 * blocks, K, G] maximum (base 2, scaled) and sum of weights
  int* counters;       // [R + 2 * ceil(blocks / kFanIn), blocks in y]
  int num_rows, table_stride, num_kv_heads, group_size;
  int block_shift;      // S = kTile << block_shift
  int min_share;        // fewest tiles of a thread block
  float scale_log2;  // scale * log2(e)
};

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

  /* To [G, d] fp32 and [G] pairs (maximum, weight). */
  __device__ __forceinline__ void store(float* place, float2* stats, int group_size, int g,
                                        int t) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int head = 2 * t + i;
      if (head >= group_size) return;
      if (g == 0) stats[head] = make_float2(max[i], weight[i]);
#pragma unroll
      for (int c = 0; c < kHeadDim / 64; ++c) {
        float4* words = reinterpret_cast<float4*>(place + head * kHeadDim + 64 * c + 8 * g);
        words[0] = make_float4(sums[4 * c][i], sums[4 * c][2 + i], sums[4 * c + 1][i],
                               sums[4 * c + 1][2 + i]);
        words[1] = make_float4(sums[4 * c + 2][i], sums[4 * c + 2][2 + i], sums[4 * c + 3][i],
                               sums[4 * c + 3][2 + i]);
      }
    }
  }
};

/* What a warp works at: tiles begin, begin + kStep, .. below `end` of a row. Kept in shared
 * memory and read anew at each use, since registers are what the loop over tiles is short of. */
struct Segment {
  int row, end, context_len, table, token;
};

/* Where a warp's tiles lie in the cache; block ids are read 32 at a time. */
template <int kStep>
struct TileFinder {
  const volatile Segment& segment;
  int block_ids = 0, ids_from = -kWarpSize * kStep;

  __device__ __forceinline__ explicit TileFinder(const volatile Segment& of) : segment(of) {}

  /* First KV slot of a tile. Tiles are asked for in rising order. */
  __device__ __forceinline__ i64 slot(const DecodeArguments& a, int tile) {
    if (tile >= ids_from + kWarpSize * kStep) {
      ids_from = tile;
      const int lane = thread_index() % kWarpSize, last_tile = (segment.context_len - 1) / kTile;
      const int block = min(tile + lane * kStep, last_tile) >> a.block_shift;
      block_ids = a.block_tables[static_cast<i64>(segment.table) * a.table_stride + block];
    }
    const int block = __shfl_sync(kAllLanes, block_ids, (tile - ids_from) / kStep);
    const int in_block = tile & ((1 << a.block_shift) - 1);
    return static_cast<i64>((block << a.block_shift) + in_block) * kTile;
  }

  /* Positions of a tile that the row has. */
  __device__ __forceinline__ int num_valid(int tile) const {
    return min(segment.context_len - tile * kTile, kTile);
  }
};

/* Keys of a tile: lane (g, t) has positions g and g + 8, dimensions 32c + 8t + 0 .. 7. */
template <int kHeadDim>
struct KeyTile {
  uint4 words[2][kHeadDim / 32];

  /* Positions beyond the context have scores that are thrown away, whatever is read here. */
  __device__ __forceinline__ void load(const bf16* tile, int row_stride, int g, int t) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bf16* row = tile + static_cast<u32>((g + 8 * i) * row_stride);
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

  /* A weight of 0 does not undo a NaN: beyond the context, the last position is read again. */
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

/* What lane (head, .) has, for the two heads of this lane's `Part`. */
__device__ __forceinline__ float of_head(float x, int t, int i) {
  return __shfl_sync(kAllLanes, x, 8 * t + 4 * i);
}

/* A block's warps have kHeads KV heads side by side, then the same again for the next split. */
template <int kHeads>
__device__ __forceinline__ int kv_head_of_warp() {
  return blockIdx.y * kHeads + thread_index() / kWarpSize % kHeads;
}

/* The tiles of `segment` from `begin`, for the warp's KV head; there may be none. `queries` is
 * shared memory of the warp, [d / 16, lanes]. */
template <int kHeadDim, int kHeads, int kStep>
__device__ __forceinline__ void attend(const DecodeArguments& a, const volatile Segment& segment,
                                       int begin, uint2* queries, Part<kHeadDim>& part) {
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4;
  const int row_stride = a.num_kv_heads * kHeadDim;
  part.clear();
  part.max[0] = part.max[1] = minus_infinity();
  part.weight[0] = part.weight[1] = 0.0f;
  if (begin >= segment.end) return wait_for_previous_kernel();
  TileFinder<kStep> finder(segment);
  const auto offset_of = [&](int tile) {
    return finder.slot(a, tile) * row_stride + kv_head_of_warp<kHeads>() * kHeadDim;
  };
  i64 offset = offset_of(begin);
  KeyTile<kHeadDim> keys;
  ValueTile<kHeadDim> values;
  // The kernel before this one stores the newest position; older ones came in earlier steps.
  if ((begin + 1) * kTile >= segment.context_len) wait_for_previous_kernel();
  keys.load(a.k_cache + offset, row_stride, g, t);
  values.load(a.v_cache + offset, row_stride, finder.num_valid(begin), g, t);
  wait_for_previous_kernel();
  const bool is_head = g < a.group_size;  // else a row of zeros
  const i64 kv_head = static_cast<i64>(segment.token) * a.num_kv_heads + kv_head_of_warp<kHeads>();
  const i64 head = kv_head * a.group_size + g;
#pragma unroll
  for (int c = 0; c < kHeadDim / 32; ++c) {
    const uint4* source =
        reinterpret_cast<const uint4*>(a.query + head * kHeadDim + 32 * c + 8 * t);
    const uint4 word = is_head ? *source : make_uint4(0, 0, 0, 0);
    queries[2 * c * kWarpSize + lane] = make_uint2(word.x, word.y);
    queries[(2 * c + 1) * kWarpSize + lane] = make_uint2(word.z, word.w);
  }
  float max = minus_infinity(), weight = 0.0f;  // of head g; weight of this lane's positions
#pragma unroll 1
  for (int tile = begin; tile < segment.end; tile += kStep) {
    const int num_valid = finder.num_valid(tile);
    float scores[4];
    keys.multiply(queries + thread_index() % kWarpSize, scores);
    const bool has_next = tile + kStep < segment.end;
    if (has_next) {
      offset = offset_of(tile + kStep);
      keys.load(a.k_cache + offset, row_stride, g, t);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool is_valid = 2 * t + (i & 1) + (i & 2) * 4 < num_valid;
      scores[i] = is_valid ? scores[i] * a.scale_log2 : minus_infinity();
    }
    const float old_max = max;
    max = quad_max(
        fmaxf(fmaxf(fmaxf(scores[0], scores[1]), fmaxf(scores[2], scores[3])), old_max));
    const float by = exp2_fast(old_max - max);
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[i] = exp2_fast(scores[i] - max);
    weight = weight * by + ((scores[0] + scores[1]) + (scores[2] + scores[3]));
    part.rescale(of_head(by, t, 0), of_head(by, t, 1));
    values.accumulate(pack_bf16(scores[0], scores[1]), pack_bf16(scores[2], scores[3]),
                      part.sums);
    if (has_next) {
      values.load(a.v_cache + offset, row_stride, finder.num_valid(tile + kStep), g, t);
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

/* What the kSplits warps of a KV head do together, one query head and 4 dimensions each thread
 * and step: they add parts that lie in memory, each with the maximum and weight of its heads, up
 * to kGroup. */
template <int kHeadDim, int kSplits, int kGroup>
struct Merge {
  static constexpr int kThreads = kSplits * kWarpSize;
  static constexpr int kSteps = (kGroup * kHeadDim / 4 + kThreads - 1) / kThreads;
  float4 sums[kSteps];
  float2 stats[kSteps];

  __device__ __forceinline__ static int head(int thread, int step) {
    return (thread + step * kThreads) / (kHeadDim / 4);
  }

  /* `place(i)` is the row of part i's first head in `parts` [., d] and in `part_stats`. */
  template <bool kIsShared, typename Place>
  __device__ __forceinline__ void add(const float* parts, const float2* part_stats, Place place,
                                      int count, int group_size, int thread) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      sums[step] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      stats[step] = make_float2(minus_infinity(), 0.0f);
    }
#pragma unroll(kSteps == 1 ? 8 : 2)
    for (int i = 0; i < count; ++i) {
      const auto first_head = place(i);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if (head(thread, step) >= group_size) continue;
        const float2* stat = part_stats + first_head + head(thread, step);
        const float4* sum = reinterpret_cast<const float4*>(parts + first_head * kHeadDim) +
                            thread + step * kThreads;
        add_one(step, kIsShared ? *stat : __ldcg(stat), kIsShared ? *sum : __ldcg(sum));
      }
    }
  }

  __device__ __forceinline__ void add_one(int step, float2 stat, float4 sum) {
    const float max = fmaxf(stats[step].x, stat.x);
    const float by = exp2_fast(stats[step].x - max), other_by = exp2_fast(stat.x - max);
    stats[step] = make_float2(max, stats[step].y * by + stat.y * other_by);
    sums[step].x = sums[step].x * by + sum.x * other_by;
    sums[step].y = sums[step].y * by + sum.y * other_by;
    sums[step].z = sums[step].z * by + sum.z * other_by;
    sums[step].w = sums[step].w * by + sum.w * other_by;
  }

  __device__ __forceinline__ void store(float* place, float2* place_stats, int group_size,
                                        int thread) const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int element = thread + step * kThreads;
      if (head(thread, step) >= group_size) continue;
      reinterpret_cast<float4*>(place)[element] = sums[step];
      if (element % (kHeadDim / 4) == 0) place_stats[head(thread, step)] = stats[step];
    }
  }

  __device__ __forceinline__ void write(bf16* output, int group_size, int thread) const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (head(thread, step) >= group_size) continue;
      const float inverse = __fdividef(1.0f, stats[step].y);
      const uint2 word = make_uint2(pack_bf16(sums[step].x * inverse, sums[step].y * inverse),
                                    pack_bf16(sums[step].z * inverse, sums[step].w * inverse));
      reinterpret_cast<uint2*>(output)[thread + step * kThreads] = word;
    }
  }
};

/* After this block's part of a shared row was stored: the last to come here writes the row. Not
 * inlined, so that its registers do not add to those of the loop over tiles. */
template <int kHeadDim, int kHeads, int kSplits, int kGroup>
__device__ __noinline__ void combine(const DecodeArguments& a, int row, int token, int kv_head,
                                     int thread, int first, int last) {
  const Shares shares{first, last};
  const int group = blockIdx.x / kFanIn, num_groups = shares.num_groups();
  int* row_counter = a.counters + row * gridDim.y + blockIdx.y;
  int* counter = row_counter;
  if (num_groups > 1) {
    // A group has two rows at most that other groups share: one from before it, one beyond it.
    const int side = first < group * kFanIn ? 0 : 1;
    counter = a.counters + (a.num_rows + 2 * group + side) * gridDim.y + blockIdx.y;
  }
  const auto first_head = [&](int block) {
    return (shares.slot(block) * a.num_kv_heads + kv_head) * a.group_size;
  };
  constexpr int kBlock = kHeads * kSplits * kWarpSize;
  const bool is_first = threadIdx.x == 0;
  if (!is_last_to_arrive<0, kBlock>(counter, shares.num_in(group), is_first)) return;
  Merge<kHeadDim, kSplits, kGroup> merge;
  const int first_block = shares.first_of(group);
  merge.template add<false>(
      a.parts, a.part_stats, [&](int i) { return first_head(first_block + i); },
      shares.num_in(group), a.group_size, thread);
  if (num_groups > 1) {
    const i64 head = first_head(first_block);
    merge.store(a.parts + head * kHeadDim, a.part_stats + head, a.group_size, thread);
    if (!is_last_to_arrive<0, kBlock>(row_counter, num_groups, is_first)) return;
    merge.template add<false>(
        a.parts, a.part_stats,
        [&](int i) { return first_head(shares.first_of(first / kFanIn + i)); }, num_groups,
        a.group_size, thread);
  }
  const i64 head = (static_cast<i64>(token) * a.num_kv_heads + kv_head) * a.group_size;
  merge.write(a.output + head * kHeadDim, a.group_size, thread);
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

/* What a warp has in shared memory: its queries [8, d] bf16 while it attends, after that its sums
 * [kGroup, d] fp32, and their maxima and weights. */
template <int kHeadDim, int kWarps, int kGroup>
struct Scratch {
  static_assert(kGroup >= 4, "room for the queries");
  uint4 words[kWarps][kGroup * kHeadDim * sizeof(float) / sizeof(uint4)];
  float2 stats[kWarps][kGroup];
};

/* Add what the warps of a KV head have; the result is the row's output, or a part of it. */
template <int kHeadDim, int kHeads, int kSplits, int kGroup>
__device__ __forceinline__ void finish(const DecodeArguments& a, int row, int token,
                                       const Shares& shares, const Part<kHeadDim>& part,
                                       Scratch<kHeadDim, kHeads * kSplits, kGroup>& scratch) {
  const int lane = thread_index() % kWarpSize, warp = thread_index() / kWarpSize;
  const int thread = warp / kHeads * kWarpSize + lane;  // among those of the same KV head
  const int kv_head = kv_head_of_warp<kHeads>();
  __syncwarp();  // all lanes have read their queries
  part.store(reinterpret_cast<float*>(scratch.words[warp]), scratch.stats[warp], a.group_size,
             lane / 4, lane % 4);
  __syncthreads();
  Merge<kHeadDim, kSplits, kGroup> merge;  // the first split has a tile at least
  merge.template add<true>(
      reinterpret_cast<const float*>(scratch.words), scratch.stats[0],
      [&](int i) { return (i * kHeads + warp % kHeads) * kGroup; }, kSplits, a.group_size, thread);
  if (shares.first == shares.last) {
    const i64 head = (static_cast<i64>(token) * a.num_kv_heads + kv_head) * a.group_size;
    merge.write(a.output + head * kHeadDim, a.group_size, thread);
    __syncthreads();  // before the next row's queries
  } else {
    const i64 head = (shares.slot(blockIdx.x) * a.num_kv_heads + kv_head) * a.group_size;
    merge.store(a.parts + head * kHeadDim, a.part_stats + head, a.group_size, thread);
    combine<kHeadDim, kHeads, kSplits, kGroup>(a, row, token, kv_head, thread, shares.first,
                                               shares.last);
  }
}

template <int kHeadDim, int kHeads, int kSplits, int kGroup>
__global__ void __launch_bounds__(kHeads* kSplits* kWarpSize, 16 / (kHeads * kSplits))
    paged_decode_kernel(const __grid_constant__ DecodeArguments a) {
  constexpr int kWarps = kHeads * kSplits;
  extern __shared__ int shared_ends[];  // [R + 1]
  __shared__ volatile int share;        // tiles of a block
  __shared__ Scratch<kHeadDim, kWarps, kGroup> scratch;
  __shared__ volatile Segment segments[kWarps];
  scan_tiles<kWarps * kWarpSize>(a.context_lens, a.num_rows, shared_ends);
  const volatile int* ends = shared_ends;
  if (threadIdx.x == 0) {
    const int total = ends[a.num_rows], num_blocks = gridDim.x;
    share = max((total + num_blocks - 1) / num_blocks, a.min_share);
  }
  __syncthreads();
  let_next_kernel_start();
  if (static_cast<int>(blockIdx.x) * share >= ends[a.num_rows]) return wait_for_previous_kernel();

  for (int row = row_of(ends, a.num_rows, blockIdx.x * share); row < a.num_rows; ++row) {
    const int row_begin = ends[row], row_end = ends[row + 1];
    const int begin = blockIdx.x * share, end = begin + share;
    if (row_begin >= end) break;
    if (row_begin == row_end) continue;  // padding
    const int lane = thread_index() % kWarpSize, warp = thread_index() / kWarpSize;
    volatile Segment& segment = segments[warp];
    __syncwarp();
    if (lane == 0) {
      segment.row = row;
      segment.end = min(end, row_end) - row_begin;
      segment.context_len = a.context_lens[row];
      segment.table = a.table_rows ? a.table_rows[row] : row;
      segment.token = a.starts[row];
    }
    __syncwarp();
    Part<kHeadDim> part;
    attend<kHeadDim, kHeads, kSplits>(a, segment,
                                      max(begin, row_begin) - row_begin + warp / kHeads,
                                      reinterpret_cast<uint2*>(scratch.words[warp]), part);
    row = segments[thread_index() / kWarpSize].row;
    const Shares shares{ends[row] / share, (ends[row + 1] - 1) / share};
    const int token = segments[thread_index() / kWarpSize].token;
    finish<kHeadDim, kHeads, kSplits, kGroup>(a, row, token, shares, part, scratch);
    row = segments[thread_index() / kWarpSize].row;
  }
}

}  // namespace ember
