"""Our model with CUDA kernels against transformers on the same GPU: the same random weights.

Shapes are those that kernels are made for: heads of 64 and 128, groups of every size that the
models have, tied and untied embeddings, biases. Logits of a prompt as a whole, in chunks, and of
decode steps in company, per position: in fp32 within ``numeric.LOGITS_FP32``, in bf16 as near to
transformers' fp32 as transformers' own bf16 is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import MakeCheckpoint
from numeric import (
    LOGITS_FP32,
    assert_as_near_as,
    assert_bitwise_equal,
    assert_close,
    mean_relative_error,
    relative_error,
)
from paged_model import PagedModel

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
NUM_TOKENS, NUM_DECODES = 300, 40
SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "vocab_size": 1009,
}
HEADS_128 = {"head_dim": 128}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-tied-group-2": (
        "qwen3",
        {**HEADS_128, "tie_word_embeddings": True},
    ),
    "qwen3-group-4": (
        "qwen3",
        {**HEADS_128, "num_attention_heads": 8, "num_key_value_heads": 2},
    ),
    "qwen3-group-5": (
        "qwen3",
        {**HEADS_128, "num_attention_heads": 5, "num_key_value_heads": 1},
    ),
    "qwen3-group-8": (
        "qwen3",
        {**HEADS_128, "num_attention_heads": 8, "num_key_value_heads": 1},
    ),
    "qwen3-heads-of-64-bias": (
        "qwen3",
        {"head_dim": 64, "tie_word_embeddings": True, "attention_bias": True},
    ),
    "qwen2-group-7": (
        "qwen2",
        {"hidden_size": 448, "num_attention_heads": 7, "num_key_value_heads": 1},
    ),
    "llama3": (
        "llama",
        {
            "num_attention_heads": 8,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ),
}


@dataclasses.dataclass(frozen=True)
class Oracle:
    """A checkpoint, a text, and transformers' logits of it."""

    folder: Path
    ids: list[int]
    exact: Tensor
    """[T, V] in fp32."""
    rounded: Tensor
    """[T, V] in bf16."""


@torch.inference_mode()
def hf_logits(folder: Path, dtype: torch.dtype, ids: list[int]) -> Tensor:
    transformers = pytest.importorskip("transformers")
    # eager: the plainest of transformers' attentions
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager"
    )
    return model.to(DEVICE)(torch.tensor([ids], device=DEVICE)).logits[0]


@pytest.fixture(scope="module", params=VARIANTS)
def oracle(request: pytest.FixtureRequest, make_checkpoint: MakeCheckpoint) -> Iterator[Oracle]:
    model_type, options = VARIANTS[request.param]
    # Weights that are bf16 numbers: both dtypes then compute with the same ones.
    folder = make_checkpoint(model_type, **(SHAPE | {"dtype": "bfloat16"} | options))
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, SHAPE["vocab_size"], (NUM_TOKENS,), generator=generator).tolist()
    exact, rounded = (hf_logits(folder, dtype, ids) for dtype in (torch.float32, torch.bfloat16))
    yield Oracle(folder, ids, exact, rounded)
    torch.cuda.empty_cache()


def whole(model: PagedModel, ids: list[int]) -> Tensor:
    return model.step({"a": ids})


def in_chunks(model: PagedModel, ids: list[int]) -> Tensor:
    """Chunks of every ugly length, the last ones beside another sequence's prompt and decodes."""
    pieces, start = [], 0
    for index, length in enumerate((1, 15, 17, 64, 37, 16, 2, 129, NUM_TOKENS)):
        chunk = ids[start : start + length]
        start += length
        rows = {"b": ids[:1], "a": chunk, "c": ids[:19]} if index >= 4 else {"a": chunk}
        skipped = 1 if index >= 4 else 0
        pieces.append(model.step(rows)[skipped : skipped + len(chunk)])
    return torch.cat(pieces)


def decoding(model: PagedModel, ids: list[int]) -> Tensor:
    """A prompt, then token by token: alone, among a few, and among many of other lengths."""
    num_prompt = NUM_TOKENS - NUM_DECODES
    others = {f"other {index}": ids[: 1 + 7 * index % 50] for index in range(36)}
    pieces = [model.step({"a": ids[:num_prompt]})]
    model.step(others)
    for index, token in enumerate(ids[num_prompt:]):
        company = list(others)[: (0, 3, 15, 36)[index * 4 // NUM_DECODES]]
        rows = {"a": [token]} | {name: [ids[index]] for name in company}
        pieces.append(model.step(rows)[:1])
    return torch.cat(pieces)


RUNS: dict[str, Callable[[PagedModel, list[int]], Tensor]] = {
    "whole": whole,
    "chunks": in_chunks,
    "decodes": decoding,
}


def compute(oracle: Oracle, run: str, dtype: torch.dtype, num_stages: int = 1) -> Tensor:
    """[T, V] logits of our model."""
    model = PagedModel(
        oracle.folder, device=DEVICE, kernels="cuda", dtype=dtype, num_stages=num_stages
    )
    return RUNS[run](model, oracle.ids)


Record = Callable[[str, object], None]


@pytest.mark.parametrize("run", RUNS)
def test_fp32_logits_are_those_of_transformers(
    oracle: Oracle, run: str, record_property: Record
) -> None:
    logits = compute(oracle, run, torch.float32)
    record_property("fp32_error", relative_error(logits, oracle.exact))
    assert_close(logits, oracle.exact, LOGITS_FP32)


@pytest.mark.parametrize("run", RUNS)
def test_bf16_logits_are_as_near_to_fp32_as_those_of_transformers(
    oracle: Oracle, run: str, record_property: Record
) -> None:
    """And equal bit by bit through two stages."""
    logits = compute(oracle, run, torch.bfloat16)
    for name, error in (("worst", relative_error), ("mean", mean_relative_error)):
        ours, theirs = error(logits, oracle.exact), error(oracle.rounded, oracle.exact)
        record_property(f"bf16_{name}_error", ours)
        record_property(f"bf16_{name}_error_of_transformers", theirs)
        record_property(f"bf16_{name}_error_over_that_of_transformers", ours / theirs)
    assert_as_near_as(oracle.rounded, logits, oracle.exact)
    assert_bitwise_equal(compute(oracle, run, torch.bfloat16, num_stages=2), logits, "two stages")
