"""end_step: what was drawn becomes the input of the next step, and is seen by the host."""

from __future__ import annotations

import pytest
import torch

from ember_pp.errors import KernelArgumentError
from ember_pp.kernels import StepState
from ember_pp.kernels.step_state import OUTPUT_WAIT
from kernel_backends import BACKENDS, cpu_ops, open_backend


def make_state(device: torch.device, *, is_first: bool = True, max_rows: int = 300) -> StepState:
    state = StepState.allocate(
        max_tokens=8,
        max_rows=max_rows,
        max_slots=400,
        max_blocks_per_sequence=2,
        block_size=16,
        max_pending=3,
        last_tokens=torch.arange(1000, 1400, device=device) if is_first else None,
        device=device,
    )
    state.turn_and_mark.copy_(torch.tensor([2, 2**40 + 3]))
    return state


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_first", [True, False], ids=["one-stage", "last-of-several"])
@pytest.mark.parametrize("num_drawn", [0, 1, 3, 128, 257])
def test_brings_tokens_to_the_host_and_to_the_next_step(
    num_drawn: int, is_first: bool, backend: str
) -> None:
    ops, device = open_backend(backend)
    state = make_state(device, is_first=is_first)
    generator = torch.Generator().manual_seed(num_drawn)
    drawn = torch.randint(-1, 151_936, (num_drawn,), generator=generator)
    slots = torch.randperm(400, generator=generator)[:num_drawn].int()
    slots[1::3] = -1  # rows of padding
    expected = list(range(1000, 1400))
    for slot, token in zip(slots.tolist(), drawn.tolist(), strict=True):
        if slot >= 0:
            expected[slot] = max(token, 0)

    output = ops.end_step(drawn.to(device), slots.to(device), state)

    assert output.dtype == torch.int32
    assert output.tolist() == drawn.tolist()
    assert (state.last_tokens is not None) == is_first
    if state.last_tokens is not None:
        assert state.last_tokens.tolist() == expected
    pairs = [[s, max(t, 0)] for s, t in zip(slots.tolist(), drawn.tolist(), strict=True)]
    assert state.feedback[:num_drawn].tolist() == pairs
    assert not state.feedback[num_drawn:].any()
    assert state.results[2, 2 : 2 + num_drawn].tolist() == drawn.tolist()
    assert state.records[2, OUTPUT_WAIT] > 0
    assert state.records.count_nonzero() == 1
    assert state.results[2, :2].view(torch.int64).tolist() == [2**40 + 3]
    assert not state.results[:2].any(), "another plan's tokens"
    assert not state.results[2, 2 + num_drawn :].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("max_rows", [1, 2, 5])
def test_every_turn_has_a_mark_of_its_own(max_rows: int, backend: str) -> None:
    ops, device = open_backend(backend)
    state = make_state(device, max_rows=max_rows)
    slots = torch.arange(max_rows, dtype=torch.int32, device=device)
    for turn in range(3):
        state.turn_and_mark.copy_(torch.tensor([turn, turn + 50]))
        ops.end_step(torch.full((max_rows,), turn + 7, device=device), slots, state)
    if device.type == "cuda":
        torch.cuda.synchronize()
    marks = [row[:2].view(torch.int64).tolist() for row in state.results]
    assert marks == [[50], [51], [52]]
    assert [row[2 : 2 + max_rows].tolist() for row in state.results] == [
        [turn + 7] * max_rows for turn in range(3)
    ]


@pytest.mark.gpu
def test_the_mark_comes_after_the_tokens() -> None:
    """The host polls memory while the device works: with the mark it finds all tokens."""
    ops, device = open_backend("cuda")
    state = make_state(device)
    slots = torch.arange(300, dtype=torch.int32, device=device)
    for turn in range(300):
        drawn = torch.full((300,), turn + 7, device=device)
        state.turn_and_mark.copy_(torch.tensor([turn % 3, turn + 1]), non_blocking=False)
        torch.cuda._sleep(20_000)
        ops.end_step(drawn, slots, state)
        mark = state.results[turn % 3, :2].view(torch.int64)
        while int(mark[0]) != turn + 1:
            pass
        assert (state.results[turn % 3, 2:] == turn + 7).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 1).long(), torch.zeros(2).int()), "drawn: expected 1 dimension"),
        ((torch.zeros(2), torch.zeros(2).int()), r"drawn: expected dtype torch\.int64"),
        ((torch.zeros(2).long(), torch.zeros(3).int()), r"slots: expected \[2\]"),
        ((torch.zeros(2).long(), torch.zeros(2).long()), r"slots: expected dtype"),
        ((torch.zeros(301).long(), torch.zeros(301).int()), "drawn: expected at most 300 rows"),
    ],
    ids=["dims", "dtype", "length", "slots", "rows"],
)
def test_rejects_bad_arguments_by_name(
    arguments: tuple[torch.Tensor, torch.Tensor], message: str
) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        cpu_ops().end_step(*arguments, make_state(torch.device("cpu")))
