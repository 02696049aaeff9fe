"""Fixtures that several tests share: the demo model, tiny random checkpoints, ugly sizes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Before torch is imported, here or in a stage process: the order of sums must not depend on
# how many cores the machine has.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
# Tests never ask the network, and transformers' bars would hide their output.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

BLOCK_SIZE = 16
UGLY_SIZES = (1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 37)
"""Around a block, and a prime."""

DEMO_PATH = Path(__file__).parents[1] / "ember_pp" / "demo"

_TINY = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "vocab_size": 131,
    "max_position_embeddings": 512,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}

MakeCheckpoint = Callable[..., Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """``gpu`` tests skip where there is no CUDA device."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def demo_path() -> Path:
    """The bundled demo model: trained weights, tokenizer, chat template."""
    return DEMO_PATH


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> MakeCheckpoint:
    """``make_checkpoint(model_type, *, spelling="new", dtype="float32", **config)``: a folder
    with a tiny random checkpoint that transformers wrote.

    ``config`` overrides fields of the tiny default (3 layers, 4 heads, hidden size 48).
    ``spelling="old"`` writes ``rope_theta``, ``rope_scaling`` and ``torch_dtype`` as
    transformers 4 did. ``max_shard_size`` below the model's size makes shards and an index.
    Norm weights and biases are random too: ones and zeros would hide that they are unused.
    """

    def make(model_type: str = "qwen3", **options: Any) -> Path:
        folder = tmp_path_factory.mktemp(model_type)
        write_checkpoint(folder, model_type, **options)
        return folder

    return make


def write_checkpoint(
    folder: Path,
    model_type: str,
    *,
    spelling: str = "new",
    dtype: str = "float32",
    max_shard_size: str = "5GB",
    seed: int = 0,
    **config: Any,
) -> None:
    """What ``make_checkpoint`` does, into ``folder``."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    hf_config = AutoConfig.for_model(model_type, **(_TINY | config))
    model = AutoModelForCausalLM.from_config(hf_config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_matrix = parameter.dim() == 2
            # Larger than transformers' 0.02, so that attention is far from uniform.
            deviation = parameter.shape[-1] ** -0.5 * 1.5 if is_matrix else 0.2
            parameter.normal_(1.0 if "norm" in name else 0.0, deviation)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    if spelling == "old":
        _spell_as_transformers_4(folder / "config.json")


def _spell_as_transformers_4(path: Path) -> None:
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["torch_dtype"] = config.pop("dtype")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope == {"rope_type": "default"} else rope
    path.write_text(json.dumps(config))


@pytest.fixture(scope="session")
def tiny_checkpoint(make_checkpoint: MakeCheckpoint, demo_path: Path) -> Path:
    """A random qwen3 of 8 layers in three shards, with the demo model's tokenizer."""
    folder = make_checkpoint(
        "qwen3",
        num_hidden_layers=8,
        hidden_size=64,
        head_dim=32,
        intermediate_size=96,
        vocab_size=json.loads((demo_path / "config.json").read_text())["vocab_size"],
        tie_word_embeddings=True,
        max_shard_size="600KB",
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(demo_path / name, folder / name)
    return folder
