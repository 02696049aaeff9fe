/*
 * paged_decode: attention of one new token per row over its context in the paged KV cache; from
 * the fused QKV projection, its key and value stored on the way, or from queries.
 *
 * What       output[t, h] = softmax(scale * query[t, h] . k[0 .. L_r)) v[0 .. L_r) for the token
 *            t = starts[r], keys and values of KV head h / G, position p in block
 *            block_tables[table_rows[r], p / S]; without table_rows, block_tables[r, p / S].
 *            kFused: queries, and key and value of position L_r - 1, are those heads of tokens[t],
 *            with bias, norm and rotation as in qk_norm_rope_store_kv.cuh; key and value go to
 *            that position of the caches. Else queries are given, and the caches hold all
 * Shapes     tokens [T, (H + 2K) * d], else queries [T, H, d]; output [T, H, d]; k_cache, v_cache
 *            [B, S, K, d]; block_tables [N, stride] int32; table_rows, starts, context_lens [R]
 *            int32, this token included. L_r = 0: the row is padding or has more tokens than one,
 *            and its output stays as it is. bias [(H + 2K) * d], norm_weight [H + K, d] or null;
 *            rope_table [P, d] fp32
 * Types      bf16; products on tensor cores with fp32 sums, softmax in fp32 (base 2), its weights
 *            rounded to bf16 for the second product; norm and rotation as there
 * Mapping    a *tile* is 16 positions of one row. The tiles of all rows, one row after another,
 *            are cut into equal shares, one per thread block, so one launch serves any mix of
 *            lengths. Where there are blocks enough, each row begins with a block, for shares that
 *            are up to an eighth larger, so that few blocks have to meet. A block has kHeads
 *            neighbouring KV heads; kSplits warps take the tiles of one in turn, from the last to
 *            the first. In the loop over tiles nothing goes through shared memory but the queries:
 *            a lane loads 16-byte pieces of K and V in just the places where the tensor core wants
 *            them (m16n8k16), and V's pairs of positions are put together by byte permutes. The
 *            first product has keys by queries; its weights are transposed within the warp. The
 *            next tile is under way while one is computed
 * Order      what earlier steps stored is read before the wait for the previous kernel (kFused:
 *            all but the new token; else all but the last tile): a step begins with a kernel that
 *            nothing overlaps with, so all of an earlier step is done. After the wait a few lanes
 *            per head norm and turn what is new; the warp that has the row's last tile puts key
 *            and value into its registers, and the block stores them. No block reads from the
 *            caches what another of this launch writes
 * Combine    the warps of a head add what they have in shared memory. A row that several blocks
 *            share: each writes its part (unnormalised sum, maximum, weight) to `parts`; the last
 *            to arrive at the row's counter adds the parts in their order, so equal inputs give
 *            equal bits. Beyond 16 blocks in two levels. Counters are 0 before and after
 * Requires   d 64 or 128, G <= kGroup <= 8, S one of 16, 32, .. 256, 16-byte rows,
 *            fewer than 2^31 tiles in the cache
 * Bound      memory: sum_r L_r * 2 * K * d * 2 bytes; for few rows, latency: so thread blocks
 *            without a share leave at once and make room for the next kernel's weights
 * Tried      a head for each of 8 warps, without shared memory: slower for few rows, whose parts
 *            then meet in memory, and no faster for many; asking for the tiles after the next to
 *            come to the second-level cache (1 to 4 of them): slower wherever memory is the
 *            bound, the more the further ahead; adding up to 64 parts in one level: slower
 * Test       tests/kernels/test_paged_attention.py, tests/kernels/test_qkv_attention.py
 *            Bench  python -m benchmarks.kernels
 * Source     own; paging: Kwon et al., SOSP 2023; equal shares: Stream-K, Osama et al., 2023;
 *            the split with a later sum: Flash-Decoding, Dao et al., 2023
 */
#include "decode_tile.cuh"
#include "head_halves.cuh"

