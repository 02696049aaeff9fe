"""KVCache: separate, contiguous memory for each layer's keys and values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ember_pp.checkpoint import read_config
from ember_pp.errors import CapacityError
from ember_pp.model_config import ModelConfig
from ember_pp.partition import kv_bytes_per_token
from ember_pp.stage.kv_cache import KVCache


@pytest.fixture(scope="module")
def cfg(demo_path: Path) -> ModelConfig:
    return ModelConfig.from_hf(read_config(demo_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_layers_do_not_overlap_and_bytes_add_up(cfg: ModelConfig, dtype: torch.dtype) -> None:
    cache = KVCache.allocate(cfg, 3, num_blocks=5, block_size=4, dtype=dtype, device="cpu")
    caches = [part for index in range(3) for part in cache.layer(index)]
    for value, part in enumerate(caches):
        assert part.shape == (5, 4, cfg.num_kv_heads, cfg.head_dim)
        assert part.is_contiguous()
        part.fill_(value)
    for value, part in enumerate(caches):
        assert bool((part == value).all())
    assert (cache.num_blocks, cache.block_size) == (5, 4)
    assert cache.num_bytes == 5 * 4 * kv_bytes_per_token(cfg, 3, dtype.itemsize)


@pytest.mark.gpu
def test_more_than_the_card_has_names_the_setting(cfg: ModelConfig) -> None:
    num_blocks = 2**38 // (16 * kv_bytes_per_token(cfg, 10, 4))  # 256 GiB
    with pytest.raises(CapacityError) as error:
        KVCache.allocate(
            cfg, 10, num_blocks=num_blocks, block_size=16, dtype=torch.float32, device="cuda"
        )
    assert str(error.value).startswith(
        "cache.memory_gib: 256.00 GiB of KV cache do not fit on cuda: CUDA out of memory"
    )
    assert str(error.value).endswith("lower it, or cache.memory_share where it is not set")


def test_too_much_memory_names_the_setting(cfg: ModelConfig) -> None:
    with pytest.raises(CapacityError, match=r"cache.memory_gib: [\d.]+ GiB of KV cache do not fit"):
        KVCache.allocate(
            cfg, 10, num_blocks=2**40, block_size=16, dtype=torch.float32, device="cpu"
        )
