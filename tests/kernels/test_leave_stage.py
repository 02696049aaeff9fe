"""leave_stage: the sum that a stage hands on, with the bits that torch's addition gives."""

from __future__ import annotations

import pytest
import torch

from ember_pp.errors import KernelArgumentError
from ember_pp.kernels import StepState
from ember_pp.kernels.step_state import OUTPUT_WAIT
from kernel_backends import BACKENDS, cpu_ops, open_backend


def make_state(device: torch.device) -> StepState:
    state = StepState.allocate(
        max_tokens=8,
        max_rows=4,
        max_slots=4,
        max_blocks_per_sequence=2,
        block_size=16,
        max_pending=3,
        last_tokens=None,
        device=device,
    )
    state.turn_and_mark.copy_(torch.tensor([1, 5]))
    return state


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("has_added", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("num_tokens", "width"), [(1, 1), (1, 4096), (3, 33), (7, 68), (600, 1032)]
)
def test_adds_as_torch_does_and_notes_the_time(
    num_tokens: int, width: int, dtype: torch.dtype, has_added: bool, backend: str
) -> None:
    ops, device = open_backend(backend)
    state = make_state(device)
    generator = torch.Generator().manual_seed(width)
    shape = num_tokens, width
    residual, added = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    output = torch.full(shape, float("nan"), dtype=dtype, device=device)
    given = added.to(device) if has_added else None
    found = ops.leave_stage(residual.to(device), given, output, state)
    assert found is output
    assert torch.equal(output.cpu(), residual + added if has_added else residual)
    times = state.records.tolist()
    assert times[1][OUTPUT_WAIT] > 0
    times[1][OUTPUT_WAIT] = 0
    assert not any(map(any, times)), "no other word, no other plan"


@pytest.mark.parametrize(
    ("shapes", "dtype", "message"),
    [
        (((2, 3), (2, 3), (6,)), torch.float32, "output: expected 2 dimensions"),
        (((2, 4), (2, 3), (2, 3)), torch.float32, r"residual: expected \[2, 3\]"),
        (((2, 3), (1, 3), (2, 3)), torch.float32, r"added: expected \[2, 3\]"),
        (((2, 3), (2, 3), (2, 3)), torch.float16, "output: expected bf16 or fp32"),
    ],
)
def test_rejects_bad_arguments_by_name(
    shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, message: str
) -> None:
    residual, added, output = (torch.zeros(shape, dtype=dtype) for shape in shapes)
    with pytest.raises(KernelArgumentError, match=message):
        cpu_ops().leave_stage(residual, added, output, make_state(torch.device("cpu")))


def test_rejects_what_is_not_contiguous() -> None:
    state, plain = make_state(torch.device("cpu")), torch.zeros(2, 3)
    with pytest.raises(KernelArgumentError, match="residual: expected contiguous"):
        cpu_ops().leave_stage(torch.zeros(3, 2).T, plain, plain.clone(), state)
