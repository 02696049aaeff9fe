"""ModelConfig: both spellings of config.json, and refusal by name of what is not supported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from ember_pp.errors import CheckpointError
from ember_pp.model_config import ModelConfig

BASE: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 96,
    "vocab_size": 100,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "hidden_act": "silu",
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def read(**change: Any) -> ModelConfig:
    return ModelConfig.from_hf({**BASE, **change})


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in BASE.items() if key not in keys}


def test_both_spellings_give_the_same() -> None:
    old = read(rope_scaling=YARN, torch_dtype="bfloat16")
    new = ModelConfig.from_hf(
        without("rope_theta") | {"rope_parameters": YARN | {"rope_theta": 1e6}, "dtype": "bfloat16"}
    )
    nested = ModelConfig.from_hf(
        without("rope_theta") | {"rope_parameters": {"full_attention": YARN | {"rope_theta": 1e6}}}
    )
    oldest = read(rope_scaling={"type": "yarn", **without_key(YARN, "rope_type")})
    assert old == new == nested == oldest
    assert old.rope.theta == 1e6
    assert old.rope.factor == 4.0
    assert old.rope.attention_factor == pytest.approx(1.1386, abs=1e-4)


def without_key(fields: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != key}


def test_plain_values_survive_json() -> None:
    config = read(rope_scaling=YARN, attention_bias=True)
    assert ModelConfig.from_plain(json.loads(json.dumps(config.to_plain()))) == config


@pytest.mark.parametrize(
    ("change", "biases"),
    [
        ({}, (True, False, False, False)),
        ({"attention_bias": True}, (True, True, True, False)),
        ({"model_type": "qwen2"}, (False, True, False, False)),
        ({"model_type": "llama"}, (False, False, False, False)),
        (
            {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
            (False, True, True, True),
        ),
    ],
    ids=["qwen3", "qwen3-bias", "qwen2", "llama", "llama-biases"],
)
def test_switches_follow_the_model_type(change: dict[str, Any], biases: tuple[bool, ...]) -> None:
    config = read(**change)
    switches = (
        config.has_qk_norm,
        config.has_qkv_bias,
        config.has_output_bias,
        config.has_mlp_bias,
    )
    assert switches == biases
    names = config.layer_shapes()
    assert ("self_attn.q_norm.weight" in names) == config.has_qk_norm
    assert ("self_attn.v_proj.bias" in names) == config.has_qkv_bias
    assert ("self_attn.o_proj.bias" in names) == config.has_output_bias
    assert ("mlp.down_proj.bias" in names) == config.has_mlp_bias


def test_defaults_are_those_of_transformers() -> None:
    config = ModelConfig.from_hf(without("head_dim", "rope_theta", "rms_norm_eps", "hidden_act"))
    assert (config.head_dim, config.rope.theta, config.rms_norm_eps) == (128, 1e4, 1e-6)
    assert not config.tie_word_embeddings
    llama = without("head_dim", "num_key_value_heads") | {"model_type": "llama"}
    assert ModelConfig.from_hf(llama).head_dim == 16
    assert ModelConfig.from_hf(llama).num_kv_heads == 4


def test_yarn_stretches_the_context() -> None:
    assert read().context_length == 256
    stretched = read(rope_scaling=YARN | {"factor": 8.0})
    assert (stretched.max_position_embeddings, stretched.context_length) == (256, 512)
    unstated = read(rope_scaling={"rope_type": "yarn", "original_max_position_embeddings": 64})
    assert unstated.rope.factor == 4.0


def test_original_length_beside_the_map_wins() -> None:
    config = read(rope_scaling=YARN, original_max_position_embeddings=128)
    assert config.rope.original_max_position_embeddings == 128


@pytest.mark.parametrize(
    "change",
    [
        {"sliding_window": 4096, "use_sliding_window": False},
        {"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 4},
        {"sliding_window": None, "use_sliding_window": True},
        {"layer_types": ["full_attention"] * 4, "sliding_window": 32, "use_sliding_window": True},
        {"quantization_config": None, "num_experts": 0, "partial_rotary_factor": 1.0},
        {"rope_scaling": {"rope_type": "default", "factor": None}},
        {"attention_dropout": 0.1, "some_future_note": "kept"},
    ],
    ids=["off", "no-layer", "none", "full", "neutral", "null", "training-only"],
)
def test_accepts_what_does_not_change_the_numbers(change: dict[str, Any]) -> None:
    assert read(**change) == read()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen3_moe"}, r"model_type: 'qwen3_moe' is not supported; .*qwen3, qwen2"),
        ({"model_type": None}, r"model_type: None is not supported"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, r"architectures: .*Sequence"),
        ({"architectures": "Qwen3"}, r"architectures: expected a list"),
        ({"hidden_act": "gelu"}, r"hidden_act: 'gelu' is not supported"),
        ({"use_sliding_window": True, "sliding_window": 8}, r"sliding_window: 8 is in use"),
        (
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
            r"sliding_window: 8 is in use",
        ),
        ({"model_type": "llama", "sliding_window": 8}, r"sliding_window: 8 is in use"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, r"layer_types: 'sliding_att"),
        ({"layer_types": "full_attention"}, r"layer_types: expected a list"),
        ({"quantization_config": {"quant_method": "awq"}}, r"quantization_config: 'dict' is not"),
        ({"num_experts": 64}, r"num_experts: 64 is not supported"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor: 0.5 is not supported"),
        ({"logits_scaling": 8.0}, r"logits_scaling: 8.0 is not supported"),
        ({"rope_scaling": {"rope_type": "longrope"}}, r"rope_type: 'longrope' is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, r"rope_type: 'dynamic'"),
        ({"rope_scaling": {"factor": 2.0}}, r"rope_scaling.factor: not supported with .*'default'"),
        ({"rope_scaling": YARN | {"mrope_section": [1]}}, r"rope_scaling.mrope_section: not"),
        (
            {"rope_scaling": YARN | {"partial_rotary_factor": 0.5}},
            r"rope_scaling.partial_rotary_factor: not",
        ),
        ({"rope_scaling": "yarn"}, r"rope_scaling: expected a map, got 'yarn'"),
        ({"rope_scaling": YARN | {"factor": "4"}}, r"factor: expected a number above 0, got '4'"),
        ({"rope_scaling": {"rope_type": "linear"}}, r"factor: expected a number above 0, is miss"),
        (
            {
                "rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4}
                | {"high_freq_factor": 4}
            },
            r"high_freq_factor: expected above low_freq_factor=4.0, got 4.0",
        ),
        ({"hidden_size": "64"}, r"hidden_size: expected a whole number above 0, got '64'"),
        ({"hidden_size": True}, r"hidden_size: expected a whole number"),
        ({"vocab_size": None}, r"vocab_size: expected a whole number above 0, is missing"),
        ({"num_hidden_layers": 0}, r"num_hidden_layers: expected a whole number above 0, got 0"),
        ({"rms_norm_eps": -1.0}, r"rms_norm_eps: expected a number above 0, got -1.0"),
        ({"rope_theta": float("nan")}, r"rope_theta: expected a number above 0, got nan"),
        ({"tie_word_embeddings": "yes"}, r"tie_word_embeddings: expected true or false"),
        ({"num_key_value_heads": 3}, r"num_attention_heads: expected a multiple of .*=3, got 4"),
        ({"head_dim": 33}, r"head_dim: expected an even number, got 33"),
    ],
)
def test_refuses_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"config.json: {message}"):
        read(**change)


def test_reads_what_transformers_writes(demo_path: Path) -> None:
    from transformers import AutoConfig

    theirs = AutoConfig.from_pretrained(demo_path)
    ours = ModelConfig.from_hf(theirs.to_dict())
    assert ours == ModelConfig.from_hf(json.loads((demo_path / "config.json").read_text()))
    assert ours.head_dim == theirs.head_dim != theirs.hidden_size // theirs.num_attention_heads


def test_every_preset_is_a_model_we_run() -> None:
    """``conf/model``: layers, width and parameters as the model cards say."""
    billions = {"0.6b": 0.6, "1.7b": 1.7, "4b": 4.0, "8b": 8.2, "14b": 14.8, "32b": 32.8}
    for size, expected in billions.items():
        path = Path(__file__).parents[1] / "conf" / "model" / f"qwen3-{size}.yaml"
        config = ModelConfig.from_hf(yaml.safe_load(path.read_text())["architecture"])
        shapes = config.layer_shapes().values()
        per_layer = sum(shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes)
        heads = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
        total = config.num_layers * per_layer + heads + config.hidden_size
        assert total / 1e9 == pytest.approx(expected, abs=0.051), size
