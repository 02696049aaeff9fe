/*
 * decode_tile: 16 positions of a row, multiplied by the query heads that share a KV head, and how
 * parts of a row are added.
 *
 * Layout     keys, values and weights lie in registers where m16n8k16 wants them; lane (g, t) =
 *            (lane / 4, lane % 4)
 * Source     own
 */
#pragma once

#include "attention.cuh"

namespace ember {

__device__ __forceinline__ uint4 load_streamed(const bf16* address) {
  uint4 word;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
               : "l"(address));
  return word;
}

/* Volatile: else the compiler reads once before the loop, and keeps what it read in registers. */
__device__ __forceinline__ uint4 load_shared(const uint4* place) {
  uint4 word;
  asm volatile("ld.volatile.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
               : "r"(static_cast<u32>(__cvta_generic_to_shared(place))));
  return word;
}

/* Of a thread. Divided as they are, not negative, which takes fewer instructions. */
__device__ __forceinline__ int lane_index() { return static_cast<u32>(thread_index()) % kWarpSize; }
__device__ __forceinline__ int warp_index() { return static_cast<u32>(thread_index()) / kWarpSize; }

/* Of lane (g, t). */
__device__ __forceinline__ int lane_group() { return static_cast<u32>(lane_index()) / 4; }
__device__ __forceinline__ int lane_in_group() { return static_cast<u32>(thread_index()) % 4; }

/* Over the 8 lanes with the same t. */
__device__ __forceinline__ float column_max(float x) {
#pragma unroll
  for (int offset = 4; offset < kWarpSize; offset *= 2) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset));
  }
  return x;
}
__device__ __forceinline__ float column_sum(float x) {
#pragma unroll
  for (int offset = 4; offset < kWarpSize; offset *= 2) {
    x += __shfl_xor_sync(kAllLanes, x, offset);
  }
  return x;
}

/* A warp's running result of its KV head. Lane (g, t) = (lane / 4, lane % 4) holds query heads
 * 2t and 2t + 1 of the group, dimensions 64c + 8g + 2j + {0, 1} in sums[4c + j]:
 * [dimension 0 head 0, 0 1, 1 0, 1 1]. */
template <int kHeadDim>
struct Part {
  float sums[kHeadDim / 16][4];
  float max[2], weight[2];

  __device__ __forceinline__ void clear() {
    max[0] = max[1] = minus_infinity();
    weight[0] = weight[1] = 0.0f;
#pragma unroll
    for (int m = 0; m < kHeadDim / 16; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[m][i] = 0.0f;
    }
  }

  /* Scores of a tile, as `KeyTile::multiply` gives them, become weights; what was summed before is
   * made to fit. A lane's `weight` is of its own positions until `finish`. */
  __device__ __forceinline__ void take(float (&scores)[4]) {
    float by[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float old_max = max[i];
      max[i] = fmaxf(old_max, column_max(fmaxf(scores[i], scores[2 + i])));
      by[i] = exp2_fast(old_max - max[i]);
      scores[i] = exp2_fast(scores[i] - max[i]);
      scores[2 + i] = exp2_fast(scores[2 + i] - max[i]);
      weight[i] = weight[i] * by[i] + (scores[i] + scores[2 + i]);
    }
#pragma unroll
    for (int m = 0; m < kHeadDim / 16; ++m) {
      sums[m][0] *= by[0];
      sums[m][1] *= by[1];
      sums[m][2] *= by[0];
      sums[m][3] *= by[1];
    }
  }

  __device__ __forceinline__ void finish() {
    weight[0] = column_sum(weight[0]);
    weight[1] = column_sum(weight[1]);
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

/* Keys of a tile: lane (g, t) has positions g and g + 8, dimensions 32c + 8t + 0 .. 7. */
template <int kHeadDim>
struct KeyTile {
  uint4 words[2][kHeadDim / 32];

  /* Positions beyond the context have scores that are thrown away, whatever is read here. */
  __device__ __forceinline__ void load(const bf16* tile, int row_stride) {
    const bf16* const row = tile + lane_group() * row_stride + 8 * lane_in_group();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int c = 0; c < kHeadDim / 32; ++c) {
        words[i][c] = load_streamed(row + 8 * i * row_stride + 32 * c);
      }
    }
  }

  /* The key of a position, [d], that is not in memory yet. */
  __device__ __forceinline__ void put(int position, const bf16* key) {
    const int g = lane_group(), t = lane_in_group();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (g + 8 * i != position) continue;
#pragma unroll
      for (int c = 0; c < kHeadDim / 32; ++c) {
        words[i][c] = *reinterpret_cast<const uint4*>(key + 32 * c + 8 * t);
      }
    }
  }

  /* Positions by query heads: lane (g, t) gets position g with heads 2t and 2t + 1, then position
   * g + 8. The order of dimensions within a sum is that of the loads, for keys as for queries. */
  __device__ __forceinline__ void multiply(const uint4* query, float (&scores)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[i] = 0.0f;
#pragma unroll
    for (int c = 0; c < kHeadDim / 32; ++c) {
      const uint4 q = load_shared(query + c * kWarpSize);
      const uint4 v = words[0][c], w = words[1][c];
      multiply_add(scores, v.x, w.x, v.y, w.y, q.x, q.y);
      multiply_add(scores, v.z, w.z, v.w, w.w, q.z, q.w);
    }
  }
};

/* Of an 8 by 8 matrix of bf16, lane (g, t) has elements 2t and 2t + 1 of row g; it gets those of
 * column g. */
