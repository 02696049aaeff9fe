/*
 * prefill_tile: what the kernels of paged_prefill share. Copies to shared memory, the result of a
 * tile, and the sum of its parts.
 *
 * A buffer of n positions lies in shared memory as [d / 64][n] lines of 128 bytes, of which line i
 * has 16-byte piece c at c ^ (i % 8): eight lines are read without conflicts, and it is the order
 * that wgmma knows as its swizzle of 128 bytes.
 */
#pragma once

#include "prefill_plan.cuh"

namespace ember {

constexpr int kLine = 64;  // elements, 128 bytes

__device__ __forceinline__ u32 shared_address(const void* place) {
  return static_cast<u32>(__cvta_generic_to_shared(place));
}

/* 16 bytes, or zeros. */
__device__ __forceinline__ void copy_async(u32 place, const bf16* source, bool is_there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(place), "l"(source),
               "r"(is_there ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group 0;" ::: "memory");
}

/* A thread's pieces of lines: 16-byte piece `piece` of every kLinesApart'th position. */
template <int kHeadDim>
struct Copier {
  static constexpr int kPieces = kHeadDim / 8;                // of a position
  static constexpr int kPositionsApart = kPlanThreads / kPieces;  // 8 or 16
  int first, piece;  // position and piece
  u32 place;         // in bytes, of a buffer with kRows positions: see `at`

  __device__ __forceinline__ Copier() {
    first = thread_index() / kPieces;
    piece = thread_index() % kPieces;
    place = first * kLine * sizeof(bf16) + ((piece % 8) ^ (first % 8)) * 16;
  }
  template <int kRows>
  __device__ __forceinline__ u32 at(int turn) const {
    return place + piece / 8 * (kRows * kLine * sizeof(bf16)) +
           turn * (kPositionsApart * kLine * sizeof(bf16));
  }
};

/* Rows of the tile beyond its tokens are zeros. */
template <int kHeadDim>
__device__ __forceinline__ void copy_query(const PrefillArguments& a,
                                           const volatile Segment& segment, u32 buffer) {
  const Copier<kHeadDim> copier;
  const int num_rows =
      min(a.tile_tokens, segment.num_tokens - segment.first_token) * a.group_size;
  const int num_heads = a.num_kv_heads * a.group_size;
  const i64 first = static_cast<i64>(segment.token + segment.first_token) * num_heads +
                    segment.kv_head * a.group_size;
#pragma unroll
  for (int turn = 0; turn < kTileRows / Copier<kHeadDim>::kPositionsApart; ++turn) {
    const int i = copier.first + turn * Copier<kHeadDim>::kPositionsApart;
    const int token = a.token_of(i);
    const i64 head = first + token * num_heads + (i - token * a.group_size);
    copy_async(buffer + copier.template at<kTileRows>(turn),
               a.query + (i < num_rows ? head * kHeadDim + copier.piece * 8 : 0), i < num_rows);
  }
}

/* Where the positions of a segment lie in the cache; block ids are read for 32 kTile at a time. */
template <int kStep>
struct SlotFinder {
  int block_ids = 0;

  /* KV slot of position tile * kTile. */
  __device__ __forceinline__ int slot(const PrefillArguments& a, const volatile Segment& segment,
                                      int tile) {
    const int turn = (tile - segment.begin * (kStep / kTile)) % kWarpSize;
    if (turn == 0) {
      const int last = (segment.prefix + segment.num_tokens - 1) / kTile;
      const int block = min(tile + thread_index() % kWarpSize, last) >> a.block_shift;
      block_ids = a.block_tables[static_cast<i64>(segment.table) * a.table_stride + block];
    }
    const int block = __shfl_sync(kAllLanes, block_ids, turn);
    return ((block << a.block_shift) + (tile & ((1 << a.block_shift) - 1))) * kTile;
  }
};

/* Keys or values of a step; beyond the context zeros, since a weight of 0 does not undo a NaN. */
template <int kHeadDim, int kStep>
__device__ __forceinline__ void copy_step(const PrefillArguments& a,
                                          const volatile Segment& segment,
                                          SlotFinder<kStep>& finder, int step, const bf16* cache,
                                          u32 buffer) {
  constexpr int kApart = Copier<kHeadDim>::kPositionsApart;
  const Copier<kHeadDim> copier;
  const int num_valid = segment.prefix + segment.num_tokens - step * kStep;
  const int stride = a.num_kv_heads * kHeadDim;
  const int own = copier.first * stride + segment.kv_head * kHeadDim + copier.piece * 8;
#pragma unroll
  for (int tile = 0; tile < kStep / kTile; ++tile) {
    const i64 slot = finder.slot(a, segment, step * (kStep / kTile) + tile);
    const i64 offset = slot * stride + own;
#pragma unroll
    for (int i = 0; i < kTile / kApart; ++i) {
      const int turn = tile * (kTile / kApart) + i;
      const bool is_there = copier.first + turn * kApart < num_valid;
      copy_async(buffer + copier.template at<kStep>(turn),
                 cache + (is_there ? offset + i * kApart * stride : 0), is_there);
    }
  }
}

/* A warp's rows of a tile, as products of 16; kWarps warps from kFirst on have a tile. Lane (g, t),
 * lane / 4 and lane % 4, has rows 16m + g and 16m + g + 8: in sums[m][n] dimensions 8n + 2t,
 * 8n + 2t + 1 of the one, then of the other. */
template <int kHeadDim, int kFirst, int kWarps>
struct Part {
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kDims = kHeadDim;
  static constexpr int kProducts = kTileRows / kWarps / 16;
  float sums[kProducts][kHeadDim / 8][4];
  float max[kProducts][2], weight[kProducts][2];  // maximum of scores * scale_log2

  /* Of those that have a tile. */
  __device__ __forceinline__ static int thread() {
    return thread_index() - kFirst * kWarpSize;
  }
  __device__ __forceinline__ static int first_row() {
    return thread() / kWarpSize * (16 * kProducts);
  }
  __device__ __forceinline__ static int row(int m, int half) {
    return first_row() + 16 * m + 8 * half + thread_index() % kWarpSize / 4;
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < kProducts; ++m) {
      max[m][0] = max[m][1] = minus_infinity();
      weight[m][0] = weight[m][1] = 0.0f;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[m][n][i] = 0.0f;
      }
    }
  }

