"""linear: a product with the rows of a weight, in double as the oracle."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from conftest import UGLY_SIZES
from ember_pp.errors import KernelArgumentError
from kernel_backends import BACKENDS, cpu_ops, open_backend
from numeric import assert_bitwise_equal, assert_close, sum_tolerance


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


def random_product(
    num_tokens: int, width: int, num_outputs: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and bias in bf16."""
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = (num_tokens, width), (num_outputs, width), (num_outputs,)
    input, weight, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    return input.bfloat16().to(device), weight.bfloat16().to(device), bias.bfloat16().to(device)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_tokens", [1, 3, 8, 9, 16, 17, 24, 25])
@pytest.mark.parametrize(
    ("num_outputs", "width"),
    [(7, 64), (41, 96), (1056, 1024), (1064, 1056), (2203, 2592), (24, 25600), (9000, 160)],
)
def test_few_rows_of_any_width(num_outputs: int, width: int, num_tokens: int, backend: str) -> None:
    ops, device = open_backend(backend)
    input, weight, bias = random_product(num_tokens, width, num_outputs, device)
    expected = torch.einsum("ti,oi->to", input.double(), weight.double())
    tolerance = sum_tolerance(torch.bfloat16, width)
    assert_close(ops.linear(input, weight), expected, tolerance)
    assert_close(ops.linear(input, weight, bias), expected + bias.double(), tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("num_tokens", "width"), [(3, 1056), (16, 1056), (16, 12320)])
def test_a_row_does_not_depend_on_others(num_tokens: int, width: int, backend: str) -> None:
    ops, device = open_backend(backend)
    input, weight, _ = random_product(num_tokens, width, 1032, device)
    output = ops.linear(input, weight)
    assert_bitwise_equal(ops.linear(input.flip(0), weight).flip(0), output)
    for bad in (0, num_tokens - 1):
        spoiled = input.clone()
        spoiled[bad] = torch.nan
        of_others = torch.arange(num_tokens) != bad
        after = ops.linear(spoiled, weight)
        assert_bitwise_equal(after[of_others], output[of_others])
        assert bool(after[bad].isnan().all())


@pytest.mark.parametrize("backend", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_where_numbers_lie_changes_nothing(backend: str) -> None:
    ops, device = open_backend(backend)
    input, weight, bias = random_product(5, 1056, 264, device)
    output = ops.linear(input, weight, bias)
    apart = torch.stack([input, input], 1)[:, 1]
    assert not apart.is_contiguous()
    assert_bitwise_equal(ops.linear(apart, weight, bias), output)
    shifted = torch.empty(input.numel() + 1, dtype=input.dtype, device=device)[1:].view_as(input)
    assert_bitwise_equal(ops.linear(shifted.copy_(input), weight, bias), output)
    # An unaligned weight is multiplied by other means, equal up to rounding.
    odd = torch.empty(weight.numel() + 1, dtype=weight.dtype, device=device)[1:].view_as(weight)
    tolerance = sum_tolerance(torch.bfloat16, 1056)
    assert_close(ops.linear(input, odd.copy_(weight), bias), output, tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 16])
def test_replays_in_a_graph(num_tokens: int) -> None:
    ops, device = open_backend("cuda")
    input, weight, bias = random_product(num_tokens, 2080, 3000, device)
    ops.linear(input, weight, bias)  # built before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = ops.linear(input, weight, bias)
    for seed in (1, 2):
        input.copy_(torch.randn(input.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert_bitwise_equal(output, ops.linear(input, weight, bias))


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