__device__ __forceinline__ u32 transposed(u32 pair) {
  u32 result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

/* Values of a tile: lane (g, t) has positions 2t, 2t + 1, 2t + 8, 2t + 9, dimensions
 * 64c + 8g + 0 .. 7. */
template <int kHeadDim>
struct ValueTile {
  uint4 words[4][kHeadDim / 64];

  __device__ __forceinline__ void load(const bf16* tile, int row_stride) {
    const bf16* const row = tile + 2 * lane_in_group() * row_stride + 8 * lane_group();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int c = 0; c < kHeadDim / 64; ++c) {
        words[i][c] = load_streamed(row + ((i & 1) + (i & 2) * 4) * row_stride + 64 * c);
      }
    }
  }

  /* A weight of 0 does not undo a NaN: beyond the context, the last position is read again. */
  __device__ __forceinline__ void load_part(const bf16* tile, int row_stride, int num_valid) {
    const int g = lane_group(), t = lane_in_group();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int position = 2 * t + (i & 1) + (i & 2) * 4;
      const bf16* row = tile + min(position, num_valid - 1) * row_stride;
#pragma unroll
      for (int c = 0; c < kHeadDim / 64; ++c) words[i][c] = load_streamed(row + 64 * c + 8 * g);
    }
  }

  /* The value of the last position of a row, [d], that is not in memory yet; those behind it
   * become the same. */
  __device__ __forceinline__ void put_last(int position, const bf16* value) {
    const int g = lane_group(), t = lane_in_group();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (2 * t + (i & 1) + (i & 2) * 4 < position) continue;
#pragma unroll
      for (int c = 0; c < kHeadDim / 64; ++c) {
        words[i][c] = *reinterpret_cast<const uint4*>(value + 64 * c + 8 * g);
      }
    }
  }

  /* Weights of head g at positions 2t, 2t + 1, and at 2t + 8, 2t + 9. */
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

/* What the kSplits warps of a KV head do together, kVec dimensions of a query head each thread and
 * step: they add parts that lie in memory, each with the maximum and weight of its heads, up to
 * kGroup. */
template <int kHeadDim, int kSplits, int kGroup>
struct Merge {
  static constexpr int kThreads = kSplits * kWarpSize;
  static constexpr int kEach = kGroup * kHeadDim / kThreads;
  static constexpr int kVec = kEach < 2 ? 2 : kEach > 4 ? 4 : kEach;
  static constexpr int kSteps = (kGroup * kHeadDim / kVec + kThreads - 1) / kThreads;
  using Numbers = Pack<float, kVec>;
  Numbers sums[kSteps];
  float2 stats[kSteps];

  __device__ __forceinline__ static int head(int thread, int step) {
    return (thread + step * kThreads) / (kHeadDim / kVec);
  }

  /* `place(i)` is the row of part i's first head in `parts` [., d] and in `part_stats`. The
   * maximum first: after that no part waits for another. */
  template <bool kIsShared, int kUnroll, typename Place>
  __device__ __forceinline__ void add(const float* parts, const float2* part_stats, Place place,
                                      int count, int group_size, int thread) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      stats[step] = make_float2(minus_infinity(), 0.0f);
#pragma unroll
      for (int i = 0; i < kVec; ++i) sums[step].values[i] = 0.0f;
      if (head(thread, step) >= group_size) continue;
      const float2* const stats_of_head = part_stats + head(thread, step);
      const float* const sums_of_head = parts + (thread + step * kThreads) * kVec;
#pragma unroll kUnroll
      for (int i = 0; i < count; ++i) {
        const float* max = &stats_of_head[place(i)].x;
        stats[step].x = fmaxf(stats[step].x, kIsShared ? *max : __ldcg(max));
      }
#pragma unroll kUnroll
      for (int i = 0; i < count; ++i) {
        const auto first_head = place(i);
        const float2* stat = stats_of_head + first_head;
        Numbers sum;
        if constexpr (kIsShared) {
          sum.load(sums_of_head + first_head * kHeadDim);
        } else {
          using Word = typename Numbers::Word;
          const Word* word = reinterpret_cast<const Word*>(sums_of_head + first_head * kHeadDim);
          *reinterpret_cast<Word*>(sum.values) = __ldcg(word);
        }
        add_one(step, kIsShared ? *stat : __ldcg(stat), sum);
      }
    }
  }

  __device__ __forceinline__ void add_one(int step, float2 stat, const Numbers& sum) {
    const float by = exp2_fast(stat.x - stats[step].x);
    stats[step].y += stat.y * by;
#pragma unroll
    for (int i = 0; i < kVec; ++i) sums[step].values[i] += sum.values[i] * by;
  }

  __device__ __forceinline__ void store(float* place, float2* place_stats, int group_size,
                                        int thread) const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int element = thread + step * kThreads;
      if (head(thread, step) >= group_size) continue;
      sums[step].store(place + element * kVec);
      if (element % (kHeadDim / kVec) == 0) place_stats[head(thread, step)] = stats[step];
    }
  }

  __device__ __forceinline__ void write(bf16* output, int group_size, int thread) const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (head(thread, step) >= group_size) continue;
      const float inverse = __fdividef(1.0f, stats[step].y);
      u32* const words = reinterpret_cast<u32*>(output + (thread + step * kThreads) * kVec);
      u32 pairs[kVec / 2];
#pragma unroll
      for (int i = 0; i < kVec / 2; ++i) {
        pairs[i] = pack_bf16(sums[step].values[2 * i] * inverse,
                             sums[step].values[2 * i + 1] * inverse);
      }
      if constexpr (kVec == 2) {
        words[0] = pairs[0];
      } else {
        *reinterpret_cast<uint2*>(words) = make_uint2(pairs[0], pairs[1]);
      }
    }
  }
};

}  // namespace ember