namespace ember {

struct DecodeArguments {
  const bf16* tokens;       // kFused: projections; else queries
  const bf16* bias;         // or null
  const bf16* norm_weight;  // or null
  const float* rope_table;
  bf16* k_cache;
  bf16* v_cache;
  const int* block_tables;
  const int* table_rows;  // or null
  const int* context_lens;
  const int* starts;
  bf16* output;
  float* parts;        // [2 * blocks, K, G, d], a slot for a block's first and last row
  float2* part_stats;  // [2 * blocks, K, G] maximum (base 2, scaled) and sum of weights
  int* counters;       // [R + 2 * ceil(blocks / kFanIn), blocks in y]
  int num_rows, table_stride, num_kv_heads, group_size;
  int block_shift;  // S = kTile << block_shift
  int min_share;    // fewest tiles of a thread block
  int num_ahead;    // tiles of a warp beyond the first that are asked for before the wait
  float eps;
  float scale_log2;  // scale * log2(e)
};

__device__ __forceinline__ int ceil_div(int x, int y) { return (x + y - 1) / y; }

__device__ __forceinline__ int num_tiles(int context_len) {
  return (context_len + kTile - 1) / kTile;
}

// ---- shares ---------------------------------------------------------------------------

/* How the tiles of all rows are cut into shares, one per thread block. */
struct Cut {
  int share;      // tiles
  bool is_whole;  // each row begins with a share

  /* Tiles from where a row begins to where the next does. */
  __device__ __forceinline__ int width(int context_len) const {
    const int tiles = num_tiles(context_len);
    return is_whole ? ceil_div(tiles, share) * share : tiles;
  }
};

/* A row and the tile that it begins with; num_rows: none. */
struct RowStart {
  int row, begin;
};

/* The rows of a lane, where each lane of a warp has the same number of neighbours. */
struct LaneRows {
  int each, first, end;

  __device__ __forceinline__ explicit LaneRows(int num_rows) {
    each = ceil_div(num_rows, kWarpSize);
    first = min(lane_index() * each, num_rows);
    end = min(first + each, num_rows);
  }
};

/* Bring what is read of a row later on to the first-level cache. */
__device__ __forceinline__ void touch(const DecodeArguments& a, int row) {
  if (row >= a.num_rows) return;
  asm volatile("prefetch.global.L1 [%0];" ::"l"(a.starts + row));
  if (a.table_rows) asm volatile("prefetch.global.L1 [%0];" ::"l"(a.table_rows + row));
}

/* By each warp for itself: so it needs no barrier. */
__device__ __forceinline__ Cut cut_tiles(const DecodeArguments& a) {
  const LaneRows rows(a.num_rows);
  const int num_blocks = gridDim.x;
  int total = 0, num_rows = 0;
  touch(a, rows.first);
#pragma unroll 4
  for (int row = rows.first; row < rows.end; ++row) {
    const int tiles = num_tiles(a.context_lens[row]);
    total += tiles;
    num_rows += tiles > 0;
  }
  total = __reduce_add_sync(kAllLanes, total);
  num_rows = __reduce_add_sync(kAllLanes, num_rows);
  const int share = max(ceil_div(total, num_blocks), a.min_share);
  if (num_rows > num_blocks) return {share, false};
  const int roomy = share + share / 8;  // a little more for each, so that fewer rows are shared
  int pieces = 0, largest = 1;
#pragma unroll 1
  for (int row = rows.first; row < rows.end; ++row) {
    const int tiles = num_tiles(a.context_lens[row]), own = ceil_div(tiles, roomy);
    pieces += own;
    if (tiles > 0) largest = max(largest, ceil_div(tiles, own));
  }
  pieces = __reduce_add_sync(kAllLanes, pieces);
  largest = __reduce_max_sync(kAllLanes, largest);
  const bool is_whole = pieces <= num_blocks;
  return {is_whole ? largest : share, is_whole};
}

/* The row of a tile. */
__device__ __forceinline__ RowStart row_of(const DecodeArguments& a, const Cut& cut, int tile) {
  const LaneRows rows(a.num_rows);
  const int lane = lane_index();
  int own = 0;
#pragma unroll 4
  for (int row = rows.first; row < rows.end; ++row) own += cut.width(a.context_lens[row]);
  int sum = own;  // inclusive
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int other = __shfl_up_sync(kAllLanes, sum, offset);
    if (lane >= offset) sum += other;
  }
  const int lanes_before = __popc(__ballot_sync(kAllLanes, sum <= tile));
  if (lanes_before == kWarpSize) return {a.num_rows, 0};
  RowStart at{lanes_before * rows.each, __shfl_sync(kAllLanes, sum - own, lanes_before)};
#pragma unroll 1
  while (true) {
    const int width = cut.width(a.context_lens[at.row]);
    if (at.begin + width > tile) return at;
    at.begin += width;
    ++at.row;
  }
}

