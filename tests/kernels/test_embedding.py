"""embedding: exact rows of the table."""

from __future__ import annotations

import pytest
import torch

from conftest import UGLY_SIZES
from ember_pp.errors import KernelArgumentError
from kernel_backends import BACKENDS, cpu_ops, open_backend
from numeric import assert_bitwise_equal


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", UGLY_SIZES)
@pytest.mark.parametrize("width", [1, 7, 24, 2056])
def test_takes_the_row_of_each_token(
    width: int, num_tokens: int, dtype: torch.dtype, backend: str
) -> None:
    ops, device = open_backend(backend)
    generator = torch.Generator().manual_seed(num_tokens)
    weight = torch.randn(101, width, generator=generator).to(device, dtype)
    token_ids = torch.randint(0, 101, (num_tokens,), generator=generator).to(device)
    token_ids[-1] = 100

    rows = ops.embedding(token_ids, weight)

    expected = torch.stack([weight[token] for token in token_ids.tolist()])
    assert_bitwise_equal(rows, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_and_rows_may_lie_apart(backend: str) -> None:
    ops, device = open_backend(backend)
    weight = torch.randn(20, 16, generator=torch.Generator().manual_seed(0)).to(device)
    token_ids = torch.arange(12, device=device)
    assert_bitwise_equal(ops.embedding(token_ids[::3], weight), weight[:12:3])
    assert_bitwise_equal(ops.embedding(token_ids, weight[:, 3:11]), weight[:12, 3:11])
    assert ops.embedding(token_ids[:0], weight).shape == (0, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"token_ids": torch.zeros(3, dtype=torch.int32)},
            r"token_ids: expected dtype .*int64.*int32",
        ),
        (
            {"token_ids": torch.zeros(3, 1, dtype=torch.int64)},
            r"token_ids: expected 1 dimension, got shape \[3, 1\]",
        ),
        ({"weight": torch.zeros(8)}, r"weight: expected 2 dimensions, got shape \[8\]"),
    ],
    ids=["int32-ids", "ids-2d", "weight-1d"],
)
def test_rejects_bad_arguments_by_name(change: dict[str, torch.Tensor], message: str) -> None:
    args = {"token_ids": torch.zeros(3, dtype=torch.int64), "weight": torch.zeros(8, 4)} | change
    with pytest.raises(KernelArgumentError, match=message):
        cpu_ops().embedding(**args)
