/*
 * qk_norm_rope_store_kv: from the fused QKV projection to queries, and to keys and values that
 * lie in the paged cache.
 *
 * What       x = round(qkv + bias) where kHasBias; of each head:
 *            query, key: where kHasNorm, x = round(round(x / sqrt(mean(x^2) + eps)) * weight);
 *                        then x = round(x * cos + rotate_half(x) * sin)
 *            query goes to query_out[t]; key and value go to slot slots[t] of the caches, unless
 *            it is negative
 * Shapes     qkv [T, (H + 2K) * d] query heads, key heads, value heads; bias [(H + 2K) * d];
 *            norm_weight [H + K, d]; rope_table [P, d] fp32, d / 2 cosines then d / 2 sines of
 *            each position; positions, slots [T] int64; query_out [T, H, d];
 *            k_cache, v_cache [B, S, K, d]. All contiguous
 * Types      bf16, fp32; norm and rotation in fp32, rounded where round() stands
 * Mapping    grid = (T, ceil((H + 2K) / heads per block)), 128 threads; kLanes lanes per head. A
 *            lane holds kPack elements of the first half of its head and the kPack elements of
 *            the second half that rotate with them, so nothing but the sum of squares crosses
 *            lanes
 * Requires   (d / 2) % kPack == 0, d / 2 <= 32 * kPack, addresses multiples of a pack
 * Bound      memory: 2 * T * (H + 2K) * d * sizeof(T) bytes; at decode sizes latency
 * Tried      nothing else yet
 * Test       tests/kernels/test_qk_norm_rope_store_kv.py    Bench  python -m benchmarks.kernels
 * Source     Su et al., 2021, in the two-halves layout of Hugging Face checkpoints; slots: Kwon
 *            et al., SOSP 2023
 */
#include "device.cuh"

namespace ember {

constexpr int kRopeThreads = 128;

template <typename Element, int kPack>
struct HeadHalves {
  float first[kPack], second[kPack];

  __device__ __forceinline__ void load(const Element* head, int half) {
    Pack<Element, kPack> a, b;
    a.load(head);
    b.load(head + half);
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      first[i] = to_float(a.values[i]);
      second[i] = to_float(b.values[i]);
    }
  }

  __device__ __forceinline__ void store(Element* head, int half) const {
    Pack<Element, kPack> a, b;
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      a.values[i] = from_float<Element>(first[i]);
      b.values[i] = from_float<Element>(second[i]);
    }
    a.store(head);
    b.store(head + half);
  }

  __device__ __forceinline__ void add(const HeadHalves& other) {
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      first[i] = rounded_to<Element>(first[i] + other.first[i]);
      second[i] = rounded_to<Element>(second[i] + other.second[i]);
    }
  }

  __device__ __forceinline__ float squares() const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPack; ++i) sum += first[i] * first[i] + second[i] * second[i];
    return sum;
  }

  __device__ __forceinline__ void norm(const HeadHalves& weight, float inverse_rms) {
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      first[i] = rounded_to<Element>(rounded_to<Element>(first[i] * inverse_rms) *
                                     weight.first[i]);
      second[i] = rounded_to<Element>(rounded_to<Element>(second[i] * inverse_rms) *
                                      weight.second[i]);
    }
  }

  __device__ __forceinline__ void rotate(const float* cos, const float* sin) {
    Pack<float, (kPack < 4 ? kPack : 4)> c, s;
    constexpr int kWide = kPack < 4 ? kPack : 4;
#pragma unroll
    for (int i = 0; i < kPack; i += kWide) {
      c.load(cos + i);
      s.load(sin + i);
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
        const float a = first[i + j], b = second[i + j];
        first[i + j] = a * c.values[j] - b * s.values[j];
        second[i + j] = b * c.values[j] + a * s.values[j];
      }
    }
  }
};

__device__ constexpr int next_power_of_two(int n) {
  return n <= 1 ? 1 : 2 * next_power_of_two((n + 1) / 2);
}

template <typename Element, int kHeadDim, int kPack, bool kHasNorm, bool kHasBias>
__global__ void __launch_bounds__(kRopeThreads)
    qk_norm_rope_store_kv_kernel(const Element* qkv, const Element* bias,
                                 const Element* norm_weight, const float* rope_table,
                                 const i64* positions, const i64* slots, Element* query_out,
                                 Element* k_cache, Element* v_cache, int num_heads,
                                 int num_kv_heads, float eps) {
  constexpr int kHalf = kHeadDim / 2;
  constexpr int kLanes = next_power_of_two(kHalf / kPack);
  static_assert(kHalf % kPack == 0 && kLanes <= kWarpSize, "see Requires");
  const i64 token = blockIdx.x;
  const int head = blockIdx.y * (kRopeThreads / kLanes) + threadIdx.x / kLanes;
  const int offset = threadIdx.x % kLanes * kPack;  // of this lane, in each half
  const int num_turned = num_heads + num_kv_heads;
  const bool is_active = head < num_turned + num_kv_heads && offset < kHalf;
  const bool is_turned = is_active && head < num_turned;

  using Halves = HeadHalves<Element, kPack>;
  Halves x = {}, weight, added;
  if (kHasNorm && is_turned) weight.load(norm_weight + head * kHeadDim + offset, kHalf);
  if (kHasBias && is_active) added.load(bias + head * kHeadDim + offset, kHalf);
  const float* cos = rope_table + positions[token] * kHeadDim + offset;
  const i64 slot = slots[token];
  let_next_kernel_start();
  wait_for_previous_kernel();

  if (is_active) {
    x.load(qkv + (token * (num_turned + num_kv_heads) + head) * kHeadDim + offset, kHalf);
    if constexpr (kHasBias) x.add(added);
  }
  if constexpr (kHasNorm) {
    const float mean = lane_sum<kLanes>(x.squares()) / kHeadDim;
    if (is_turned) x.norm(weight, rsqrtf(mean + eps));
  }
  if (is_turned) x.rotate(cos, cos + kHalf);
  if (!is_active) return;
  if (head < num_heads) {
    x.store(query_out + (token * num_heads + head) * kHeadDim + offset, kHalf);
  } else if (slot >= 0) {
    const bool is_key = head < num_turned;
    const int kv_head = head - (is_key ? num_heads : num_turned);
    Element* cache = is_key ? k_cache : v_cache;
    x.store(cache + (slot * num_kv_heads + kv_head) * kHeadDim + offset, kHalf);
  }
}

}  // namespace ember
