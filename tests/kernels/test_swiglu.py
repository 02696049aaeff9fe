"""swiglu: silu of the first half times the second."""

from __future__ import annotations

import pytest
import torch

from conftest import UGLY_SIZES
from ember_pp.errors import KernelArgumentError
from kernel_backends import BACKENDS, cpu_ops, open_backend
from numeric import assert_close, assert_rounded_alike, sum_tolerance


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("num_tokens", UGLY_SIZES)
@pytest.mark.parametrize("width", [37, 200, 3072])
def test_gates_the_second_half_by_the_first(
    width: int, num_tokens: int, dtype: torch.dtype, backend: str
) -> None:
    ops, device = open_backend(backend)
    generator = torch.Generator().manual_seed(num_tokens)
    gate_up = torch.randn(num_tokens, 2 * width, generator=generator).mul(4).to(device, dtype)

    output = ops.swiglu(gate_up)

    gate, up = gate_up[:, :width].double(), gate_up[:, width:].double()
    assert output.dtype == dtype
    assert_close(output, gate / (1 + (-gate).exp()) * up, sum_tolerance(dtype, 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rounds_silu_before_the_product(backend: str) -> None:
    ops, device = open_backend(backend)
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(7, 2048, generator=generator).mul(2).to(device, torch.bfloat16)
    gate, up = gate_up.double().chunk(2, dim=-1)
    silu = (gate / (1 + (-gate).exp())).to(torch.bfloat16)
    assert_rounded_alike(ops.swiglu(gate_up), (silu.double() * up).to(torch.bfloat16))


@pytest.mark.parametrize(
    ("gate_up", "message"),
    [
        (torch.zeros(4, 7), r"gate_up: expected \[T, 2I\], got \[4, 7\]"),
        (torch.zeros(8), r"gate_up: expected 2 dimensions"),
    ],
    ids=["odd-width", "one-dim"],
)
def test_rejects_bad_arguments_by_name(gate_up: torch.Tensor, message: str) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        cpu_ops().swiglu(gate_up)
