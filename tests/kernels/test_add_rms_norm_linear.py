"""add_rms_norm_linear: the sum, its norm and a projection, in one pass where rows are few."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ember_pp.errors import KernelArgumentError
from kernel_backends import BACKENDS, cpu_ops, open_backend
from numeric import assert_bitwise_equal, assert_close, sum_tolerance

EPS = 1e-6
SHAPES = [(7, 64), (41, 96), (1056, 1024), (4096, 1056), (2203, 2592), (72, 5120)]
"""Outputs and width."""


def random_arguments(
    num_tokens: int, width: int, num_outputs: int, device: torch.device
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16().to(device)

    return {
        "input": random(num_tokens, width),
        "residual": random(num_tokens, width),
        "norm_weight": random(width),
        "weight": random(num_outputs, width),
        "bias": random(num_outputs),
    }


def expected_normed(total: Tensor, norm_weight: Tensor) -> Tensor:
    """In double, rounded where the op promises."""
    exact = total.double()
    normed = exact / (exact.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    return (normed.to(total.dtype).double() * norm_weight.double()).to(total.dtype).double()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_tokens", [1, 2, 5, 8, 9, 16, 17, 33])
@pytest.mark.parametrize(("num_outputs", "width"), SHAPES)
def test_is_the_product_of_the_normed_sum(
    num_outputs: int, width: int, num_tokens: int, backend: str
) -> None:
    ops, device = open_backend(backend)
    args = random_arguments(num_tokens, width, num_outputs, device)

    output, total = ops.add_rms_norm_linear(**args, eps=EPS)

    summed = (args["input"].double() + args["residual"].double()).bfloat16()
    assert_bitwise_equal(total, summed)
    normed = expected_normed(summed, args["norm_weight"])
    expected = torch.einsum("ti,oi->to", normed, args["weight"].double()) + args["bias"].double()
    # Roundings of the norm that fall the other way count as terms of their own.
    tolerance = 2 * sum_tolerance(torch.bfloat16, width)
    assert_close(output, expected, tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_tokens", [1, 4, 16, 33])
@pytest.mark.parametrize(("num_outputs", "width"), SHAPES)
def test_where_the_sum_was_made_changes_no_bit(
    num_outputs: int, width: int, num_tokens: int, backend: str
) -> None:
    ops, device = open_backend(backend)
    args = random_arguments(num_tokens, width, num_outputs, device)
    output, total = ops.add_rms_norm_linear(**args, eps=EPS)
    again, same = ops.add_rms_norm_linear(**(args | {"input": total, "residual": None}), eps=EPS)
    assert same.data_ptr() == total.data_ptr(), "without a residual the total is the input"
    assert_bitwise_equal(again, output)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_tokens", [3, 16])
def test_a_row_does_not_depend_on_others(num_tokens: int, backend: str) -> None:
    ops, device = open_backend(backend)
    args = random_arguments(num_tokens, 1056, 1032, device)
    output, _ = ops.add_rms_norm_linear(**args, eps=EPS)
    spoiled = args["residual"].clone()
    spoiled[1] = torch.nan
    after, _ = ops.add_rms_norm_linear(**(args | {"residual": spoiled}), eps=EPS)
    of_others = torch.arange(num_tokens) != 1
    assert_bitwise_equal(after[of_others], output[of_others])
    assert bool(after[1].isnan().all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_where_numbers_lie_changes_nothing(backend: str) -> None:
    ops, device = open_backend(backend)
    args = random_arguments(5, 1056, 264, device)
    before = {name: value.clone() for name, value in args.items()}
    expected = ops.add_rms_norm_linear(**args, eps=EPS)
    for name in ("input", "residual"):
        apart = torch.stack([args[name], args[name]], 1)[:, 1]
        for result, same in zip(
            ops.add_rms_norm_linear(**(args | {name: apart}), eps=EPS), expected, strict=True
        ):
            assert_bitwise_equal(result, same, name)
    for name, value in before.items():
        assert_bitwise_equal(args[name], value, f"{name}, which is only read,")


@pytest.mark.gpu
def test_replays_in_a_graph() -> None:
    ops, device = open_backend("cuda")
    args = random_arguments(4, 1024, 3000, device)
    ops.add_rms_norm_linear(**args, eps=EPS)  # built before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, total = ops.add_rms_norm_linear(**args, eps=EPS)
        again, _ = ops.add_rms_norm_linear(**(args | {"input": total, "residual": None}), eps=EPS)
    for seed in (1, 2):
        args["input"].copy_(torch.randn(4, 1024, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert_bitwise_equal(output, ops.add_rms_norm_linear(**args, eps=EPS)[0])
        assert_bitwise_equal(again, output, "the next kernel, which starts before this one ends,")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(6)}, r"input: expected 2 dimensions"),
        ({"residual": torch.zeros(3, 6)}, r"residual: expected \[4, 6\], got \[3, 6\]"),
        ({"norm_weight": torch.ones(5)}, r"norm_weight: expected \[6\], got \[5\]"),
        ({"weight": torch.zeros(5, 7)}, r"weight: expected \[5, 6\], got \[5, 7\]"),
        ({"weight": torch.zeros(5, 6).double()}, r"weight: expected dtype torch.float32"),
        ({"bias": torch.zeros(6)}, r"bias: expected \[5\], got \[6\]"),
    ],
    ids=["input-1d", "residual-rows", "norm-width", "weight-width", "weight-dtype", "bias-width"],
)
def test_rejects_bad_arguments_by_name(change: dict[str, Tensor], message: str) -> None:
    args = {
        "input": torch.zeros(4, 6),
        "residual": torch.zeros(4, 6),
        "norm_weight": torch.ones(6),
        "weight": torch.zeros(5, 6),
    }
    with pytest.raises(KernelArgumentError, match=message):
        cpu_ops().add_rms_norm_linear(**(args | change), eps=EPS)