/* What a warp works at: tiles first .. end - 1 of a row, in turn with others. Kept in shared
 * memory and read anew at each use, since registers are what the loop over tiles is short of. */
struct Segment {
  int row, begin, first, end, context_len, table, token;
  int share, is_whole, row_stride;
  int ids_from, block_ids[kWarpSize];  // see `TileFinder`

  __device__ __forceinline__ bool has_newest() const volatile {
    return end == num_tiles(context_len);
  }
};

/* The part of a row that belongs to this block's share. By all threads of a warp. */
__device__ __forceinline__ void begin_segment(const DecodeArguments& a, const RowStart& at,
                                              volatile Segment& segment) {
  __syncwarp();
  if (lane_index() == 0) {
    const int share = segment.share, from = blockIdx.x * share - at.begin;
    const int context_len = a.context_lens[at.row];
    segment.row = at.row;
    segment.begin = at.begin;
    segment.first = max(from, 0);
    segment.end = min(from + share, num_tiles(context_len));
    segment.context_len = context_len;
    segment.table = a.table_rows ? a.table_rows[at.row] : at.row;
    segment.token = a.starts[at.row];
    segment.ids_from = 0x7fffffff;
  }
  __syncwarp();
}

/* The next row of this block's share that has tiles; false: there is none. */
__device__ __forceinline__ bool next_row(const DecodeArguments& a,
                                         const volatile Segment& segment, RowStart& at) {
  const Cut cut{segment.share, segment.is_whole != 0};
  const int end = (blockIdx.x + 1) * cut.share;
  at = {segment.row, segment.begin};
  int context_len = segment.context_len;
  do {
    at.begin += cut.width(context_len);
    if (++at.row == a.num_rows || at.begin >= end) return false;
    context_len = a.context_lens[at.row];
  } while (context_len == 0);
  return true;
}

/* Where a warp's tiles lie in the cache. Block ids are read 32 at a time: those of tiles ids_from,
 * ids_from - kStep, .. */
template <int kStep>
struct TileFinder {
  volatile Segment& segment;

  __device__ __forceinline__ explicit TileFinder(volatile Segment& of) : segment(of) {}

  /* First KV slot of a tile. Tiles are asked for in falling order. */
  __device__ __forceinline__ i64 slot(const DecodeArguments& a, int tile) {
    if (segment.ids_from - tile >= kWarpSize * kStep) {
      const int lane = lane_index(), block = max(tile - lane * kStep, 0) >> a.block_shift;
      const int id = a.block_tables[static_cast<i64>(segment.table) * a.table_stride + block];
      __syncwarp();  // the ids before have been read
      segment.block_ids[lane] = id;
      if (lane == 0) segment.ids_from = tile;
      __syncwarp();
    }
    const int block = segment.block_ids[static_cast<u32>(segment.ids_from - tile) / kStep];
    const int in_block = tile & ((1 << a.block_shift) - 1);
    return static_cast<i64>((block << a.block_shift) + in_block) * kTile;
  }

  /* Positions of a tile that the row has. */
  __device__ __forceinline__ int num_valid(int tile) const {
    return min(segment.context_len - tile * kTile, kTile);
  }
};

// ---- what is new ----------------------------------------------------------------------

