/*
 * embedding: the rows of a batch of tokens, copied from the table.
 *
 * What       output[t] = weight[token_ids[t]]
 * Shapes     token_ids [T] int64, each in [0, V); weight [V, D]; output [T, D]
 * Types      any of 2 or 4 bytes; no arithmetic. A row is moved as row_words words of the widest
 *            type (16, 8, 4 or 2 bytes) that divides its size and its address
 * Mapping    grid = (T, ceil(row_words / 256)), 256 threads, a word each
 * Bound      memory: 2 * T * D * sizeof(T) bytes and 8 * T; at decode sizes launch latency
 * Tried      nothing else yet
 * Test       tests/kernels/test_embedding.py      Bench  python -m benchmarks.kernels
 * Source     own
 */
#include "device.cuh"

namespace ember {

constexpr int kEmbeddingThreads = 256;

template <typename Word>
__global__ void __launch_bounds__(kEmbeddingThreads)
    embedding_kernel(const i64* token_ids, const Word* weight, Word* output, int row_words) {
  const int word = blockIdx.y * kEmbeddingThreads + threadIdx.x;
  let_next_kernel_start();
  wait_for_previous_kernel();
  if (word >= row_words) return;
  const i64 row = token_ids[blockIdx.x];
  output[static_cast<i64>(blockIdx.x) * row_words + word] = weight[row * row_words + word];
}

}  // namespace ember
