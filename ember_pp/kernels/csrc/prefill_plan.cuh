/*
 * prefill_plan: which work each thread block of paged_prefill has, found on the device.
 *
 * A tile is the part of a row that a thread block computes for one KV head: tile_tokens tokens
 * over their context. Blocks take whole tiles from a counter, or equal shares of the positions of
 * all tiles, row by row, KV head by KV head; see paged_prefill.cuh.
 */
#pragma once

#include "attention.cuh"

namespace ember {

constexpr int kTileRows = 128;  // of a product: tokens times G
constexpr int kPlanThreads = 128;  // that plan, and copy
constexpr int kPlanBarrier = 1;
constexpr int kPartsCost = 640;  // positions that are computed in the time that parts take

struct PrefillArguments {
  const bf16* query;
  const bf16* k_cache;
  const bf16* v_cache;
  const int* block_tables;
  const int* table_rows;  // or null
  const int* context_lens;
  const int* starts;
  bf16* output;
  float4* parts;       // [2 * blocks, 128 * d / 4]
  float2* part_stats;  // [2 * blocks, 128] maximum (base 2, scaled) and sum of weights
  int* counters;       // [1 + blocks + 2 * ceil(blocks / kFanIn)]
  int num_rows, table_stride, num_kv_heads, group_size;
  int block_shift;     // S = kTile << block_shift
  int min_share;       // fewest positions of a thread block
  int near_positions;  // of a context whose keys stay in the second-level cache for all heads
  int tile_tokens;     // 128 / G
  int group_inverse;   // 65536 / G + 1
  float scale_log2;    // scale * log2(e)

  /* i / G for 0 <= i < 128 */
  __device__ __forceinline__ int token_of(int i) const { return i * group_inverse >> 16; }
};

/* What there is to do for one KV head. */
struct Count {
  i64 positions;
  int tiles, longest;  // tile, in positions

  __device__ __forceinline__ void add(const Count& other) {
    positions += other.positions;
    tiles += other.tiles;
    longest = max(longest, other.longest);
  }
};

/* A row of the step, and what it is cut into for each KV head. */
struct Chunk {
  int token, num_tokens, prefix, num_tiles;

  __device__ __forceinline__ Chunk(const PrefillArguments& a, int row) {
    token = a.starts[row];
    num_tokens = a.starts[row + 1] - token;
    prefix = a.context_lens[row] - num_tokens;
    const bool is_chunk = num_tokens >= 2 && prefix >= 0;
    num_tiles = is_chunk ? (num_tokens + a.tile_tokens - 1) / a.tile_tokens : 0;
  }
  /* Of the first n tiles, of which the last is taken to be full. */
  __device__ __forceinline__ Count count(const PrefillArguments& a, int n) const {
    const i64 positions = static_cast<i64>(n) * prefix + a.tile_tokens * (n * (n + 1LL) / 2);
    return Count{positions, n, n ? prefix + num_tokens : 0};
  }
};

/* A run of positions of a tile, in steps. */
struct Segment {
  int token, num_tokens, prefix;  // of the row
  int table, kv_head;
  int first_token;  // of the tile, among those of the row
  int begin, end;   // steps; there may be none
  Shares shares;
};

/* What is where among the rows of a step, in shared memory. */
struct RowIndex {
  Count ends[kPlanThreads];  // of the rows up to those of each thread
  int tails[kPlanThreads];   // see `Planner::start`; the first is that of all rows
  int longest;               // tile of all, in positions
  int row;                   // that was found
  Count before;              // of that row

  /* By kPlanThreads threads. */
  __device__ __forceinline__ void scan(const PrefillArguments& a) {
    Count own{0, 0, 0};
    int tail = 0;
    const int first = threadIdx.x * rows_each(a);
#pragma unroll 1
    for (int i = first; i < min(first + rows_each(a), a.num_rows); ++i) {
      const Chunk chunk(a, i);
      own.add(chunk.count(a, chunk.num_tiles));
      if (chunk.num_tiles) tail = max(tail, chunk.prefix + chunk.num_tokens / 4);
    }
    ends[threadIdx.x] = own;
    tails[threadIdx.x] = tail;
    sync_threads<kPlanBarrier, kPlanThreads>();
    if (threadIdx.x < kWarpSize) scan_threads(threadIdx.x);
    sync_threads<kPlanBarrier, kPlanThreads>();
  }