template <int kHeadDim, int kHeads, int kWarps, int kGroup>
struct DecodeShared {
  uint4 queries[kHeads][kHeadDim / 32 * kWarpSize];  // where `KeyTile::multiply` wants them
  uint4 newest[kHeads][2][kHeadDim / 8];             // key and value
  union {
    uint4 sums[kWarps][kGroup * kHeadDim / 4];               // of each warp, [kGroup, d] fp32
    uint4 staged[kWarps][kHeadDim / 4 + 2 * kWarpSize + 1];  // what `NewHead` is made with
  };
  float2 stats[kWarps][kGroup];
  volatile Segment segments[kWarps];
};

/* Copy to shared memory without registers; `copies_arrived` before it is read. */
template <int kBytes>
__device__ __forceinline__ void copy_async(void* place, const void* source) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(
                   static_cast<u32>(__cvta_generic_to_shared(place))),
               "l"(source), "n"(kBytes)
               : "memory");
}
__device__ __forceinline__ void copies_arrived() {
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncwarp();
}

/* A thread's part of a head of the new token. Of each KV head of the block: its query heads; in
 * the block that has the row's last tile, kFused, key and value too. What it is normed and turned
 * by waits in shared memory of the warp, `staged`: registers are full of the first tile. */
template <int kHeadDim, int kHeads, int kWarps, bool kFused>
struct NewHead {
  static constexpr int kPack = kHeads == 1 ? 4 : 8;  // more lanes, and less to do for each
  static constexpr int kHalf = kHeadDim / 2, kLanes = kHalf / kPack;
  using Packed = PackedHalves<bf16, kPack>;
  static constexpr int kAtOnce = kWarps * kWarpSize / kLanes;
  static constexpr int kAngleWords = kHeadDim / 4;
  int kv, head;  // KV head of the block; head of it
  int index;     // among those of the token; negative: the thread has none

  __device__ __forceinline__ static int heads_of_each(const DecodeArguments& a, bool has_newest) {
    return a.group_size + (kFused && has_newest ? 2 : 0);
  }
  __device__ __forceinline__ static int offset() {
    return static_cast<u32>(thread_index()) % kLanes * kPack;
  }
  __device__ __forceinline__ static Packed* weights_in(uint4* staged) {
    return reinterpret_cast<Packed*>(staged + kAngleWords) + lane_index();
  }
  /* Of the cache, where key and value are stored. */
  __device__ __forceinline__ static int* block_in(uint4* staged) {
    return reinterpret_cast<int*>(staged + kAngleWords + 2 * kWarpSize);
  }

  /* What does not depend on the previous kernel; of the pass-th kAtOnce heads. */
  __device__ __forceinline__ void prepare(const DecodeArguments& a,
                                          const volatile Segment& segment, int pass,
                                          uint4* staged) {
    const u32 each = heads_of_each(a, segment.has_newest());
    const u32 i = pass * kAtOnce + static_cast<u32>(thread_index()) / kLanes;
    kv = kHeads == 1 ? 0 : i / each;
    head = i - kv * each;
    const int kv_head = blockIdx.y * kHeads + kv;
    index = kv_head * a.group_size + head;
    if (kHeads == 1 ? head >= static_cast<int>(each) : kv >= kHeads) index = -1;
    if constexpr (kFused) {
      if (index >= 0 && head >= a.group_size) index = a.num_kv_heads * a.group_size + kv_head;
      if (index >= 0 && head > a.group_size) index += a.num_kv_heads;
      const i64 position = segment.context_len - 1;
      const int lane = lane_index();
      if (pass == 0 && lane < kAngleWords) {
        copy_async<16>(staged + lane, a.rope_table + position * kHeadDim + lane * 4);
      }
      if (index >= 0 && head <= a.group_size && a.norm_weight) {
        const bf16* weight = a.norm_weight + index * kHeadDim + offset();
        copy_async<2 * kPack>(&weights_in(staged)->first, weight);
        copy_async<2 * kPack>(&weights_in(staged)->second, weight + kHalf);
      }
      if (pass == 0 && lane == 0) {
        const i64 table = static_cast<i64>(segment.table) * a.table_stride;
        copy_async<4>(block_in(staged),
                      a.block_tables + table + (position / kTile >> a.block_shift));
      }
    }
  }

