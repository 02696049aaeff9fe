/*
 * step: what surrounds the layers of a step, for state that stays on the device by slot.
 *
 * What       begin_step: block_table[slot, column] = block for each of the new blocks; and
 *            token_ids[r] = last_tokens[slots[r]] for each decode row
 *            end_step:   last_tokens[slots[n]] = max(drawn[n], 0) where slots[n] is not negative;
 *            and drawn as int32, to be copied to the host
 * Shapes     block_table [slots, width] int32, new_blocks [U, 3] int32, last_tokens [slots] int64,
 *            slots [R] or [N] int32, token_ids [T] int64, drawn [N] int64, output [N] int32
 * Types      whole numbers
 * Mapping    one thread per entry
 * Requires   contiguous tensors, distinct places; begin_step is launched so that nothing overlaps
 *            with it: it writes what later kernels of the step read before they wait (device.cuh)
 * Bound      launch latency
 * Tried      nothing else yet
 * Test       tests/kernels/test_begin_step.py, tests/kernels/test_end_step.py
 *            Bench  python -m benchmarks.steps
 * Source     the slots of a plan, docs/protocol.md
 */
#include "device.cuh"

namespace ember {

constexpr int kStepThreads = 128;

struct NewBlock {
  int slot, column, block;
};

__global__ void __launch_bounds__(kStepThreads)
    begin_step_kernel(int* block_table, const NewBlock* new_blocks, const i64* last_tokens,
                      const int* slots, i64* token_ids, int width, int num_new_blocks,
                      int num_decode_rows) {
  const int i = blockIdx.x * kStepThreads + threadIdx.x;
  wait_for_previous_kernel();
  if (i < num_new_blocks) {
    const NewBlock added = new_blocks[i];
    block_table[static_cast<i64>(added.slot) * width + added.column] = added.block;
  }
  if (i < num_decode_rows) token_ids[i] = last_tokens[slots[i]];
}

__global__ void __launch_bounds__(kStepThreads)
    end_step_kernel(const i64* drawn, const int* slots, i64* last_tokens, int* output,
                    int num_drawn) {
  const int i = blockIdx.x * kStepThreads + threadIdx.x;
  let_next_kernel_start();
  wait_for_previous_kernel();
  if (i >= num_drawn) return;
  const i64 token = drawn[i];
  const int slot = slots[i];
  output[i] = static_cast<int>(token);
  if (last_tokens != nullptr && slot >= 0) last_tokens[slot] = token < 0 ? 0 : token;
}

}  // namespace ember
