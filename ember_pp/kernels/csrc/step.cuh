/*
 * step: what surrounds the layers of a step, for state that stays on the device by slot.
 *
 * What       begin_step: takes new blocks into the block table, and expands the rows of a plan to
 *            the inputs of its tokens, rows and draws, with padding behind them
 *            end_step: last_tokens[slots[n]] = max(drawn[n], 0) where slots[n] is not negative;
 *            what was drawn, as int32, on the device and in memory of the host, then a mark there;
 *            pairs (slots[n], max(drawn[n], 0)) for the first stage
 *            leave_stage: output = residual + added, rounded
 *            all three write the time, as words of the plan's record in memory of the host
 * Shapes     words: 4 per row, 3 per new block, then the token ids of chunks; see
 *            ember_pp/kernels/step_state.py for these and all others
 * Types      whole numbers; leave_stage: fp32 or bf16, added in fp32
 * Mapping    one thread block each; leave_stage a grid over the elements. begin_step: a thread per row, with sums over the rows before
 *            it, then a thread per token, which finds its row by halving
 * Requires   begin_step is launched so that nothing overlaps with it: it writes what later kernels
 *            of the step read before they wait (device.cuh)
 * Memory     words and results are pinned memory of the host, read and written over the bus: a
 *            copy would cost more than it moves. The mark is written after the tokens are visible
 * Bound      launch latency; for many tokens, loads that depend on each other
 * Tried      copying packed inputs of all rows and tokens: 15 operations of the host for each plan
 * Test       tests/kernels/test_begin_step.py, tests/kernels/test_end_step.py,
 *            tests/kernels/test_leave_stage.py
 *            Bench  python -m benchmarks.steps
 * Source     the rows of a plan, docs/protocol.md
 */
#include "device.cuh"

namespace ember {

constexpr int kBeginThreads = 1024;
constexpr int kEndThreads = 256;
constexpr int kLeaveThreads = 256;

/* Words of a plan's record: PlanTimes in ember_pp/stage/timing.py. */
constexpr int kRecordWords = 8;
constexpr int kBegan = 2, kInputWait = 3, kOutputWait = 5;

struct PlanWords {
  const int* words;
  i64 mark;
  int num_rows, num_decodes, decode_offset, num_new_blocks, num_tokens, padded_tokens, turn;
};

struct StepState {
  int* block_table;
  const i64* last_tokens;
  i64* token_ids;
  i64* positions;
  i64* slot_mapping;
  int* slots;
  int* context_lens;
  int* decode_lens;
  int* cu_seqlens_q;
  i64* sample_rows;
  int* sample_slots;
  i64* sample_positions;
  i64* turn_and_mark;
  i64* records;
  int table_width, max_rows, block_size;
};

/* Memory of the host may change between launches: never from a cache. */
__device__ __forceinline__ int load_word(const int* address) {
  int word;
  asm volatile("ld.volatile.global.s32 %0, [%1];" : "=r"(word) : "l"(address));
  return word;
}

/* Inclusive sums over the threads of a full thread block, of two numbers at once. */
__device__ __forceinline__ int2 inclusive_sums(int2 x, int2* warp_sums) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int a = __shfl_up_sync(kAllLanes, x.x, offset);
    const int b = __shfl_up_sync(kAllLanes, x.y, offset);
    if (lane >= offset) {
      x.x += a;
      x.y += b;
    }
  }
  __syncthreads();  // the sums before have been read
  if (lane == kWarpSize - 1) warp_sums[warp] = x;
  __syncthreads();
  for (int i = 0; i < warp; ++i) {
    x.x += warp_sums[i].x;
    x.y += warp_sums[i].y;
  }
  return x;
}

__device__ __forceinline__ void expand_rows(const PlanWords& plan, const StepState& step) {
  __shared__ int2 warp_sums[kBeginThreads / kWarpSize];
  __shared__ int2 before;  // tokens and draws of the rows of earlier rounds
  if (threadIdx.x == 0) {
    before = make_int2(0, 0);
    step.cu_seqlens_q[0] = 0;
  }
  for (int first = 0; first < step.max_rows; first += kBeginThreads) {
    const int row = first + threadIdx.x;
    int slot = 0, start = 0, length = 0, samples = 0;
    if (row < plan.num_rows) {
      const int* words = plan.words + 4 * row;
      slot = load_word(words);
      start = load_word(words + 1) + (row < plan.num_decodes ? plan.decode_offset : 0);
      length = load_word(words + 2);
      samples = load_word(words + 3) != 0;
    }
    const int2 sums = inclusive_sums(make_int2(length, samples), warp_sums);
    const int end = before.x + sums.x, num_samples = before.y + sums.y;
    __syncthreads();
    if (threadIdx.x == kBeginThreads - 1) before = make_int2(end, num_samples);
    if (row < step.max_rows) {
      step.slots[row] = slot;
      step.context_lens[row] = start + length;
      step.decode_lens[row] = length == 1 ? start + 1 : 0;
      step.cu_seqlens_q[row + 1] = end;
      if (samples) {
        step.sample_rows[num_samples - 1] = end - 1;
        step.sample_slots[num_samples - 1] = slot;
        step.sample_positions[num_samples - 1] = start + length;
      }
    }
    __syncthreads();
  }
  for (int n = before.y + threadIdx.x; n < step.max_rows; n += kBeginThreads) {
    step.sample_rows[n] = 0;
    step.sample_slots[n] = -1;
    step.sample_positions[n] = 0;
  }
}

