"""begin_step: new blocks into block tables, the tokens of decode rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ember_pp.errors import KernelArgumentError
from kernel_backends import BACKENDS, cpu_ops, open_backend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("num_new", "num_decodes"), [(0, 0), (0, 5), (3, 0), (1, 1), (127, 2), (2, 129), (700, 257)]
)
def test_changes_what_is_named_and_nothing_else(
    num_new: int, num_decodes: int, backend: str
) -> None:
    ops, device = open_backend(backend)
    generator = torch.Generator().manual_seed(num_new)
    num_slots, width = 300, 17
    table = torch.randint(0, 1000, (num_slots, width), generator=generator, dtype=torch.int32)
    places = torch.randperm(num_slots * width, generator=generator)[:num_new]
    blocks = torch.randint(1000, 2000, (num_new,), generator=generator)
    new_blocks = torch.stack([places // width, places % width, blocks], 1).int()
    last_tokens = torch.randint(0, 2**40, (num_slots,), generator=generator)
    slots = torch.randperm(num_slots, generator=generator)[:num_decodes].int()
    token_ids = torch.arange(num_decodes + 3)
    expected = table.clone().view(-1)
    expected[places] = blocks.int()
    on_device = [x.to(device) for x in (table, new_blocks, last_tokens, slots, token_ids)]

    ops.begin_step(*on_device)

    assert torch.equal(on_device[0].cpu().view(-1), expected)
    assert torch.equal(on_device[4][:num_decodes].cpu(), last_tokens[slots.long()])
    assert on_device[4][num_decodes:].tolist() == list(range(num_decodes, num_decodes + 3))
    assert torch.equal(on_device[2].cpu(), last_tokens)


def arguments() -> dict[str, Tensor]:
    return {
        "block_table": torch.zeros(4, 2, dtype=torch.int32),
        "new_blocks": torch.zeros(1, 3, dtype=torch.int32),
        "last_tokens": torch.zeros(4, dtype=torch.int64),
        "slots": torch.zeros(2, dtype=torch.int32),
        "token_ids": torch.zeros(2, dtype=torch.int64),
    }


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("block_table", torch.zeros(8, dtype=torch.int32), "expected 2 dimensions"),
        ("block_table", torch.zeros(4, 2), r"expected dtype torch\.int32"),
        ("block_table", torch.zeros(2, 4, dtype=torch.int32).T, "expected contiguous"),
        ("new_blocks", torch.zeros(1, 2, dtype=torch.int32), r"expected \[1, 3\]"),
        ("last_tokens", torch.zeros(4, dtype=torch.int32), r"expected dtype torch\.int64"),
        ("slots", torch.zeros(2, dtype=torch.int64), r"expected dtype torch\.int32"),
        ("slots", torch.zeros(3, dtype=torch.int32), "expected one for each of 3 slots, got 2"),
        ("token_ids", torch.zeros(4, dtype=torch.int64)[::2], "expected contiguous"),
    ],
)
def test_rejects_bad_arguments_by_name(name: str, value: Tensor, message: str) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        cpu_ops().begin_step(**(arguments() | {name: value}))
