"""The peer of ``job=bench``: our weights, its own tokens, times in order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ember_pp.errors import ConfigError
from ember_pp.model_config import ModelConfig
from ember_pp.stage import transformers_run
from ember_pp.stage.weights import load_stage

CPU = torch.device("cpu")
ARCHITECTURE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
}
CFG = ModelConfig.from_hf(ARCHITECTURE)
PROMPTS = torch.randint(0, 97, (3, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    return transformers_run.load_model(CFG, ARCHITECTURE, None, dtype=torch.float32, device=CPU)


def test_random_weights_are_those_of_a_stage(model) -> None:
    ours = load_stage(None, CFG, 0, 3, is_first=True, is_last=True, dtype=torch.float32, device=CPU)
    assert torch.equal(model.model.embed_tokens.weight, ours.embedding)
    assert torch.equal(model.lm_head.weight, ours.lm_head)
    assert torch.equal(model.model.layers[2].mlp.down_proj.weight, ours.layers[2].down)
    theirs = model.model.layers[1].self_attn
    qkv = torch.cat([theirs.q_proj.weight, theirs.k_proj.weight, theirs.v_proj.weight])
    assert torch.equal(qkv, ours.layers[1].qkv)
    assert torch.equal(theirs.k_norm.weight, ours.layers[1].qk_norm[-1])


@pytest.mark.parametrize("attention", transformers_run.ATTENTION)
def test_tokens_are_those_of_generate(model, attention) -> None:
    model.set_attn_implementation(attention)
    first_s, end_s, tokens = transformers_run.decode(model, PROMPTS, 6)
    generated = model.generate(
        PROMPTS,
        attention_mask=torch.ones_like(PROMPTS),
        do_sample=False,
        max_new_tokens=6,
        min_new_tokens=6,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert tokens.tolist() == generated[:, PROMPTS.shape[1] :].tolist()
    assert 0 < first_s < end_s


def test_a_checkpoint_is_read(demo_path: Path) -> None:
    architecture = json.loads((demo_path / "config.json").read_text())
    cfg = ModelConfig.from_hf(architecture)
    model = transformers_run.load_model(
        cfg, architecture, str(demo_path), dtype=torch.float32, device=CPU
    )
    assert model.lm_head.weight.shape == (cfg.vocab_size, cfg.hidden_size)
    assert model.dtype == torch.float32


def test_running_out_of_memory_is_a_result(model, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(transformers_run, "decode", fail)
    assert transformers_run.measure(model, "sdpa", PROMPTS, 4, repeats=2) == {
        "error": "out of memory"
    }


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^job\.compare: transformers: "):
        transformers_run.load_model(
            CFG, {"model_type": "mambo"}, None, dtype=torch.float32, device=CPU
        )