/* The last row that begins at or before a token. */
__device__ __forceinline__ int row_of(int token, const int* starts, int low, int high) {
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (starts[middle] <= token) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

__global__ void __launch_bounds__(kBeginThreads)
    begin_step_kernel(PlanWords plan, StepState step) {
  wait_for_previous_kernel();
  i64* const record = step.records + plan.turn * kRecordWords;
  if (threadIdx.x == 0) store_seen(record + kBegan, card_time());
  const int* new_blocks = plan.words + 4 * plan.num_rows;
  for (int i = threadIdx.x; i < plan.num_new_blocks; i += kBeginThreads) {
    const int slot = load_word(new_blocks + 3 * i), column = load_word(new_blocks + 3 * i + 1);
    step.block_table[static_cast<i64>(slot) * step.table_width + column] =
        load_word(new_blocks + 3 * i + 2);
  }
  if (threadIdx.x == 0) {
    step.turn_and_mark[0] = plan.turn;
    step.turn_and_mark[1] = plan.mark;
  }
  expand_rows(plan, step);
  __syncthreads();
  const int* chunk_ids = new_blocks + 3 * plan.num_new_blocks;
  for (int t = threadIdx.x; t < plan.padded_tokens; t += kBeginThreads) {
    i64 token_id = 0, position = 0, mapped = -1;
    if (t < plan.num_tokens) {
      const bool is_decode = t < plan.num_decodes;
      const int row =
          is_decode ? t : row_of(t, step.cu_seqlens_q, plan.num_decodes, plan.num_rows);
      const int slot = step.slots[row];
      const int place = step.context_lens[row] - (step.cu_seqlens_q[row + 1] - t);
      const int block = step.block_table[static_cast<i64>(slot) * step.table_width +
                                         place / step.block_size];
      position = place;
      mapped = static_cast<i64>(block) * step.block_size + place % step.block_size;
      if (!is_decode) {
        token_id = load_word(chunk_ids + t - plan.num_decodes);
      } else if (step.last_tokens != nullptr) {
        token_id = step.last_tokens[slot];
      }
    }
    step.token_ids[t] = token_id;
    step.positions[t] = position;
    step.slot_mapping[t] = mapped;
  }
  __syncthreads();
  if (threadIdx.x == 0) store_seen(record + kInputWait, card_time());
}

/* `results` has a row of `row_words` words for each turn, an even number. */
__global__ void __launch_bounds__(kEndThreads)
    end_step_kernel(const i64* drawn, const int* slots, i64* last_tokens, int* output,
                    int2* pairs, const i64* turn_and_mark, int* results, i64* records,
                    int num_drawn, int row_words) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  int* const result = results + turn_and_mark[0] * row_words;
  for (int n = threadIdx.x; n < num_drawn; n += kEndThreads) {
    const i64 token = drawn[n];
    const int slot = slots[n];
    output[n] = static_cast<int>(token);
    result[2 + n] = static_cast<int>(token);
    if (last_tokens != nullptr && slot >= 0) last_tokens[slot] = token < 0 ? 0 : token;
    pairs[n] = make_int2(slot, token < 0 ? 0 : static_cast<int>(token));
  }
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x == 0) {
    store_seen(records + turn_and_mark[0] * kRecordWords + kOutputWait, card_time());
    asm volatile("st.volatile.global.v2.s32 [%0], {%1, %2};" ::"l"(result),
                 "r"(static_cast<int>(turn_and_mark[1])),
                 "r"(static_cast<int>(turn_and_mark[1] >> 32))
                 : "memory");
  }
}

/* `added` may be null: then a copy. */
template <typename Element, int kCount>
__global__ void __launch_bounds__(kLeaveThreads)
    leave_stage_kernel(const Element* residual, const Element* added, Element* output,
                       const i64* turn_and_mark, i64* records, i64 num_packs) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const i64 stride = static_cast<i64>(gridDim.x) * kLeaveThreads;
  for (i64 pack = blockIdx.x * kLeaveThreads + threadIdx.x; pack < num_packs; pack += stride) {
    Pack<Element, kCount> sum, other;
    sum.load(residual + pack * kCount);
    if (added != nullptr) {
      other.load(added + pack * kCount);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        sum.values[i] =
            from_float<Element>(to_float(sum.values[i]) + to_float(other.values[i]));
      }
    }
    sum.store(output + pack * kCount);
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    store_seen(records + turn_and_mark[0] * kRecordWords + kOutputWait, card_time());
  }
}

}  // namespace ember
