"""linear: a product with the rows of a weight, in double as the oracle."""

from __future__ import annotations

import pytest
import torch

from conftest import UGLY_SIZES
from ember_pp.errors import KernelArgumentError
from kernel_backends import BACKENDS, cpu_ops, open_backend
from numeric import assert_close, sum_tolerance


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("num_tokens", UGLY_SIZES)
def test_multiplies_with_the_transposed_weight(
    num_tokens: int, dtype: torch.dtype, has_bias: bool, backend: str
) -> None:
    ops, device = open_backend(backend)
    generator = torch.Generator().manual_seed(num_tokens)
    input = torch.randn(num_tokens, 67, generator=generator).to(device, dtype)
    weight = torch.randn(41, 67, generator=generator).to(device, dtype)
    bias = torch.randn(41, generator=generator).to(device, dtype) if has_bias else None

    output = ops.linear(input, weight, bias)

    expected = torch.einsum("ti,oi->to", input.double(), weight.double())
    expected += 0 if bias is None else bias.double()
    assert output.dtype == dtype
    assert_close(output, expected, sum_tolerance(dtype, 67))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(4, 2, 3)}, r"input: expected 2 dimensions"),
        ({"weight": torch.zeros(5, 7)}, r"weight: expected \[5, 6\], got \[5, 7\]"),
        ({"weight": torch.zeros(5, 6).bfloat16()}, r"weight: expected dtype torch.float32"),
        ({"bias": torch.zeros(6)}, r"bias: expected \[5\], got \[6\]"),
    ],
    ids=["input-3d", "weight-width", "weight-dtype", "bias-width"],
)
def test_rejects_bad_arguments_by_name(change: dict[str, torch.Tensor], message: str) -> None:
    args = {"input": torch.zeros(4, 6), "weight": torch.zeros(5, 6), "bias": torch.zeros(5)}
    with pytest.raises(KernelArgumentError, match=message):
        cpu_ops().linear(**(args | change))
