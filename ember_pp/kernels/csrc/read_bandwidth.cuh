/*
 * read_bandwidth: reads memory and nothing else. What other kernels' bytes are measured against.
 *
 * What       sums the words of `data`; the sum is written only if it equals `never`, so that the
 *            compiler keeps the reads
 * Shapes     data [num_words] of 16 bytes; output [1] int32
 * Mapping    a persistent grid, 512 threads, 8 words in flight per thread
 * Bound      memory: 16 * num_words bytes read
 * Tried      nothing else yet
 * Test       tests/kernels/test_launch.py         Bench  python -m benchmarks.kernels
 * Source     own
 */
#include "device.cuh"

namespace ember {

constexpr int kReadThreads = 512;
constexpr int kReadsInFlight = 8;

__device__ __forceinline__ uint4 read(const uint4* address) {
  uint4 word;  // volatile: all reads are under way before the first is used
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
               : "l"(address));
  return word;
}

__global__ void __launch_bounds__(kReadThreads)
    read_bandwidth_kernel(const uint4* data, i64 num_words, u32 never, u32* output) {
  const i64 stride = static_cast<i64>(gridDim.x) * kReadThreads;
  i64 word = static_cast<i64>(blockIdx.x) * kReadThreads + threadIdx.x;
  u32 sum = 0;
  for (; word + (kReadsInFlight - 1) * stride < num_words; word += kReadsInFlight * stride) {
    uint4 words[kReadsInFlight];
#pragma unroll
    for (int i = 0; i < kReadsInFlight; ++i) words[i] = read(data + word + i * stride);
#pragma unroll
    for (int i = 0; i < kReadsInFlight; ++i) {
      sum += words[i].x + words[i].y + words[i].z + words[i].w;
    }
  }
  for (; word < num_words; word += stride) sum += data[word].x;
  if (sum == never) *output = sum;
}

}  // namespace ember
