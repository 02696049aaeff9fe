"""Our model against transformers on the same weights: every variant of a configuration.

Logits per position within ``numeric.LOGITS_FP32``, greedy tokens equal, whatever the chunks
of the prompt, the company in the batch and the number of stages.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from conftest import BLOCK_SIZE, UGLY_SIZES, MakeCheckpoint
from numeric import (
    BF16_VS_OWN_FP32,
    LOGITS_FP32,
    assert_bitwise_equal,
    assert_close,
    relative_error,
)
from paged_model import PagedModel

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHARDS = {"max_shard_size": "60KB"}

VARIANTS = {
    "qwen3-tied": ("qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
    "qwen3-untied-wide-heads": ("qwen3", {"head_dim": 32}),
    "qwen3-attention-bias": ("qwen3", {"head_dim": 16, "attention_bias": True}),
    "qwen3-rope-theta-old": (
        "qwen3",
        {
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
            "spelling": "old",
        },
    ),
    "qwen3-yarn": ("qwen3", {"head_dim": 32, "rope_parameters": YARN}),
    "qwen3-yarn-old-sharded": (
        "qwen3",
        {"head_dim": 32, "rope_parameters": YARN, "spelling": "old", **SHARDS},
    ),
    "qwen3-yarn-all-fields": (
        "qwen3",
        {
            "head_dim": 32,
            "rope_parameters": YARN
            | {"beta_fast": 16.0, "beta_slow": 2.0, "mscale": 1.5, "mscale_all_dim": 0.7}
            | {"truncate": False},
        },
    ),
    "qwen3-linear": (
        "qwen3",
        {
            "head_dim": 16,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5},
        },
    ),
    "qwen3-one-kv-head": ("qwen3", {"head_dim": 16, "num_key_value_heads": 1}),
    "qwen3-no-groups": ("qwen3", {"head_dim": 16, "num_key_value_heads": 4}),
    "qwen2-sharded": ("qwen2", SHARDS),
    "qwen2-tied-old": ("qwen2", {"tie_word_embeddings": True, "spelling": "old"}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-llama3-old-biases": (
        "llama",
        {
            "rope_parameters": LLAMA3,
            "spelling": "old",
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 20,
        },
    ),
}


def hf_model(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    # eager: the plainest of transformers' attentions
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")


@torch.inference_mode()
def hf_logits(model: torch.nn.Module, ids: list[int]) -> Tensor:
    return model(torch.tensor([ids])).logits[0]


@torch.inference_mode()
def hf_greedy(model: torch.nn.Module, ids: list[int], num_tokens: int) -> list[int]:
    tokens, cache, output = torch.tensor([ids]), None, []
    for _ in range(num_tokens):
        result = model(tokens, past_key_values=cache, use_cache=True)
        cache, tokens = result.past_key_values, result.logits[:, -1:].argmax(-1)
        output.append(int(tokens))
    return output


def random_ids(num_tokens: int, vocab_size: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (num_tokens,), generator=generator).tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_greedy_tokens_equal_transformers(
    variant: str, make_checkpoint: MakeCheckpoint
) -> None:
    model_type, options = VARIANTS[variant]
    folder = make_checkpoint(model_type, **options)
    ids = random_ids(100, 131)
    oracle = hf_model(folder)

    ours = PagedModel(folder).step({"a": ids})

    assert_close(ours, hf_logits(oracle, ids), LOGITS_FP32)
    expected = hf_greedy(oracle, ids[:20], 64)
    assert len(set(expected)) > 8, "a model that repeats itself proves little"
    assert PagedModel(folder).greedy({"a": ids[:20]}, 64)["a"] == expected


@pytest.fixture(scope="module")
def demo_oracle(demo_path: Path) -> torch.nn.Module:
    return hf_model(demo_path)


@pytest.fixture(scope="module")
def text_ids(demo_path: Path) -> list[int]:
    """English, as the demo model's tokenizer sees it."""
    from tokenizers import Tokenizer

    text = (
        "The river rises in the mountains of the north and flows through three countries "
        "before it reaches the sea. In the nineteenth century its valley was a centre of "
        "trade, and many of the old towns still have their walls. "
    )
    return Tokenizer.from_file(str(demo_path / "tokenizer.json")).encode(text * 3).ids[:120]


def test_demo_equals_transformers(
    demo_path: Path, demo_oracle: torch.nn.Module, text_ids: list[int]
) -> None:
    model = PagedModel(demo_path)

    assert_close(model.step({"a": text_ids}), hf_logits(demo_oracle, text_ids), LOGITS_FP32)
    expected = hf_greedy(demo_oracle, text_ids[:30], 64)
    assert model.greedy({"b": text_ids[:30]}, 64)["b"] == expected


@pytest.mark.parametrize("chunk", [*UGLY_SIZES, 2 * BLOCK_SIZE + 3])
def test_prompt_in_chunks_equals_the_whole(
    chunk: int, demo_path: Path, demo_oracle: torch.nn.Module, text_ids: list[int]
) -> None:
    model = PagedModel(demo_path)

    pieces = [model.step({"a": text_ids[i : i + chunk]}) for i in range(0, len(text_ids), chunk)]

    assert_close(torch.cat(pieces), hf_logits(demo_oracle, text_ids), LOGITS_FP32)


