/*
 * handoff: both ends of an edge between two stages, as far as kernels do them.
 *
 * What       send_slot: copies a message into a slot of the receiver, then its tag, then raises
 *            the slot's ready flag there
 *            take_slot: compares a slot's tag, copies its message out, then raises the slot's free
 *            flag at the sender
 *            take_pairs: the same for a message of pairs (index, value): target[index] = value
 *            write_time: the card's time, into memory of the host
 * Shapes     a message is num_words words in a row; a tag is (plan, num_tokens)
 * Types      words of 16, 8, 4 or 2 bytes: nothing is computed
 * Mapping    a grid over the words. Each thread block makes its stores visible to the system and
 *            counts itself; the last one raises the flag and leaves the count at 0
 * Requires   the stream has waited for the flag that lets the slot be written or read. Slots, tags
 *            and flags may be memory of another card or process
 * Memory     read once, written once. Flags carry a number that only rises, so that one is waited
 *            for as "no less than". Times and faults go to pinned memory of the host
 * Bound      launch latency; for large messages the link
 * Tried      the copy engine (python -m benchmarks.handoff --parts copy): slower up to 8 MiB, as fast
 *            from 32 MiB on, on one card and between two
 * Test       tests/gpu/test_cuda_ipc.py, tests/stage/test_cuda_ipc.py
 *            Bench  python -m benchmarks.handoff
 * Source     docs/structure.md, The hand-off
 */
#include "device.cuh"

namespace ember {

constexpr int kHandoffThreads = 256;
constexpr int kWordsPerThread = 4;

template <typename Word>
__device__ __forceinline__ void copy_words(const Word* from, Word* to, i64 num_words) {
  const i64 stride = static_cast<i64>(gridDim.x) * kHandoffThreads * kWordsPerThread;
  for (i64 first = blockIdx.x * (kHandoffThreads * kWordsPerThread) + threadIdx.x;
       first < num_words; first += stride) {
    Word words[kWordsPerThread];
#pragma unroll
    for (int i = 0; i < kWordsPerThread; ++i) {
      const i64 index = first + i * kHandoffThreads;
      if (index < num_words) words[i] = from[index];
    }
#pragma unroll
    for (int i = 0; i < kWordsPerThread; ++i) {
      const i64 index = first + i * kHandoffThreads;
      if (index < num_words) to[index] = words[i];
    }
  }
}

/* True in one thread of the grid, once the stores of all its thread blocks are visible. */
__device__ __forceinline__ bool is_last_to_arrive(u32* num_arrived) {
  __syncthreads();
  if (threadIdx.x != 0) return false;
  __threadfence_system();
  if (gridDim.x > 1) {
    if (atomicAdd(num_arrived, 1u) != gridDim.x - 1) return false;
    *num_arrived = 0;
    __threadfence_system();
  }
  return true;
}

/* `free_time`, if any: when the slot was free; `sent_time`: when the message was in it. */
template <typename Word>
__global__ void __launch_bounds__(kHandoffThreads)
    send_slot_kernel(const Word* message, Word* slot, i64 num_words, i64* tag, i64 plan,
                     i64 num_tokens, u32* ready, u32 value, u32* num_arrived, i64* free_time,
                     i64* sent_time) {
  wait_for_previous_kernel();
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    if (free_time != nullptr) store_seen(free_time, card_time());
    tag[0] = plan;
    tag[1] = num_tokens;
  }
  copy_words(message, slot, num_words);
  if (is_last_to_arrive(num_arrived)) {
    if (sent_time != nullptr) store_seen(sent_time, card_time());
    store_seen(ready, value);
  }
}

/* Of the first tag that is another, `fault` becomes what was expected, what was found, then 1. */
__device__ __forceinline__ void compare_tag(const i64* tag, i64 plan, i64 num_tokens, i64* fault) {
  if ((tag[0] == plan && tag[1] == num_tokens) || fault[4] != 0) return;
  store_seen(fault, plan);
  store_seen(fault + 1, num_tokens);
  store_seen(fault + 2, tag[0]);
  store_seen(fault + 3, tag[1]);
  __threadfence_system();
  store_seen(fault + 4, 1);
}

/* `time`, if any: when the message was there. */
template <typename Word>
__global__ void __launch_bounds__(kHandoffThreads)
    take_slot_kernel(const Word* slot, Word* output, i64 num_words, const i64* tag, i64 plan,
                     i64 num_tokens, u32* free_flag, u32 value, u32* num_arrived, i64* time,
                     i64* fault) {
  wait_for_previous_kernel();
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    if (time != nullptr) store_seen(time, card_time());
    compare_tag(tag, plan, num_tokens, fault);
  }
  copy_words(slot, output, num_words);
  if (is_last_to_arrive(num_arrived)) store_seen(free_flag, value);
}

/* One thread block. An index outside [0, num_targets) is passed over. */
__global__ void __launch_bounds__(kHandoffThreads)
    take_pairs_kernel(const int2* slot, i64* target, i64 num_targets, const i64* tag, i64 plan,
                      i64 num_tokens, u32* free_flag, u32 value, i64* time, i64* fault) {
  wait_for_previous_kernel();
  if (threadIdx.x == 0) {
    if (time != nullptr) store_seen(time, card_time());
    compare_tag(tag, plan, num_tokens, fault);
  }
  for (i64 n = threadIdx.x; n < num_tokens; n += kHandoffThreads) {
    const int2 pair = slot[n];
    if (pair.x >= 0 && pair.x < num_targets) target[pair.x] = pair.y;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence_system();
    store_seen(free_flag, value);
  }
}

__global__ void __launch_bounds__(kWarpSize) write_time_kernel(i64* time) {
  wait_for_previous_kernel();
  if (threadIdx.x == 0) store_seen(time, card_time());
}

}  // namespace ember
