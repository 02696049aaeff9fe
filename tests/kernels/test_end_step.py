"""end_step: what was drawn becomes the input of the next step."""

from __future__ import annotations

import pytest
import torch

from ember_pp.errors import KernelArgumentError
from kernel_backends import BACKENDS, cpu_ops, open_backend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_drawn", [0, 1, 3, 128, 257])
def test_remembers_what_rows_with_a_slot_drew(num_drawn: int, backend: str) -> None:
    ops, device = open_backend(backend)
    generator = torch.Generator().manual_seed(num_drawn)
    last_tokens = torch.arange(1000, 1400)
    drawn = torch.randint(-1, 500, (num_drawn,), generator=generator)
    slots = torch.randperm(400, generator=generator)[:num_drawn].int()
    slots[1::3] = -1  # rows of padding
    expected = last_tokens.clone()
    for slot, token in zip(slots.tolist(), drawn.tolist(), strict=True):
        if slot >= 0:
            expected[slot] = max(token, 0)
    tokens_there = last_tokens.to(device)

    output = ops.end_step(drawn.to(device), slots.to(device), tokens_there)

    assert output.dtype == torch.int32
    assert output.tolist() == drawn.tolist()
    assert torch.equal(tokens_there.cpu(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stage_that_is_not_the_first_remembers_nothing(backend: str) -> None:
    ops, device = open_backend(backend)
    slots = torch.tensor([2, 0], dtype=torch.int32, device=device)
    drawn = torch.tensor([-1, 151_935], device=device)
    assert ops.end_step(drawn, slots, None).tolist() == [-1, 151_935]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 1).long(), torch.zeros(2).int(), None), "drawn: expected 1 dimension"),
        ((torch.zeros(2), torch.zeros(2).int(), None), r"drawn: expected dtype torch\.int64"),
        ((torch.zeros(2).long(), torch.zeros(3).int(), None), r"slots: expected \[2\]"),
        ((torch.zeros(2).long(), torch.zeros(2).long(), None), r"slots: expected dtype"),
        ((torch.zeros(2).long(), torch.zeros(2).int(), torch.zeros(9)), "last_tokens: expected"),
    ],
    ids=["dims", "dtype", "length", "slots", "last-tokens"],
)
def test_rejects_bad_arguments_by_name(arguments, message: str) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        cpu_ops().end_step(*arguments)