def test_many_at_once_equal_each_alone(
    demo_path: Path, demo_oracle: torch.nn.Module, text_ids: list[int]
) -> None:
    """Decodes of very different contexts beside chunks that begin, go on and repeat a length."""
    model = PagedModel(demo_path)
    lens = {"a": 1, "b": 15, "c": 16, "d": 17, "e": 90, "f": 17, "g": 119, "h": 2}
    for name, num_tokens in lens.items():
        model.step({name: text_ids[:num_tokens]})
    rows = {name: text_ids[num_tokens : num_tokens + 1] for name, num_tokens in lens.items()}
    rows["g"] = text_ids[119:120]
    starts = dict(lens)
    for name, (start, num_tokens) in {
        "i": (0, 40),
        "j": (0, 40),
        "k": (0, 7),
        "l": (31, 40),
        "m": (16, 16),
        "n": (5, 1),
    }.items():
        if start:
            model.step({name: text_ids[:start]})
        rows[name], starts[name] = text_ids[start : start + num_tokens], start

    together = model.step(rows)

    whole = hf_logits(demo_oracle, text_ids)
    expected = [whole[starts[name] : starts[name] + len(ids)] for name, ids in rows.items()]
    assert_close(together, torch.cat(expected), LOGITS_FP32)


def test_greedy_tokens_do_not_depend_on_company(demo_path: Path, text_ids: list[int]) -> None:
    prompts = {str(start): text_ids[start : start + 3 + 5 * start] for start in range(12)}

    together = PagedModel(demo_path).greedy(prompts, 24)

    alone = PagedModel(demo_path)
    for name, ids in prompts.items():
        assert alone.greedy({name: ids}, 24)[name] == together[name], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_hidden_states_do_not_depend_on_the_split(
    tiny_checkpoint: Path, dtype: torch.dtype
) -> None:
    """Same steps through 1, 2, 3 and 8 stages: every layer's output equal bit by bit."""
    ids = random_ids(60, 4096)
    recorded: dict[int, list[Tensor]] = {}
    for num_stages in (1, 2, 3, 8):
        model = PagedModel(tiny_checkpoint, num_stages=num_stages, dtype=dtype)
        recorded[num_stages] = hidden = []
        hidden.append(model.step({"a": ids[:33], "b": ids[:20]}, hidden=hidden))
        hidden.append(model.step({"b": ids[20:21], "a": ids[33:50]}, hidden=hidden))
        hidden.append(model.step({"b": ids[21:22], "a": ids[50:51]}, hidden=hidden))

    for num_stages, hidden in recorded.items():
        assert len(hidden) == 3 * (8 + 1)
        for index, (one, many) in enumerate(zip(recorded[1], hidden, strict=True)):
            assert_bitwise_equal(many, one, f"{num_stages} stages, output {index}")


def test_bf16_is_as_close_to_fp32_as_transformers_bf16(
    demo_path: Path, demo_oracle: torch.nn.Module, text_ids: list[int]
) -> None:
    exact = hf_logits(demo_oracle, text_ids)
    theirs = relative_error(hf_logits(hf_model(demo_path, torch.bfloat16), text_ids), exact)

    ours = relative_error(PagedModel(demo_path, dtype=torch.bfloat16).step({"a": text_ids}), exact)

    assert 0 < ours <= theirs * BF16_VS_OWN_FP32, f"{ours=:.4f} {theirs=:.4f}"


def test_a_head_that_a_tied_model_stores_is_the_one_that_counts(
    make_checkpoint: MakeCheckpoint,
) -> None:
    """As transformers 5: two different tensors are not tied, whatever the configuration says."""
    from safetensors.torch import load_file, save_file

    folder = make_checkpoint("qwen3", head_dim=16, tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ids = random_ids(30, 131)
    expected = hf_logits(hf_model(folder), ids)

    for num_stages in (1, 3):
        assert_close(
            PagedModel(folder, num_stages=num_stages).step({"a": ids}), expected, LOGITS_FP32
        )


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["cuda", "reference"])
def test_gpu_equals_transformers_on_the_cpu(
    kernels: str, demo_path: Path, demo_oracle: torch.nn.Module, text_ids: list[int]
) -> None:
    model = PagedModel(demo_path, device="cuda", num_stages=2, kernels=kernels)
    logits = torch.cat([model.step({"a": text_ids[:50]}), model.step({"a": text_ids[50:]})])
    assert_close(logits, hf_logits(demo_oracle, text_ids), LOGITS_FP32)


@pytest.mark.gpu
def test_bf16_decodes_on_a_gpu_are_as_close_to_fp32_as_transformers_bf16(
    demo_path: Path, demo_oracle: torch.nn.Module, text_ids: list[int]
) -> None:
    """Token by token, so that the kernel for decodes attends to what another one stored."""
    exact = hf_logits(demo_oracle, text_ids)
    theirs = relative_error(hf_logits(hf_model(demo_path, torch.bfloat16), text_ids), exact)

    for num_stages in (1, 3):
        model = PagedModel(
            demo_path, device="cuda", dtype=torch.bfloat16, num_stages=num_stages, kernels="cuda"
        )
        logits = [model.step({"a": text_ids[:7], "b": text_ids[:40]})[:7].cpu()]
        for token in text_ids[7:]:
            logits.append(model.step({"b": text_ids[:1], "a": [token]})[1:].cpu())

        ours = relative_error(torch.cat(logits), exact)
        assert 0 < ours <= theirs * BF16_VS_OWN_FP32, f"{ours=:.4f} {theirs=:.4f}"
