"""Predicted memory against what the driver says is taken, the CUDA context included.

Run with ``-s`` to see predicted and measured bytes of every case.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest
import torch

from ember_pp import config as configuration
from ember_pp.devices import find_devices
from ember_pp.jobs.plan_prediction import predict
from ember_pp.jobs.session import open_client
from ember_pp.model_config import ModelConfig

pytestmark = [pytest.mark.gpu, pytest.mark.multiproc]

TOLERANCE = 0.03
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


def taken_bytes() -> int:
    """Memory of the first GPU that is not free, whoever has it."""
    free_bytes, total_bytes = torch.cuda.mem_get_info(0)
    return total_bytes - free_bytes


@pytest.mark.parametrize(
    ("architecture", "num_stages", "memory_gib"),
    [
        (QWEN3_4B, 1, None),  # the KV cache takes what is left
        (QWEN3_0_6B, 1, 12.0),
        (QWEN3_0_6B, 2, 6.0),  # two processes on one card, each with a context of its own
    ],
)
def test_a_run_takes_what_was_predicted(
    architecture: dict[str, Any], num_stages: int, memory_gib: float | None
) -> None:
    config = configuration.build(
        {
            "job": {"name": "serve"},
            "model": {"architecture": architecture, "load": "random", "dtype": "bfloat16"},
            "pipeline": {"stages": num_stages, "devices": ["cuda:0"] * num_stages},
            "cache": {"memory_gib": memory_gib},
            "scheduler": {"max_sequences": SEQUENCES},
            "plan": {
                "sequences": SEQUENCES,
                "prompt_tokens": PROMPT_TOKENS,
                "output_tokens": OUTPUT_TOKENS,
                "use_profile": False,
            },
        }
    )
    devices = find_devices(["cuda:0"] * num_stages)
    prediction = predict(config, ModelConfig.from_hf(architecture), devices, 1, num_stages)
    before = taken_bytes()  # this process's own context among it
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
        measured = taken_bytes() - before
        stages = client.status()["stages"]

    predicted = sum(stage.held.total for stage in prediction.stages)
    lines = [f"{config.model.architecture} on {devices[0].name}"]
    for stage, real in zip(prediction.stages, stages, strict=True):
        kinds = {name: size for name, size in dataclasses.asdict(stage.held).items() if size}
        lines += [
            "predicted " + ", ".join(f"{name} {size / GIB:.3f}" for name, size in kinds.items()),
            f"measured  weights {real['weight_bytes'] / GIB:.3f}, kv {real['kv_bytes'] / GIB:.3f}"
            f", most that torch has reserved {real.get('peak_bytes', 0) / GIB:.3f} GiB",
        ]
    lines.append(
        f"in all: predicted {predicted / GIB:.3f} GiB, measured {measured / GIB:.3f} GiB, "
        f"{predicted / measured - 1:+.2%}"
    )
    sys.stdout.write("\n" + "\n".join(lines) + "\n")
    assert predicted == pytest.approx(measured, rel=TOLERANCE)