  /* By all threads of a warp. */
  template <typename Shared>
  __device__ __forceinline__ void finish(const DecodeArguments& a,
                                         const volatile Segment& segment, uint4* staged,
                                         Shared& shared) {
    const int num_heads = a.num_kv_heads * (a.group_size + (kFused ? 2 : 0));
    Packed x = {};
    if (index >= 0) {
      const i64 head_of_all = static_cast<i64>(segment.token) * num_heads + index;
      x.load(a.tokens + head_of_all * kHeadDim + offset(), kHalf);
    }
    if constexpr (kFused) {
      copies_arrived();
      x = turned(a, x, staged);
    }
    if (index < 0) return;
    if (head < a.group_size) {
      put_query(shared.queries[kv], x);
    } else if constexpr (kFused) {
      bf16* const newest = reinterpret_cast<bf16*>(shared.newest[kv][head - a.group_size]);
      x.store(newest + offset(), kHalf);
      const int in_block = (segment.context_len - 1) & ((kTile << a.block_shift) - 1);
      const i64 slot = static_cast<i64>(*block_in(staged)) * (kTile << a.block_shift) + in_block;
      bf16* const cache = head == a.group_size ? a.k_cache : a.v_cache;
      const i64 kv_head = slot * a.num_kv_heads + blockIdx.y * kHeads + kv;
      x.store(cache + kv_head * kHeadDim + offset(), kHalf);
    }
  }

  __device__ __forceinline__ Packed turned(const DecodeArguments& a, const Packed& x,
                                           uint4* staged) const {
    HeadHalves<bf16, kPack> halves(x);
    Packed other;
    if (a.bias && index >= 0) {
      other.load(a.bias + index * kHeadDim + offset(), kHalf);
      halves.add(HeadHalves<bf16, kPack>(other));
    }
    const bool is_turned = index >= 0 && head <= a.group_size;
    if (a.norm_weight) {
      const float mean = lane_sum<kLanes>(halves.squares()) / kHeadDim;
      other = *weights_in(staged);
      if (is_turned) halves.norm(HeadHalves<bf16, kPack>(other), rsqrtf(mean + a.eps));
    }
    if (is_turned) {
      Angles<kPack> angles;
      angles.load(reinterpret_cast<const float*>(staged) + offset(), kHalf);
      halves.turn(angles);
    }
    return halves.packed();
  }

  /* Lane (g, t) has head g, dimensions 32c + 8t + 0 .. 7 at c. */
  __device__ __forceinline__ void put_query(uint4* queries, const Packed& x) const {
    const u32 word = offset() / 8u, part = offset() % 8u / kPack;
    uint4* const place = queries + word / 4 * kWarpSize + 4 * head + word % 4;
    reinterpret_cast<typename Packed::Word*>(place)[part] = x.first;
    reinterpret_cast<typename Packed::Word*>(place + kHalf / 32 * kWarpSize)[part] = x.second;
  }
};

// ---- attention ------------------------------------------------------------------------

/* A block's warps have kHeads KV heads side by side, then the same again for the next split. */
template <int kHeads>
__device__ __forceinline__ int kv_head_of_warp() {
  return blockIdx.y * kHeads + static_cast<u32>(warp_index()) % kHeads;
}

/* Ask for the keys and values of a tile to come to the second-level cache. */
template <int kHeadDim>
__device__ __forceinline__ void ask_for(const bf16* keys, const bf16* values, int row_stride) {
  constexpr int kLine = 64;  // elements
#pragma unroll
  for (int i = 0; i < kHeadDim / kLine; ++i) {
    const int lane = lane_index();
    const bf16* cache = lane < kTile ? keys : values;
    asm volatile("prefetch.global.L2 [%0];" ::"l"(cache + lane % kTile * row_stride + i * kLine));
  }
}

