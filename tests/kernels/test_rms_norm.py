"""rms_norm: transformers' RMSNorm, rounding included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from conftest import UGLY_SIZES
from ember_pp.errors import KernelArgumentError
from kernel_backends import BACKENDS, cpu_ops, open_backend
from numeric import assert_close, assert_rounded_alike, sum_tolerance

EPS = 1e-5
WIDTHS = (1, 97, 136, 1024, 5120, 8199)
"""Odd, not a whole warp, those of Qwen3, and one that fits no kernel in bf16 or fp32."""


def expected_rms_norm(input: Tensor, weight: Tensor) -> Tensor:
    """In double, but rounded to the dtype before the weight, as the op promises."""
    exact = input.double()
    normed = exact / (exact.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    return normed.to(input.dtype).double() * weight.double()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("num_tokens", UGLY_SIZES)
@pytest.mark.parametrize("width", WIDTHS)
def test_divides_by_the_root_mean_square(
    width: int, num_tokens: int, dtype: torch.dtype, backend: str
) -> None:
    ops, device = open_backend(backend)
    generator = torch.Generator().manual_seed(num_tokens)
    input = torch.randn(num_tokens, width, generator=generator).mul(3).to(device, dtype)
    weight = torch.randn(width, generator=generator).to(device, dtype)

    output = ops.rms_norm(input, weight, EPS)

    assert output.dtype == dtype
    assert_close(output, expected_rms_norm(input, weight), sum_tolerance(dtype, width))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rounds_before_the_weight_multiplies(backend: str) -> None:
    ops, device = open_backend(backend)
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(7, 1024, generator=generator).to(device, torch.bfloat16)
    weight = torch.randn(1024, generator=generator).to(device, torch.bfloat16)
    expected = expected_rms_norm(input, weight).to(torch.bfloat16)
    assert_rounded_alike(ops.rms_norm(input, weight, EPS), expected)


def test_large_bf16_values_do_not_overflow_and_tiny_ones_are_damped_by_eps() -> None:
    ops = cpu_ops()
    large = torch.full((1, 8), 3e38, dtype=torch.bfloat16)
    assert not bool(ops.rms_norm(large / 1e20, torch.ones(8).bfloat16(), EPS).isnan().any())
    tiny = torch.full((1, 8), 1e-4)
    assert float(ops.rms_norm(tiny, torch.ones(8), EPS)[0, 0]) == pytest.approx(
        1e-4 / EPS**0.5, rel=0.01
    )


def test_equals_transformers_bit_by_bit() -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    for dtype in (torch.float32, torch.bfloat16):
        input = torch.randn(33, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
        module = Qwen3RMSNorm(64, eps=EPS).to(dtype)
        torch.nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(1))
        assert torch.equal(
            cpu_ops().rms_norm(input, module.weight.detach(), EPS), module(input).detach()
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(6)}, r"input: expected 2 dimensions, got shape \[6\]"),
        ({"weight": torch.ones(5)}, r"weight: expected \[6\], got \[5\]"),
        ({"weight": torch.ones(6).bfloat16()}, r"weight: expected dtype torch.float32"),
    ],
    ids=["input-1d", "weight-width", "weight-dtype"],
)
def test_rejects_bad_arguments_by_name(change: dict[str, Tensor], message: str) -> None:
    args = {"input": torch.zeros(4, 6), "weight": torch.ones(6)} | change
    with pytest.raises(KernelArgumentError, match=message):
        cpu_ops().rms_norm(**args, eps=EPS)