  __device__ __forceinline__ void add_weights_of_lanes() {
#pragma unroll
    for (int m = 0; m < kProducts; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        weight[m][half] += __shfl_xor_sync(kAllLanes, weight[m][half], 1);
        weight[m][half] += __shfl_xor_sync(kAllLanes, weight[m][half], 2);
      }
    }
  }

  /* In an order that suits this block's threads alone. */
  __device__ __forceinline__ void store(const PrefillArguments& a, i64 slot) const {
    float4* const place = a.parts + slot * (kTileRows * kHeadDim / 4);
    float2* const stats = a.part_stats + slot * kTileRows;
#pragma unroll
    for (int m = 0; m < kProducts; ++m) {
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        const float(&x)[4] = sums[m][n];
        place[(m * (kHeadDim / 8) + n) * kThreads + thread()] =
            make_float4(x[0], x[1], x[2], x[3]);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (thread() % 4 == 0) {
          stats[row(m, half)] = make_float2(max[m][half], weight[m][half]);
        }
      }
    }
  }

  /* The sum of `count` parts; `slot(i)` is where part i lies. */
  template <typename Slot>
  __device__ __forceinline__ void add(const PrefillArguments& a, Slot slot, int count) {
    const float2* const stats = a.part_stats;
    clear();
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
#pragma unroll
      for (int m = 0; m < kProducts; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          max[m][half] =
              fmaxf(max[m][half], __ldcg(stats + slot(i) * kTileRows + row(m, half)).x);
        }
      }
    }
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      const float4* place = a.parts + slot(i) * (kTileRows * kHeadDim / 4);
#pragma unroll
      for (int m = 0; m < kProducts; ++m) {
        float by[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float2 stat = __ldcg(stats + slot(i) * kTileRows + row(m, half));
          by[half] = stat.x == minus_infinity() ? 0.0f : exp2_fast(stat.x - max[m][half]);
          weight[m][half] += stat.y * by[half];
        }
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
          const float4 x = __ldcg(place + (m * (kHeadDim / 8) + n) * kThreads + thread());
          sums[m][n][0] += x.x * by[0];
          sums[m][n][1] += x.y * by[0];
          sums[m][n][2] += x.z * by[1];
          sums[m][n][3] += x.w * by[1];
        }
      }
    }
  }
};

