/*
 * swiglu: silu of the first half of each row times the second half.
 *
 * What       output[t, i] = round(round(silu(gate_up[t, i])) * gate_up[t, I + i])
 * Shapes     gate_up [T, 2I], output [T, I]; contiguous
 * Types      bf16, fp32; silu in fp32, rounded to the element type as transformers does
 * Mapping    grid = (T, ceil(I / (256 * kPack))), 256 threads, a pack of kPack elements each
 * Requires   I % kPack == 0, addresses multiples of a pack
 * Bound      memory: 3 * T * I * sizeof(T) bytes; at decode sizes launch latency
 * Tried      nothing else yet
 * Test       tests/kernels/test_swiglu.py         Bench  python -m benchmarks.kernels
 * Source     Shazeer, 2020
 */
#include "device.cuh"

namespace ember {

constexpr int kSwigluThreads = 256;

template <typename Element, int kPack>
__global__ void __launch_bounds__(kSwigluThreads)
    swiglu_kernel(const Element* gate_up, Element* output, int width) {
  const int column = (blockIdx.y * kSwigluThreads + threadIdx.x) * kPack;
  let_next_kernel_start();
  wait_for_previous_kernel();
  if (column >= width) return;
  const i64 row = blockIdx.x;
  Pack<Element, kPack> gate, up;
  gate.load(gate_up + row * 2 * width + column);
  up.load(gate_up + (row * 2 + 1) * width + column);
#pragma unroll
  for (int i = 0; i < kPack; ++i) {
    const float x = to_float(gate.values[i]);
    const float silu = rounded_to<Element>(x / (1.0f + expf(-x)));
    gate.values[i] = from_float<Element>(silu * to_float(up.values[i]));
  }
  gate.store(output + row * width + column);
}

}  // namespace ember
