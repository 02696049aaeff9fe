/*
 * rms_norm, add_rms_norm: RMSNorm of each token, with or without a residual added first.
 *
 * What       kAdds: sum = round(input + residual), else sum = input
 *            normed = round(round(sum / sqrt(mean(sum^2) + eps)) * weight)
 * Shapes     input, residual, normed, sum_out [T, D]; weight [D]; all contiguous
 * Types      bf16, fp32; squares and mean in fp32. round() is to the element type: the sum is
 *            rounded before the norm reads it, as it is at an edge between two stages
 * Mapping    one thread block per token; a thread holds kPacks packs of kPack elements, which it
 *            reads once. Weights are read before the wait for the previous kernel
 * Requires   D % kPack == 0, addresses multiples of a pack, D / kPack <= kPacks * block size
 * Bound      memory: (2 + 2 * kAdds) * T * D * sizeof(T) bytes; at decode sizes latency
 * Tried      nothing else yet
 * Test       tests/kernels/test_rms_norm.py, test_add_rms_norm.py
 * Bench      python -m benchmarks.kernels
 * Source     Zhang and Sennrich, NeurIPS 2019; the order of rounding is that of transformers
 */
#include "device.cuh"

namespace ember {

constexpr int kRmsNormMaxThreads = 512;

template <typename Element, int kPack, int kPacks, bool kAdds>
__global__ void __launch_bounds__(kRmsNormMaxThreads)
    rms_norm_kernel(const Element* input, const Element* residual, const Element* weight,
                    Element* normed, Element* sum_out, int width, float eps) {
  const int num_packs = width / kPack;
  const i64 row = static_cast<i64>(blockIdx.x) * width;
  Pack<Element, kPack> weights[kPacks], sums[kPacks];
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    const int pack = threadIdx.x + j * blockDim.x;
    if (pack < num_packs) weights[j].load(weight + pack * kPack);
  }
  let_next_kernel_start();
  wait_for_previous_kernel();

  float squares = 0.0f;
#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    const int pack = threadIdx.x + j * blockDim.x;
    if (pack >= num_packs) continue;
    sums[j].load(input + row + pack * kPack);
    if constexpr (kAdds) {
      Pack<Element, kPack> added;
      added.load(residual + row + pack * kPack);
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        const float sum = to_float(sums[j].values[i]) + to_float(added.values[i]);
        sums[j].values[i] = from_float<Element>(sum);
      }
      sums[j].store(sum_out + row + pack * kPack);
    }
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const float value = to_float(sums[j].values[i]);
      squares += value * value;
    }
  }
  const float inverse_rms = rsqrtf(block_sum(squares) / width + eps);

#pragma unroll
  for (int j = 0; j < kPacks; ++j) {
    const int pack = threadIdx.x + j * blockDim.x;
    if (pack >= num_packs) continue;
    Pack<Element, kPack> result;
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const float value = rounded_to<Element>(to_float(sums[j].values[i]) * inverse_rms);
      result.values[i] = from_float<Element>(value * to_float(weights[j].values[i]));
    }
    result.store(normed + row + pack * kPack);
  }
}

}  // namespace ember