  /* The row that item `x` of one KV head is in, and what is before it; by thread 0. */
  template <typename Measure>
  __device__ __forceinline__ void find_row(const PrefillArguments& a, i64 x, Measure measure) {
    int low = 0, high = kPlanThreads - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (measure(ends[middle]) > x) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    before = low ? ends[low - 1] : Count{0, 0, 0};
    for (row = low * rows_each(a);; ++row) {
      const Chunk chunk(a, row);
      Count until = chunk.count(a, chunk.num_tiles);
      until.add(before);
      if (measure(until) > x) return;
      before = until;
    }
  }

  __device__ __forceinline__ u32 num_tiles(const PrefillArguments& a) const {
    return static_cast<u32>(ends[kPlanThreads - 1].tiles) * a.num_kv_heads;
  }

 private:
  __device__ __forceinline__ static int rows_each(const PrefillArguments& a) {
    return (a.num_rows + kPlanThreads - 1) / kPlanThreads;
  }

  /* From what each thread has to what those up to it have; tails[0] is the longest of all. */
  __device__ __forceinline__ void scan_threads(int lane) {
    constexpr int kEach = kPlanThreads / kWarpSize;
    Count sum{0, 0, 0};
    int tail = 0;
    for (int i = lane * kEach; i < lane * kEach + kEach; ++i) {
      sum.add(ends[i]);
      tail = max(tail, tails[i]);
    }
    const i64 own_positions = sum.positions;
    const int own_tiles = sum.tiles;
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      const Count other{__shfl_up_sync(kAllLanes, sum.positions, offset),
                        __shfl_up_sync(kAllLanes, sum.tiles, offset),
                        __shfl_up_sync(kAllLanes, sum.longest, offset)};
      if (lane >= offset) sum.add(other);
      tail = max(tail, __shfl_xor_sync(kAllLanes, tail, offset));
    }
    Count until{sum.positions - own_positions, sum.tiles - own_tiles, 0};
    if (lane == kWarpSize - 1) longest = sum.longest;
    for (int i = lane * kEach; i < lane * kEach + kEach; ++i) {
      until.add(ends[i]);
      ends[i] = until;
    }
    if (lane == 0) tails[0] = tail;
  }
};

template <int kStep>
__device__ __forceinline__ int to_steps(i64 count) {
  return static_cast<int>((count + kStep - 1) / kStep);
}

/* All steps of a tile of a row. */
template <int kStep>
__device__ __forceinline__ void set_segment(const PrefillArguments& a, const Chunk& chunk, int row,
                                            int kv_head, int tile, volatile Segment& segment) {
  const int first_token = tile * a.tile_tokens;
  segment.token = chunk.token;
  segment.num_tokens = chunk.num_tokens;
  segment.prefix = chunk.prefix;
  segment.table = a.table_rows ? a.table_rows[row] : row;
  segment.kv_head = kv_head;
  segment.first_token = first_token;
  segment.begin = 0;
  segment.end =
      to_steps<kStep>(chunk.prefix + min(first_token + a.tile_tokens, chunk.num_tokens));
}

/* Thread 0 looks for work. kStep: positions that are computed at a time. */
template <int kStep>
struct Planner : RowIndex {
  i64 share, at, end;  // of this block, in positions of all rows and heads
  i64 tile_at;         // where the tile that `at` is in begins
  int kv_head, tile;
  u32 row_end;    // of the whole tiles up to `row`, of all KV heads
  u32 next;       // whole tile
  bool is_whole;  // tiles are not shared