/* The tiles of `segment` that are the warp's, for its KV head; there may be none. */
template <int kHeadDim, int kHeads, int kSplits, int kGroup, bool kFused, typename Shared>
__device__ __forceinline__ void attend(const DecodeArguments& a, volatile Segment& segment,
                                       Shared& shared, Part<kHeadDim>& part) {
  const int split = static_cast<u32>(warp_index()) / kHeads;
  int tile = segment.end - 1 - split;
  const bool has_tiles = tile >= segment.first;
  TileFinder<kSplits> finder(segment);
  const auto offset_of = [&](int tile) {
    return finder.slot(a, tile) * segment.row_stride + kv_head_of_warp<kHeads>() * kHeadDim;
  };
  KeyTile<kHeadDim> keys;
  ValueTile<kHeadDim> values;
  if (has_tiles) {
    const i64 offset = offset_of(tile);
    if (!kFused && split == 0 && segment.has_newest()) wait_for_previous_kernel();
    keys.load(a.k_cache + offset, segment.row_stride);
    values.load_part(a.v_cache + offset, segment.row_stride, finder.num_valid(tile));
#pragma unroll 1
    for (int i = 1; i <= a.num_ahead && tile - i * kSplits >= segment.first; ++i) {
      const i64 next = offset_of(tile - i * kSplits);
      ask_for<kHeadDim>(a.k_cache + next, a.v_cache + next, segment.row_stride);
    }
  }
  using New = NewHead<kHeadDim, kHeads, kHeads * kSplits, kFused>;
  static_assert(kHeads * (kGroup + 2) <= 2 * New::kAtOnce, "two rounds do");
  uint4* const staged = shared.staged[warp_index()];
  New part_of_head;
  part_of_head.prepare(a, segment, 0, staged);
  wait_for_previous_kernel();
  part_of_head.finish(a, segment, staged, shared);
  if constexpr (kHeads * (kGroup + 2) > New::kAtOnce) {
    if (kHeads * New::heads_of_each(a, segment.has_newest()) > New::kAtOnce) {
      part_of_head.prepare(a, segment, 1, staged);
      part_of_head.finish(a, segment, staged, shared);
    }
  }
  __syncthreads();
  part.clear();
  if (!has_tiles) return;
  const int kv = static_cast<u32>(warp_index()) % kHeads;
  if (kFused && split == 0 && segment.has_newest()) {
    const bf16* newest = reinterpret_cast<const bf16*>(shared.newest[kv]);
    const int last = (segment.context_len - 1) % kTile;
    keys.put(last, newest);
    values.put_last(last, newest + kHeadDim);
  }
#pragma unroll 1
  while (true) {
    const int num_valid = finder.num_valid(tile);
    float scores[4];
    keys.multiply(shared.queries[kv] + lane_index(), scores);
    tile -= kSplits;
    const bool has_next = tile >= segment.first;
    i64 offset = 0;
    if (has_next) {
      offset = offset_of(tile);
      keys.load(a.k_cache + offset, segment.row_stride);
    }
    const int g = lane_group();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool is_valid = g + (i & 2) * 4 < num_valid;
      scores[i] = is_valid ? scores[i] * a.scale_log2 : minus_infinity();
    }
    part.take(scores);
    values.accumulate(transposed(pack_bf16(scores[0], scores[1])),
                      transposed(pack_bf16(scores[2], scores[3])), part.sums);
    if (!has_next) break;
    values.load(a.v_cache + offset, segment.row_stride);  // no row ends here
  }
  part.finish();
}

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
  merge.template add<false, 2>(
      a.parts, a.part_stats, [&](int i) { return first_head(first_block + i); },
      shares.num_in(group), a.group_size, thread);
  if (num_groups > 1) {
    const i64 head = first_head(first_block);
    __syncthreads();  // all have read what is overwritten now
    merge.store(a.parts + head * kHeadDim, a.part_stats + head, a.group_size, thread);
    if (!is_last_to_arrive<0, kBlock>(row_counter, num_groups, is_first)) return;
    merge.template add<false, 2>(
        a.parts, a.part_stats,
        [&](int i) { return first_head(shares.first_of(first / kFanIn + i)); }, num_groups,
        a.group_size, thread);
  }
  const i64 head = (static_cast<i64>(token) * a.num_kv_heads + kv_head) * a.group_size;
  merge.write(a.output + head * kHeadDim, a.group_size, thread);
}

