/*
 * top_logprobs: log-probabilities of the drawn and of the most likely tokens of each row.
 *
 * What       drawn[r] = x[token_ids[r]] - max - log(sum exp(x - max)); ids, logprobs: the same of
 *            the num_top largest x, largest first, ties to the lowest id
 * Shapes     logits [N, V]; token_ids [N] int64, a negative one counts as 0; drawn [N] fp32;
 *            ids [N, num_top] int64; logprobs [N, num_top] fp32; num_top <= 20, <= V
 * Types      bf16, fp32; exponentials added 8 by 8 in fp32, then as whole numbers in steps of
 *            2^-40, so the sum depends on no order
 * Mapping    a cluster of thread blocks per row (see row_cluster.cuh), one read of memory. Each
 *            thread knows its largest token. num_top times the block takes the largest of these,
 *            whose thread looks for its next one; the row's first block then ranks what all found
 * Requires   grid N * kBlocks, 256 threads; shared memory of a slice if it is kept
 * Bound      memory: N * V * sizeof(Element) bytes
 * Tried      nothing else yet
 * Test       tests/kernels/test_top_logprobs.py          Bench  python -m benchmarks.kernels
 * Source     own
 */
#include "row_cluster.cuh"

namespace ember {

constexpr int kMostTop = 20;

template <typename Element, int kBlocks, bool kResident>
__global__ void
#if __CUDA_ARCH__ >= 900
__cluster_dims__(kBlocks, 1, 1)
#endif
    __launch_bounds__(kRowThreads, 4)
        top_logprobs_kernel(const Element* logits, const i64* token_ids, float* drawn, i64* ids,
                            float* logprobs, int vocab_size, int num_top) {
  extern __shared__ uint4 kept[];
  __shared__ RowMail<kBlocks, 1> mail;
  __shared__ u64 found[kBlocks * kMostTop], found_barrier;  // of the row's first block
  __shared__ u64 places[2][kRowWarps];
  const i64 row = blockIdx.x / kBlocks;
  const int rank = blockIdx.x % kBlocks;
  RowExchange<kBlocks, 1> exchange(mail);
  if (threadIdx.x == 0) init_barrier(&found_barrier);
  exchange.open();
  let_next_kernel_start();
  wait_for_previous_kernel();
  const RowSlice<Element, kBlocks, kResident> slice(logits, row, vocab_size, kept);
  slice.begin_load(&mail.load_barrier);
  const float largest = slice.load_max(&mail.load_barrier);
  u64 own = ranked(largest, slice.first_of(largest));
  exchange.wait_open();
  exchange.post(warp_max(own));
  exchange.wait();
  const float max = value_of(exchange.max(0));
  exchange.post(warp_sum(slice.sum_of_exponentials(max, kLog2e)));

  const auto largest_below = [&](u64 limit) {
    u64 best = 0;
    for (int i = threadIdx.x; i < slice.num_packs; i += kRowThreads) {
      const RowPack<Element> pack = slice.get(i);
#pragma unroll
      for (int j = 0; j < kPackTokens; ++j) {
        const int token = slice.token(i) + j;
        const u64 candidate = ranked(pack.value(j), token);
        if (candidate < limit && candidate > best && token < vocab_size) best = candidate;
      }
    }
    return best;
  };
  if (!(largest > minus_infinite())) own = largest_below(~0ull);
  for (int i = 0; i < num_top; ++i) {
    const u64 best = block_max(own, places[i % 2]);
    if (threadIdx.x == 0) {
      send_to_block<kBlocks>(found + rank * num_top + i, &found_barrier, 0, best);
    }
    if (own == best && best) own = largest_below(best);
  }
  exchange.wait();
  if (rank != 0) return;

  await_bytes<kBlocks>(&found_barrier, kBlocks * num_top * sizeof(u64));
  const u64 total = exchange.sum(0);
  const float log_sum = logf(static_cast<float>(total) / kWeightScale);
  const int num_found = kBlocks * num_top;
  for (int i = threadIdx.x; i < num_found; i += kRowThreads) {
    int place = 0;
    for (int j = 0; j < num_found; ++j) place += found[j] > found[i];
    if (place >= num_top || !found[i]) continue;
    ids[row * num_top + place] = token_of(found[i]);
    logprobs[row * num_top + place] = value_of(found[i]) - max - log_sum;
  }
  if (threadIdx.x == 0) {
    const i64 token = token_ids[row] > 0 ? token_ids[row] : 0;
    drawn[row] = to_float(logits[row * vocab_size + token]) - max - log_sum;
  }
}

}  // namespace ember
