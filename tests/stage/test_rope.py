"""rope_table: transformers' cosines and sines, for every kind of stretching."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ember_pp.kernels import RopeRows
from ember_pp.model_config import ModelConfig
from ember_pp.stage.rope import rope_table
from numeric import assert_bitwise_equal, assert_close, sum_tolerance

KINDS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "large-theta": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn-short": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 20},
    "yarn-attention-factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
        "attention_factor": 0.7,
        "truncate": False,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_transformers(kind: str, head_dim: int) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    hf_config = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=40960,
        rope_parameters={"rope_theta": 5e5} | KINDS[kind],
    )
    positions = torch.tensor([0, 1, 17, 1000, 40959])
    cos, sin = LlamaRotaryEmbedding(hf_config)(torch.zeros(1), positions[None])
    rope = ModelConfig.from_hf(hf_config.to_dict()).rope

    ours_cos, ours_sin = RopeRows(rope_table(rope, head_dim, 40960), positions).cos_sin

    # An angle of 40959 radians has 11 bits left of fp32 behind the point.
    tolerance = sum_tolerance(torch.float32, 1) + 40959 * 2.0**-23
    assert_close(ours_cos, cos[0], tolerance, "cos")
    half = head_dim // 2
    assert_close(ours_sin[1:, half:], sin[0, 1:, half:], tolerance, "sin")
    assert_bitwise_equal(ours_sin[:, :half], -ours_sin[:, half:], "negated half")