  /* By thread 0, as all that follows. */
  __device__ __forceinline__ void start(const PrefillArguments& a) {
    const i64 total = ends[kPlanThreads - 1].positions * a.num_kv_heads;
    share = max((total + gridDim.x - 1) / gridDim.x, static_cast<i64>(a.min_share));
    // With whole tiles a block has all of a tile at least; at the end some have nothing left to do
    // for about the time of a short tile of the row that has the longest of these. Where that is
    // little more than a share, it is better than adding parts.
    const i64 turns = (num_tiles(a) + gridDim.x - 1) / gridDim.x;
    const i64 of_longest = max(static_cast<i64>(longest), share + tails[0]);
    is_whole = min(turns * longest, of_longest) <= share + share / 8 + kPartsCost;
    row_end = 0;
    at = blockIdx.x * share;
    end = min(at + share, total);
    if (!is_whole && at < end) find_share(a);
  }

  /* For the next whole tile. Each block asks once more than it gets; after the last of all these
   * the counter is 0 again. */
  __device__ __forceinline__ void ask(const PrefillArguments& a) {
    next = atomicInc(reinterpret_cast<u32*>(a.counters), num_tiles(a) + gridDim.x - 1);
  }

  /* False if there is nothing left to do. */
  __device__ __forceinline__ bool find_work(const PrefillArguments& a, volatile Segment& segment) {
    if (!is_whole) return next_of_share(a, segment);
    if (next >= num_tiles(a)) return false;
    find_tile(a, next, segment);
    ask(a);
    return true;
  }

 private:
  /* Tile `index` of all, which is asked for in rising order; the longest of a row come first. */
  __device__ __forceinline__ void find_tile(const PrefillArguments& a, u32 index,
                                            volatile Segment& segment) {
    const u32 num_heads = a.num_kv_heads;
    if (index >= row_end) {
      find_row(a, index / num_heads, [](const Count& count) { return count.tiles; });
    }
    const Chunk chunk(a, row);
    const u32 in_row = index - before.tiles * num_heads, num_tiles = chunk.num_tiles;
    row_end = (before.tiles + num_tiles) * num_heads;
    const bool is_near = chunk.prefix + chunk.num_tokens <= a.near_positions;
    kv_head = is_near ? in_row % num_heads : in_row / num_tiles;
    tile = num_tiles - 1 - (is_near ? in_row / num_heads : in_row % num_tiles);
    set_segment<kStep>(a, chunk, row, kv_head, tile, segment);
    segment.shares.first = segment.shares.last = blockIdx.x;
  }

  /* Where this block's share begins. */
  __device__ __forceinline__ void find_share(const PrefillArguments& a) {
    find_row(a, at / a.num_kv_heads, [](const Count& count) { return count.positions; });
    const Chunk chunk(a, row);
    tile_at = before.positions * a.num_kv_heads;
    const i64 of_head = chunk.count(a, chunk.num_tiles).positions;
    kv_head = static_cast<int>((at - tile_at) / of_head);
    tile_at += kv_head * of_head;
    int low = 0, high = chunk.num_tiles - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (tile_at + chunk.count(a, middle + 1).positions > at) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    tile = low;
    tile_at += chunk.count(a, tile).positions;
  }

  /* The next piece of this block's share; false if there is none. */
  __device__ __forceinline__ bool next_of_share(const PrefillArguments& a,
                                                volatile Segment& segment) {
    if (at >= end) return false;
    const Chunk chunk(a, row);
    const i64 tile_end =
        tile_at + chunk.prefix + static_cast<i64>(tile + 1) * a.tile_tokens;
    const i64 until = min(end, tile_end);
    set_segment<kStep>(a, chunk, row, kv_head, tile, segment);
    if (until < tile_end) segment.end = min(segment.end, to_steps<kStep>(until - tile_at));
    segment.begin = min(segment.end, to_steps<kStep>(at - tile_at));
    segment.shares.first = static_cast<int>(tile_at / share);
    segment.shares.last = static_cast<int>((tile_end - 1) / share);
    at = until;
    if (until == tile_end) {
      tile_at = tile_end;
      go_on(a, chunk.num_tiles);
    }
    return true;
  }

  /* To the tile after this one; the rows may end there. */
  __device__ __forceinline__ void go_on(const PrefillArguments& a, int num_tiles) {
    if (++tile < num_tiles) return;
    tile = 0;
    if (++kv_head < a.num_kv_heads) return;
    kv_head = 0;
    do {
      ++row;
    } while (row < a.num_rows && Chunk(a, row).num_tiles == 0);
  }
};

}  // namespace ember
