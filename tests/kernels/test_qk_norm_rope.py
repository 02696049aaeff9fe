"""qk_norm_rope: heads split, normalised and turned, against complex numbers in double."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from conftest import UGLY_SIZES
from ember_pp.errors import KernelArgumentError
from ember_pp.kernels import qk_norm_rope
from numeric import assert_bitwise_equal, assert_close, sum_tolerance

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, EPS = 6, 2, 16, 1e-6
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def turn(heads: Tensor, angles: Tensor) -> Tensor:
    """[T, H, d] by [T, d / 2]: dimension i and i + d / 2 are one complex number."""
    real, imaginary = heads.double().chunk(2, dim=-1)
    turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([turned.real, turned.imag], dim=-1)


def norm(heads: Tensor, weight: Tensor) -> Tensor:
    exact = heads.double()
    normed = exact / (exact.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    return (normed.to(heads.dtype) * weight).double()


def make_inputs(num_tokens: int, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(num_tokens)
    width = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
    qkv = torch.randn(num_tokens, width, generator=generator).to(device, dtype)
    weight = torch.randn(NUM_HEADS + NUM_KV_HEADS, HEAD_DIM, generator=generator).to(device, dtype)
    angles = torch.rand(num_tokens, HEAD_DIM // 2, generator=generator).double().mul(6).to(device)
    cos, sin = angles.cos().float(), angles.sin().float()
    return qkv, weight, torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1), angles


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("has_norm", [True, False], ids=["norm", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("num_tokens", UGLY_SIZES)
def test_norms_and_turns_queries_and_keys_only(
    num_tokens: int, dtype: torch.dtype, has_norm: bool, device: str
) -> None:
    qkv, weight, cos, sin, angles = make_inputs(num_tokens, dtype, device)

    query, key, value = qk_norm_rope(
        qkv,
        weight if has_norm else None,
        cos,
        sin,
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        eps=EPS,
    )

    heads = qkv.view(num_tokens, -1, HEAD_DIM)
    rotated = heads[:, : NUM_HEADS + NUM_KV_HEADS]
    expected = turn(norm(rotated, weight) if has_norm else rotated, angles)
    tolerance = sum_tolerance(dtype, HEAD_DIM)
    assert_close(query, expected[:, :NUM_HEADS], tolerance, "query")
    assert_close(key, expected[:, NUM_HEADS:], tolerance, "key")
    assert_bitwise_equal(value, heads[:, NUM_HEADS + NUM_KV_HEADS :], "value")
    assert query.dtype == key.dtype == dtype


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"qkv": torch.zeros(4, 161)},
            r"qkv: expected \[T, \(6 \+ 2 \* 2\) \* d\], got \[4, 161\]",
        ),
        ({"qkv": torch.zeros(160)}, r"qkv: expected 2 dimensions"),
        ({"norm_weight": torch.zeros(16)}, r"norm_weight: expected \[8, 16\], got \[16\]"),
        ({"cos": torch.zeros(3, 16)}, r"cos: expected \[4, 16\], got \[3, 16\]"),
        ({"sin": torch.zeros(4, 16).bfloat16()}, r"sin: expected dtype torch.float32"),
    ],
    ids=["qkv-width", "qkv-1d", "norm-shape", "cos-rows", "sin-dtype"],
)
def test_rejects_bad_arguments_by_name(change: dict[str, Tensor], message: str) -> None:
    names = ("qkv", "norm_weight", "cos", "sin")
    args = dict(zip(names, make_inputs(4, torch.float32, "cpu"), strict=False)) | change
    with pytest.raises(KernelArgumentError, match=message):
        qk_norm_rope(**args, num_heads=NUM_HEADS, num_kv_heads=NUM_KV_HEADS, eps=EPS)