/* Add what the warps of a KV head have; the result is the row's output, or a part of it. */
template <int kHeadDim, int kHeads, int kSplits, int kGroup, typename Shared>
__device__ __forceinline__ void finish(const DecodeArguments& a, const volatile Segment& segment,
                                       const Part<kHeadDim>& part, Shared& shared) {
  const int lane = lane_index(), warp = warp_index();
  const int thread = warp / kHeads * kWarpSize + lane;  // among those of the same KV head
  const int kv_head = kv_head_of_warp<kHeads>();
  part.store(reinterpret_cast<float*>(shared.sums[warp]), shared.stats[warp], a.group_size,
             lane / 4, lane % 4);
  __syncthreads();
  Merge<kHeadDim, kSplits, kGroup> merge;
  merge.template add<true, kSplits>(
      reinterpret_cast<const float*>(shared.sums), shared.stats[0],
      [&](int i) { return (i * kHeads + warp % kHeads) * kGroup; }, kSplits, a.group_size, thread);
  const int last_tile = segment.begin + num_tiles(segment.context_len) - 1;
  const Shares shares{segment.begin / segment.share, last_tile / segment.share};
  const int token = segment.token;
  if (shares.first == shares.last) {
    const i64 head = (static_cast<i64>(token) * a.num_kv_heads + kv_head) * a.group_size;
    merge.write(a.output + head * kHeadDim, a.group_size, thread);
  } else {
    const i64 head = (shares.slot(blockIdx.x) * a.num_kv_heads + kv_head) * a.group_size;
    merge.store(a.parts + head * kHeadDim, a.part_stats + head, a.group_size, thread);
    combine<kHeadDim, kHeads, kSplits, kGroup>(a, segment.row, token, kv_head, thread,
                                               shares.first, shares.last);
  }
}

/* Thread blocks that a multiprocessor has registers for. */
template <int kWarps>
#if __CUDA_ARCH__ == 900
constexpr int kMinBlocks = 16 / kWarps;
#else
constexpr int kMinBlocks = 12 / kWarps;
#endif

template <int kHeadDim, int kHeads, int kSplits, int kGroup, bool kFused>
__global__ void __launch_bounds__(kHeads* kSplits* kWarpSize, kMinBlocks<kHeads * kSplits>)
    paged_decode_kernel(const __grid_constant__ DecodeArguments a) {
  __shared__ DecodeShared<kHeadDim, kHeads, kHeads * kSplits, kGroup> shared;
  let_next_kernel_start();
  RowStart at;
  {
    const Cut cut = cut_tiles(a);
    at = row_of(a, cut, blockIdx.x * cut.share);
    volatile Segment& segment = shared.segments[warp_index()];
    segment.share = cut.share;
    segment.is_whole = cut.is_whole;
    segment.row_stride = a.num_kv_heads * kHeadDim;
  }
  if (at.row == a.num_rows) {
    // No share. One block of all waits, so that this kernel ends after the one before.
    if (blockIdx.x == 0) wait_for_previous_kernel();
    return;
  }
  for (int i = threadIdx.x; i < kHeads * kHeadDim / 32 * kWarpSize; i += blockDim.x) {
    if (i % kWarpSize / 4 >= a.group_size) shared.queries[0][i] = make_uint4(0, 0, 0, 0);
  }
  while (true) {
    const int warp = warp_index();
    begin_segment(a, at, shared.segments[warp]);
    Part<kHeadDim> part;
    attend<kHeadDim, kHeads, kSplits, kGroup, kFused>(a, shared.segments[warp], shared, part);
    finish<kHeadDim, kHeads, kSplits, kGroup>(a, shared.segments[warp_index()], part, shared);
    if (!next_row(a, shared.segments[warp_index()], at)) return;
    __syncthreads();  // the warps have added what they have, and `sums` is free
  }
}

}  // namespace ember
