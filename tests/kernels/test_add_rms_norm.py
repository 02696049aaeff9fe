"""add_rms_norm: the sum is rounded as it would be at an edge, and only then normalised."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from conftest import UGLY_SIZES
from ember_pp.errors import KernelArgumentError
from kernel_backends import BACKENDS, cpu_ops, open_backend
from numeric import assert_bitwise_equal

EPS = 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("num_tokens", UGLY_SIZES)
@pytest.mark.parametrize("width", [1, 48, 97, 4096])
def test_is_the_rounded_sum_and_its_norm(
    width: int, num_tokens: int, dtype: torch.dtype, backend: str
) -> None:
    ops, device = open_backend(backend)
    generator = torch.Generator().manual_seed(num_tokens)
    input, residual = torch.randn(2, num_tokens, width, generator=generator).to(device, dtype)
    weight = torch.randn(width, generator=generator).to(device, dtype)
    before = residual.clone()

    normed, total = ops.add_rms_norm(input, residual, weight, EPS)

    assert_bitwise_equal(total, (input.double() + residual.double()).to(dtype))
    assert_bitwise_equal(normed, ops.rms_norm(total, weight, EPS))
    assert_bitwise_equal(residual, before, "residual, which may be a hand-off slot,")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(6)}, r"input: expected 2 dimensions"),
        ({"residual": torch.zeros(3, 6)}, r"residual: expected \[4, 6\], got \[3, 6\]"),
        ({"residual": torch.zeros(4, 6).double()}, r"residual: expected dtype torch.float32"),
        ({"weight": torch.ones(5)}, r"weight: expected \[6\], got \[5\]"),
    ],
    ids=["input-1d", "residual-rows", "residual-dtype", "weight-width"],
)
def test_rejects_bad_arguments_by_name(change: dict[str, Tensor], message: str) -> None:
    args = {"input": torch.zeros(4, 6), "residual": torch.zeros(4, 6), "weight": torch.ones(6)}
    with pytest.raises(KernelArgumentError, match=message):
        cpu_ops().add_rms_norm(**(args | change), eps=EPS)
