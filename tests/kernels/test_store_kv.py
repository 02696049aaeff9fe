"""store_kv: exact copy into the mapped slots, every other slot untouched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from conftest import BLOCK_SIZE, UGLY_SIZES
from ember_pp.errors import KernelArgumentError
from ember_pp.kernels import store_kv
from numeric import assert_bitwise_equal

NUM_BLOCKS, NUM_KV_HEADS, HEAD_DIM = 8, 2, 24
SENTINEL = -7.0  # exact in bf16
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def make_inputs(
    num_tokens: int, device: str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(num_tokens)
    # Views of one wider tensor, as the fused projection gives them.
    heads = torch.randn(num_tokens, 3 * NUM_KV_HEADS, HEAD_DIM, generator=generator)
    key, value = heads.to(device, dtype).split(NUM_KV_HEADS, dim=1)[1:]
    cache_shape = (NUM_BLOCKS, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
    k_cache = torch.full(cache_shape, SENTINEL, device=device, dtype=dtype)
    slots = torch.randperm(NUM_BLOCKS * BLOCK_SIZE, generator=generator)[:num_tokens].to(device)
    return key, value, k_cache, k_cache.clone(), slots


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("has_padding", [False, True], ids=["full", "padding"])
@pytest.mark.parametrize("num_tokens", UGLY_SIZES)
def test_writes_mapped_slots_and_nothing_else(
    num_tokens: int, has_padding: bool, dtype: torch.dtype, device: str
) -> None:
    key, value, k_cache, v_cache, slots = make_inputs(num_tokens, device, dtype)
    if has_padding:
        slots[1::3] = -1

    store_kv(key, value, k_cache, v_cache, slots)

    # Oracle: a loop a reader can check by eye, not the code under test.
    for name, new, cache in (("k", key, k_cache), ("v", value, v_cache)):
        expected = torch.full_like(cache, SENTINEL)
        for token, slot in enumerate(slots.tolist()):
            if slot >= 0:
                expected[slot // BLOCK_SIZE, slot % BLOCK_SIZE] = new[token]
        assert_bitwise_equal(cache, expected, f"{name}_cache")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(4, 2).bfloat16()}, r"key: expected 3 dimensions"),
        ({"value": torch.zeros(4, 1, 24).bfloat16()}, r"value: expected \[4, 2, 24\]"),
        (
            {"slot_mapping": torch.zeros(4, dtype=torch.int32)},
            r"slot_mapping: .*int64, got .*int32",
        ),
        ({"slot_mapping": torch.zeros(3, dtype=torch.int64)}, r"slot_mapping: expected \[4\]"),
        ({"k_cache": torch.zeros(8, 16, 2, 64).bfloat16()}, r"k_cache: expected \[8, 16, 2, 24\]"),
        ({"k_cache": torch.zeros(8, 16, 1, 24).bfloat16()}, r"k_cache: expected \[8, 16, 2, 24\]"),
        ({"v_cache": torch.zeros(8, 16, 2, 24)}, r"v_cache: expected dtype torch.bfloat16"),
        (
            {"v_cache": torch.zeros(8, 2, 16, 24).bfloat16().transpose(1, 2)},
            r"v_cache: expected contiguous",
        ),
    ],
    ids=[
        "key-2d",
        "narrow-value",
        "int32-slots",
        "short-slots",
        "wide-cache",
        "fewer-heads",
        "fp32-cache",
        "strided-cache",
    ],
)
def test_rejects_bad_arguments_by_name(change: dict[str, Tensor], message: str) -> None:
    names = ("key", "value", "k_cache", "v_cache", "slot_mapping")
    args = dict(zip(names, make_inputs(4), strict=True)) | change
    with pytest.raises(KernelArgumentError, match=message):
        store_kv(**args)
