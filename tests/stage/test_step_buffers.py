"""StepBuffers: what a step finds on the device, and that nothing of the step before is left."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ember_pp.protocol import Execute, OpenSlot, pack_i32, pack_u32
from ember_pp.stage.input_batch import BatchInputs, SlotTable
from ember_pp.stage.step_buffers import StepBuffers

BLOCK_SIZE, MAX_SLOTS, MAX_TOKENS = 4, 6, 32
DEVICES = ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)]


def execute(plan: int, *, opened=(), blocks=(), join=(), leave=(), chunks=(), ids=()) -> Execute:
    return Execute(
        epoch=0,
        plan=plan,
        microbatch=0,
        leave=pack_u32(leave),
        open=[OpenSlot(slot, 0, {}, 3, 0, b"", b"") for slot in opened],
        blocks=pack_u32(blocks),
        join=pack_u32(join),
        chunks=pack_u32(chunks),
        chunk_ids=pack_i32(ids),
        feedback=plan - 1,
        after_idle=False,
        tap=None,
    )


def make_buffers(device: str, *, is_decode: bool, max_new_blocks: int = 8) -> StepBuffers:
    return StepBuffers(
        max_tokens=MAX_SLOTS if is_decode else MAX_TOKENS,
        max_rows=MAX_SLOTS,
        max_new_blocks=max_new_blocks,
        is_decode=is_decode,
        device=torch.device(device),
    )


def make_steps() -> list[BatchInputs]:
    """Two prompts, then one more with the first two decoding, then decodes alone."""
    table = SlotTable(MAX_SLOTS, 8, BLOCK_SIZE)
    return [
        table.apply(
            execute(
                0,
                opened=[5, 2],
                blocks=[5, 7, 5, 9, 2, 3],
                chunks=[5, 0, 6, 1, 2, 0, 3, 0],
                ids=range(9),
            )
        ),
        table.apply(
            execute(
                1,
                opened=[0],
                blocks=[0, 4],
                join=[5],
                chunks=[2, 3, 1, 1, 0, 0, 2, 1],
                ids=[8, 6, 7],
            )
        ),
        table.apply(execute(2, join=[2, 0], blocks=[2, 8])),
    ]


def check(buffers: StepBuffers, name: str, values: Tensor, padding: int) -> None:
    found = buffers[name].cpu()
    assert torch.equal(found[: len(values)], values.to(found.dtype)), name
    assert (found[len(values) :] == padding).all(), name


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_with_chunks_is_followed_by_padding(device: str) -> None:
    buffers = make_buffers(device, is_decode=False)
    for inputs in make_steps():  # the second is shorter than the first, the third has no chunks
        if inputs.decode_lens is None:
            continue
        new_blocks = buffers.fill(inputs)
        assert torch.equal(new_blocks.cpu(), inputs.new_blocks)
        for name, padding in {
            "token_ids": 0,
            "positions": 0,
            "slot_mapping": -1,
            "context_lens": 0,
            "decode_lens": 0,
            "slots": 0,
            "sample_rows": 0,
        }.items():
            check(buffers, name, getattr(inputs, name), padding)
        check(buffers, "sample_slots", torch.tensor(inputs.sample_slots), -1)
        check(buffers, "sample_positions", torch.tensor(inputs.sample_positions), 0)
        check(buffers, "cu_seqlens_q", inputs.cu_seqlens_q, len(inputs.positions))


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_decodes_sample_where_they_are(device: str) -> None:
    inputs = make_steps()[2]
    buffers = make_buffers(device, is_decode=True)
    buffers.fill(inputs)
    check(buffers, "positions", torch.tensor([7, 4, 2]), 0)
    check(buffers, "slot_mapping", torch.tensor([9 * 4 + 3, 8 * 4 + 0, 4 * 4 + 2]), -1)
    check(buffers, "context_lens", torch.tensor([8, 5, 3]), 0)
    check(buffers, "slots", torch.tensor([5, 2, 0]), 0)
    check(buffers, "sample_slots", torch.tensor([5, 2, 0]), -1)
    check(buffers, "sample_positions", torch.tensor([8, 5, 3]), 0)
    assert buffers["cu_seqlens_q"].tolist() == list(range(MAX_SLOTS + 1))


@pytest.mark.parametrize("device", DEVICES)
def test_more_new_blocks_than_there_is_room_for_come_another_way(device: str) -> None:
    inputs = make_steps()[0]
    for room in (3, 2, 1):
        buffers = make_buffers(device, is_decode=False, max_new_blocks=room)
        assert buffers.fill(inputs).tolist() == [[5, 0, 7], [5, 1, 9], [2, 0, 3]]
        check(buffers, "positions", inputs.positions, 0)


@pytest.mark.gpu
def test_a_buffer_is_not_written_before_the_device_has_read_it() -> None:
    """Many steps are enqueued behind one that takes long: each finds its own inputs."""
    device = torch.device("cuda:0")
    buffers = make_buffers("cuda:0", is_decode=True)
    table = SlotTable(MAX_SLOTS, 64, BLOCK_SIZE)
    blocks = [n for block in range(64) for n in (0, block)]
    table.apply(execute(0, opened=[0], blocks=blocks, chunks=[0, 0, 1, 1], ids=[1]))
    seen = torch.zeros(100, dtype=torch.int64, device=device)
    torch.cuda._sleep(50_000_000)
    for plan in range(100):
        buffers.fill(table.apply(execute(plan + 1, join=[] if plan else [0])))
        seen[plan] = buffers["positions"][0]
    assert seen.tolist() == list(range(1, 101))
