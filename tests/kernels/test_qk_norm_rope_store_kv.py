"""qk_norm_rope_store_kv: queries turned; keys and values in their slots, and nothing else there.

Heads are normalised and turned by complex numbers in double; slots are written by a loop.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import BLOCK_SIZE, UGLY_SIZES
from ember_pp.errors import KernelArgumentError
from ember_pp.kernels import Ops, RopeRows
from kernel_backends import BACKENDS, cpu_ops, open_backend
from numeric import assert_bitwise_equal, assert_close, assert_rounded_alike, sum_tolerance

NUM_HEADS, NUM_KV_HEADS, EPS = 6, 2, 1e-6
NUM_BLOCKS, NUM_POSITIONS = 8, 300
SENTINEL = -7.0  # exact in bf16
HEAD_DIMS = (16, 24, 64, 96, 128)
"""One lane a head, numbers of lanes that are no power of two, and those of the models."""


@dataclasses.dataclass
class Case:
    arguments: dict[str, Any]
    angles: Tensor  # [T, d / 2] float64

    def run(self, ops: Ops) -> Tensor:
        return ops.qk_norm_rope_store_kv(
            **self.arguments, num_heads=NUM_HEADS, num_kv_heads=NUM_KV_HEADS, eps=EPS
        )

    def heads(self) -> tuple[Tensor, Tensor, Tensor]:
        """Expected queries, keys and values, float64."""
        qkv, weight = self.arguments["qkv"], self.arguments["norm_weight"]
        if self.arguments["bias"] is not None:
            qkv = (qkv.double() + self.arguments["bias"].double()).to(qkv.dtype)
        heads = qkv.view(len(qkv), NUM_HEADS + 2 * NUM_KV_HEADS, -1)
        turned, value = heads.split([NUM_HEADS + NUM_KV_HEADS, NUM_KV_HEADS], 1)
        turned = turn(turned if weight is None else norm(turned, weight), self.angles)
        return turned[:, :NUM_HEADS], turned[:, NUM_HEADS:], value.double()


def turn(heads: Tensor, angles: Tensor) -> Tensor:
    """[T, H, d] by [T, d / 2]: dimension i and i + d / 2 are one complex number."""
    real, imaginary = heads.double().chunk(2, dim=-1)
    turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat([turned.real, turned.imag], dim=-1)


def norm(heads: Tensor, weight: Tensor) -> Tensor:
    exact = heads.double()
    normed = exact / (exact.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    return (normed.to(heads.dtype) * weight).double()


def make_case(
    num_tokens: int,
    *,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    has_norm: bool = True,
    has_bias: bool = True,
) -> Case:
    generator = torch.Generator().manual_seed(num_tokens + head_dim)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    width = (NUM_HEADS + 2 * NUM_KV_HEADS) * head_dim
    all_angles = torch.rand(NUM_POSITIONS, head_dim // 2, generator=generator).double() * 6
    positions = torch.randint(0, NUM_POSITIONS, (num_tokens,), generator=generator)
    table = torch.cat([all_angles.cos(), all_angles.sin()], -1).float()
    cache_shape = (NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, head_dim)
    slots = torch.randperm(NUM_BLOCKS * BLOCK_SIZE, generator=generator)[:num_tokens]
    arguments = {
        "qkv": draw(num_tokens, width),
        "bias": draw(width) if has_bias else None,
        "norm_weight": draw(NUM_HEADS + NUM_KV_HEADS, head_dim) if has_norm else None,
        "rope": RopeRows(table.to(device), positions.to(device)),
        "k_cache": torch.full(cache_shape, SENTINEL, device=device, dtype=dtype),
        "v_cache": torch.full(cache_shape, SENTINEL, device=device, dtype=dtype),
        "slot_mapping": slots.to(device),
    }
    return Case(arguments, all_angles[positions].to(device))


def stored(cache: Tensor, slots: list[int]) -> Tensor:
    """[T, K, d] of the slots that are not negative; all others still hold what they held."""
    flat = cache.flatten(0, 1).clone()
    taken = [slot for slot in slots if slot >= 0]
    rows = flat[taken]
    flat[taken] = SENTINEL
    assert_bitwise_equal(flat, torch.full_like(flat, SENTINEL), "slots of others")
    return rows


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("has_bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("has_norm", [True, False], ids=["norm", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_turns_queries_and_stores_keys_and_values(
    head_dim: int, dtype: torch.dtype, has_norm: bool, has_bias: bool, backend: str
) -> None:
    ops, device = open_backend(backend)
    for num_tokens in UGLY_SIZES:
        case = make_case(
            num_tokens,
            head_dim=head_dim,
            dtype=dtype,
            device=device,
            has_norm=has_norm,
            has_bias=has_bias,
        )
        slots = case.arguments["slot_mapping"]
        slots[1::3] = -1  # padding

        query = case.run(ops)

        expected_query, expected_key, expected_value = case.heads()
        is_stored = slots >= 0
        key = stored(case.arguments["k_cache"], slots.tolist())
        value = stored(case.arguments["v_cache"], slots.tolist())
        tolerance = sum_tolerance(dtype, head_dim)
        assert_close(query, expected_query, tolerance, "query")
        assert_close(key, expected_key[is_stored], tolerance, "key")
        assert_bitwise_equal(value, expected_value[is_stored].to(dtype), "value")
        assert query.dtype == dtype
        assert query.stride(-1) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_may_lie_apart(backend: str) -> None:
    """Every second row of all that has a row for each token."""
    ops, device = open_backend(backend)
    case = make_case(10, head_dim=64, dtype=torch.bfloat16, device=device)
    expected = case.run(ops)
    expected_caches = case.arguments["k_cache"].clone(), case.arguments["v_cache"].clone()
    for name in ("qkv", "slot_mapping"):
        case.arguments[name] = torch.stack([case.arguments[name]] * 2, 1)[:, 0]
        assert not case.arguments[name].is_contiguous()
    rope = case.arguments["rope"]
    case.arguments["rope"] = RopeRows(rope.table, torch.stack([rope.positions] * 2, 1)[:, 0])
    for name in ("k_cache", "v_cache"):
        case.arguments[name].fill_(SENTINEL)

    assert_bitwise_equal(case.run(ops), expected)
    for name, cache in zip(("k_cache", "v_cache"), expected_caches, strict=True):
        assert_bitwise_equal(case.arguments[name], cache, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rounds_sum_norm_and_product(backend: str) -> None:
    """Without rotation: all tokens stand at an angle of 0."""
    ops, device = open_backend(backend)
    case = make_case(37, head_dim=128, dtype=torch.bfloat16, device=device)
    case.angles.zero_()
    case.arguments["rope"].table[:] = torch.tensor([1.0] * 64 + [0.0] * 64, device=device)
    query = case.run(ops)
    assert_rounded_alike(query, case.heads()[0].to(torch.bfloat16))


REJECTED: dict[str, tuple[dict[str, Tensor], str]] = {
    "qkv-width": (
        {"qkv": torch.zeros(4, 161)},
        r"qkv: expected \[T, \(6 \+ 2 \* 2\) \* d\], got \[4, 161\]",
    ),
    "qkv-1d": ({"qkv": torch.zeros(160)}, r"qkv: expected 2 dimensions"),
    "bias-width": ({"bias": torch.zeros(159)}, r"bias: expected \[160\], got \[159\]"),
    "norm-shape": (
        {"norm_weight": torch.zeros(16)},
        r"norm_weight: expected \[8, 16\], got \[16\]",
    ),
    "int32-slots": (
        {"slot_mapping": torch.zeros(4, dtype=torch.int32)},
        r"slot_mapping: .*int64, got .*int32",
    ),
    "short-slots": (
        {"slot_mapping": torch.zeros(3, dtype=torch.int64)},
        r"slot_mapping: expected \[4\]",
    ),
    "wide-cache": ({"k_cache": torch.zeros(8, 16, 2, 64)}, r"k_cache: expected \[8, 16, 2, 16\]"),
    "fewer-heads": ({"k_cache": torch.zeros(8, 16, 1, 16)}, r"k_cache: expected \[8, 16, 2, 16\]"),
    "bf16-cache": (
        {"v_cache": torch.zeros(8, 16, 2, 16).bfloat16()},
        r"v_cache: expected dtype torch.float32",
    ),
    "strided-cache": (
        {"v_cache": torch.zeros(8, 2, 16, 16).transpose(1, 2)},
        r"v_cache: expected contiguous",
    ),
}


@pytest.mark.parametrize(("change", "message"), REJECTED.values(), ids=REJECTED.keys())
def test_rejects_bad_arguments_by_name(change: dict[str, Tensor], message: str) -> None:
    case = make_case(4)
    case.arguments |= change
    with pytest.raises(KernelArgumentError, match=message):
        case.run(cpu_ops())


@pytest.mark.parametrize(
    ("table", "positions", "message"),
    [
        (torch.zeros(9, 8), torch.zeros(4).long(), r"rope.table: expected \[9, 16\], got \[9, 8\]"),
        (torch.zeros(9, 16).bfloat16(), torch.zeros(4).long(), r"rope.table: expected dtype"),
        (torch.zeros(9, 16), torch.zeros(3).long(), r"rope.positions: expected \[4\], got \[3\]"),
    ],
    ids=["table-width", "table-dtype", "positions"],
)
def test_rejects_a_bad_rope(table: Tensor, positions: Tensor, message: str) -> None:
    case = make_case(4)
    case.arguments["rope"] = RopeRows(table, positions)
    with pytest.raises(KernelArgumentError, match=message):
        case.run(cpu_ops())
