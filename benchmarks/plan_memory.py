"""Predicted memory of a run on a GPU against what the driver says is taken, context included.

    python -m benchmarks.plan_memory [--output FILE]

Each case starts stages with random weights, serves a burst of requests, and compares what
``job=plan`` predicts with the memory that is not free any more (``cudaMemGetInfo``). Nothing else
may use the card meanwhile. ``tests/gpu/test_memory.py`` holds the bound.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.conditions import conditions
from ember_pp import config as configuration
from ember_pp.devices import find_devices
from ember_pp.jobs.plan_prediction import predict
from ember_pp.jobs.session import open_client
from ember_pp.model_config import ModelConfig

GIB = 1024**3
SEQUENCES, PROMPT_TOKENS, OUTPUT_TOKENS = 64, 256, 16
QWEN3_0_6B: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
QWEN3_4B = QWEN3_0_6B | {
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "intermediate_size": 9728,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model on one card; ``memory_gib`` None: the KV cache takes what is left."""

    name: str
    architecture: dict[str, Any]
    num_stages: int
    memory_gib: float | None


CASES = (
    Case("qwen3-4b, 1 stage, the rest of the card", QWEN3_4B, 1, None),
    Case("qwen3-0.6b, 1 stage, 12 GiB of KV", QWEN3_0_6B, 1, 12.0),
    Case("qwen3-0.6b, 2 stages on one card", QWEN3_0_6B, 2, 6.0),
)


def measure(case: Case) -> dict[str, Any]:
    """Bytes of one case: predicted by kind and stage, reserved by torch, taken from the card."""
    config = _config(case)
    devices = find_devices(["cuda:0"] * case.num_stages)
    cfg = ModelConfig.from_hf(case.architecture)
    prediction = predict(config, cfg, devices, 1, case.num_stages)
    before = _taken_bytes()  # this process's own context among it
    sampling = {"temperature": 0.0, "max_tokens": OUTPUT_TOKENS, "ignore_eos": True}
    with open_client(config) as client:
        requests = [
            client.submit(
                token_ids=[(request + index) % 1000 for index in range(PROMPT_TOKENS)],
                sampling=sampling,
            )
            for request in range(SEQUENCES)
        ]
        for request in requests:
            request.result(300.0)
        measured = _taken_bytes() - before
        stages = client.status()["stages"]
    predicted = sum(stage.held.total for stage in prediction.stages)
    graphs = sum(stage.held.graphs for stage in prediction.stages)
    return {
        "case": case.name,
        "card": torch.cuda.get_device_name(0),
        "predicted_bytes": predicted,
        "graph_bytes": graphs,  # set aside, and taken only as far as graphs are captured
        "measured_bytes": measured,
        "predicted_over_measured": predicted / measured,
        "stages": [
            {
                "predicted": dataclasses.asdict(stage.held),
                "weight_bytes": real["weight_bytes"],
                "kv_bytes": real["kv_bytes"],
                "torch_reserved_bytes": real.get("peak_bytes", 0),
            }
            for stage, real in zip(prediction.stages, stages, strict=True)
        ],
    }


def render(result: dict[str, Any]) -> str:
    """One case for a reader."""
    lines = [f"{result['case']}, {result['card']}"]
    for stage in result["stages"]:
        kinds = {name: size for name, size in stage["predicted"].items() if size}
        lines += [
            "  predicted " + ", ".join(f"{name} {size / GIB:.3f}" for name, size in kinds.items()),
            f"  measured  weights {stage['weight_bytes'] / GIB:.3f}, kv "
            f"{stage['kv_bytes'] / GIB:.3f}, reserved by torch "
            f"{stage['torch_reserved_bytes'] / GIB:.3f} GiB",
        ]
    lines.append(
        f"  in all: predicted {result['predicted_bytes'] / GIB:.3f} GiB, measured "
        f"{result['measured_bytes'] / GIB:.3f} GiB, {result['predicted_over_measured'] - 1:+.2%}"
    )
    return "\n".join(lines)


def main() -> None:
    """Measure every case, print, and store."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    results = []
    for case in CASES:
        results.append(measure(case))
        print(render(results[-1]), flush=True)
    if arguments.output is not None:
        stored = {"benchmark": "plan_memory", "conditions": conditions(), "results": results}
        arguments.output.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


def _config(case: Case) -> configuration.Config:
    return configuration.build(
        {
            "job": {"name": "serve"},
            "model": {"architecture": case.architecture, "load": "random", "dtype": "bfloat16"},
            "pipeline": {"stages": case.num_stages, "devices": ["cuda:0"] * case.num_stages},
            "cache": {"memory_gib": case.memory_gib},
            "scheduler": {"max_sequences": SEQUENCES},
            "plan": {
                "sequences": SEQUENCES,
                "prompt_tokens": PROMPT_TOKENS,
                "output_tokens": OUTPUT_TOKENS,
                "use_profile": False,
            },
        }
    )


def _taken_bytes() -> int:
    """Memory of the first GPU that is not free, whoever has it."""
    free_bytes, total_bytes = torch.cuda.mem_get_info(0)
    return total_bytes - free_bytes


if __name__ == "__main__":
    main()
