"""add_rms_norm_gate_up: the sum, its norm, gate and up, and their activation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ember_pp.errors import KernelArgumentError
from kernel_backends import BACKENDS, cpu_ops, open_backend
from numeric import assert_bitwise_equal

EPS = 1e-6
SHAPES = [(7, 64), (8, 96), (44, 96), (1056, 1024), (3072, 1056), (1100, 2592), (72, 5120)]
"""Width after the activation, and before the norm."""


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
        "weight": random(2 * num_outputs, width) * width**-0.5,
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_tokens", [1, 2, 5, 8, 9, 16, 17, 33])
@pytest.mark.parametrize(("num_outputs", "width"), SHAPES)
def test_is_the_activation_of_the_linear_op(
    num_outputs: int, width: int, num_tokens: int, backend: str
) -> None:
    """Bit by bit, since gate and up are summed and rounded as there."""
    ops, device = open_backend(backend)
    args = random_arguments(num_tokens, width, num_outputs, device)

    activated, total = ops.add_rms_norm_gate_up(**args, eps=EPS)

    gate_up, same_total = ops.add_rms_norm_linear(**args, eps=EPS)
    assert_bitwise_equal(total, same_total)
    assert_bitwise_equal(activated, ops.swiglu(gate_up))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_tokens", [1, 4, 16, 33])
@pytest.mark.parametrize(("num_outputs", "width"), SHAPES)
def test_where_the_sum_was_made_changes_no_bit(
    num_outputs: int, width: int, num_tokens: int, backend: str
) -> None:
    ops, device = open_backend(backend)
    args = random_arguments(num_tokens, width, num_outputs, device)
    activated, total = ops.add_rms_norm_gate_up(**args, eps=EPS)
    again, same = ops.add_rms_norm_gate_up(**(args | {"input": total, "residual": None}), eps=EPS)
    assert same.data_ptr() == total.data_ptr(), "without a residual the total is the input"
    assert_bitwise_equal(again, activated)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_tokens", [3, 16])
def test_a_row_does_not_depend_on_others(num_tokens: int, backend: str) -> None:
    ops, device = open_backend(backend)
    args = random_arguments(num_tokens, 1056, 1032, device)
    activated, _ = ops.add_rms_norm_gate_up(**args, eps=EPS)
    spoiled = args["input"].clone()
    spoiled[0] = torch.nan
    after, _ = ops.add_rms_norm_gate_up(**(args | {"input": spoiled}), eps=EPS)
    assert_bitwise_equal(after[1:], activated[1:])
    assert bool(after[0].isnan().all())


@pytest.mark.gpu
def test_replays_in_a_graph() -> None:
    ops, device = open_backend("cuda")
    args = random_arguments(4, 1024, 3000, device)
    ops.add_rms_norm_gate_up(**args, eps=EPS)  # built before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        activated, _ = ops.add_rms_norm_gate_up(**args, eps=EPS)
    for seed in (1, 2):
        args["input"].copy_(torch.randn(4, 1024, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert_bitwise_equal(activated, ops.add_rms_norm_gate_up(**args, eps=EPS)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(6)}, r"input: expected 2 dimensions"),
        ({"residual": torch.zeros(3, 6)}, r"residual: expected \[4, 6\], got \[3, 6\]"),
        ({"norm_weight": torch.ones(5)}, r"norm_weight: expected \[6\], got \[5\]"),
        ({"weight": torch.zeros(5, 6)}, r"weight: expected \[2I, D\], got \[5, 6\]"),
        ({"weight": torch.zeros(8, 7)}, r"weight: expected \[8, 6\], got \[8, 7\]"),
    ],
    ids=["input-1d", "residual-rows", "norm-width", "weight-odd", "weight-width"],
)
def test_rejects_bad_arguments_by_name(change: dict[str, Tensor], message: str) -> None:
    args = {
        "input": torch.zeros(4, 6),
        "residual": torch.zeros(4, 6),
        "norm_weight": torch.ones(6),
        "weight": torch.zeros(8, 6),
    }
    with pytest.raises(KernelArgumentError, match=message):
        cpu_ops().add_rms_norm_gate_up(**(args | change), eps=EPS)