/* Of a whole tile, to the output. */
template <typename Part>
__device__ __forceinline__ void write(const PrefillArguments& a, const volatile Segment& segment,
                                      const Part& part) {
  const int num_rows =
      min(a.tile_tokens, segment.num_tokens - segment.first_token) * a.group_size;
  const int num_heads = a.num_kv_heads * a.group_size;
  const i64 first = static_cast<i64>(segment.token + segment.first_token) * num_heads +
                    segment.kv_head * a.group_size;
#pragma unroll
  for (int m = 0; m < Part::kProducts; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = Part::row(m, half);
      if (i >= num_rows) continue;
      const int token = a.token_of(i);
      const i64 head = first + token * num_heads + (i - token * a.group_size);
      u32* place = reinterpret_cast<u32*>(a.output + head * Part::kDims) + Part::thread() % 4;
      const float inverse = __fdividef(1.0f, part.weight[m][half]);
#pragma unroll
      for (int n = 0; n < Part::kDims / 8; ++n) {
        place[4 * n] = pack_bf16(part.sums[m][n][2 * half] * inverse,
                                 part.sums[m][n][2 * half + 1] * inverse);
      }
    }
  }
}

/* After this block's part of a shared tile was stored: the last to come here writes the tile. Not
 * inlined, so that its registers do not add to those of the loop over steps. */
template <typename Part, int kBarrier>
__device__ __noinline__ void combine(const PrefillArguments& a, const volatile Segment& segment) {
  const Shares shares{segment.shares.first, segment.shares.last};
  const bool is_first = Part::thread() == 0;
  const int group = blockIdx.x / kFanIn, num_groups = shares.num_groups();
  // A tile is the last one of the block that it begins in: of no other tile that is shared.
  int* tile_counter = a.counters + 1 + shares.first;
  int* counter = tile_counter;
  if (num_groups > 1) {
    // A group has two tiles at most that other groups share: one from before it, one beyond it.
    const int side = shares.first < group * kFanIn ? 0 : 1;
    counter = a.counters + 1 + gridDim.x + 2 * group + side;
  }
  if (!is_last_to_arrive<kBarrier, Part::kThreads>(counter, shares.num_in(group), is_first)) return;
  Part part;
  const int first_block = shares.first_of(group);
  part.add(
      a, [&](int i) { return shares.slot(first_block + i); },
      shares.num_in(group));
  if (num_groups > 1) {
    const i64 slot = shares.slot(first_block);
    sync_threads<kBarrier, Part::kThreads>();  // all have read what is written now
    part.store(a, slot);
    if (!is_last_to_arrive<kBarrier, Part::kThreads>(tile_counter, num_groups, is_first)) return;
    part.add(
        a, [&](int i) { return shares.slot(shares.first_of(shares.first / kFanIn + i)); },
        num_groups);
  }
  write(a, segment, part);
}

/* What follows the steps of a segment. */
template <int kBarrier, typename Part>
__device__ __forceinline__ void finish(const PrefillArguments& a, const volatile Segment& segment,
                                       Part& part) {
  part.add_weights_of_lanes();
  const Shares shares{segment.shares.first, segment.shares.last};
  if (shares.first == shares.last) {
    write(a, segment, part);
  } else {
    part.store(a, shares.slot(blockIdx.x));
    combine<Part, kBarrier>(a, segment);
  }
}

}  // namespace ember
