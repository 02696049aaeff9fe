"""Two CPU stages of one thread each against one stage of one thread: same model, same plans.

    python -m benchmarks.pipeline_cpu [--repeats 3] [--output benchmarks/results/pipeline_cpu.json]

A random model of equal layers, whose steps take well over 5 ms; the number of plans in
flight is the same in both, so the scheduler makes the same plans. Runs alternate, and the
ratio is taken pair by pair. Prints a table and the bubble of each stage, and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.conditions import conditions
from ember_pp import config as configuration
from ember_pp.client import Client
from ember_pp.jobs.session import open_client

ARCHITECTURE = {
    "model_type": "qwen3",
    "hidden_size": 512,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1536,
    "vocab_size": 1024,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
NUM_REQUESTS = 96
PROMPT_TOKENS = 32
OUTPUT_TOKENS = 32
MAX_IN_FLIGHT = 3


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    runs: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for _ in range(options.repeats):
        for num_stages, results in runs.items():
            results.append(run_once(num_stages))
            print(f"{num_stages} stage(s): {describe(results[-1])}", flush=True)
    ratios = [
        two["tokens_per_s"] / one["tokens_per_s"] for one, two in zip(runs[1], runs[2], strict=True)
    ]
    report = {
        "benchmark": "pipeline_cpu",
        "conditions": conditions(),
        "architecture": ARCHITECTURE,
        "workload": {
            "requests": NUM_REQUESTS,
            "prompt_tokens": PROMPT_TOKENS,
            "output_tokens": OUTPUT_TOKENS,
            "max_in_flight": MAX_IN_FLIGHT,
            "threads_per_stage": 1,
            "dtype": "float32",
        },
        "runs": {str(num_stages): results for num_stages, results in runs.items()},
        "speedup": {"median": statistics.median(ratios), "all": ratios},
    }
    print(f"two stages over one: {statistics.median(ratios):.2f}x (all: {ratios})")
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=2) + "\n")


def run_once(num_stages: int) -> dict[str, Any]:
    """One engine: warm up, then time the workload."""
    config = configuration.build(
        {
            "job": {"name": "serve"},
            "model": {"load": "random", "architecture": ARCHITECTURE, "dtype": "float32"},
            "pipeline": {
                "stages": num_stages,
                "devices": "cpu",
                "cpu_threads": 1,
                "max_in_flight": MAX_IN_FLIGHT,
                "run_ahead": 0,  # so that the micro-batches are the same for any stages
            },
            "cache": {"memory_gib": 0.5, "prefix": False},
            "scheduler": {"max_sequences": NUM_REQUESTS},
        }
    )
    with open_client(config) as client:
        run_workload(client, num_requests=6, output_tokens=4)
        before = stage_times(client)
        plans_before = client.status()["num_plans"]
        started_s = time.perf_counter()
        num_tokens = run_workload(client, num_requests=NUM_REQUESTS, output_tokens=OUTPUT_TOKENS)
        elapsed_s = time.perf_counter() - started_s
        num_plans = client.status()["num_plans"] - plans_before
        time.sleep(1.2)  # stages report once a second
        after = stage_times(client)
    busy = [(end - start) / 1e9 / elapsed_s for start, end in zip(before, after, strict=True)]
    return {
        "tokens_per_s": num_tokens / elapsed_s,
        "elapsed_s": elapsed_s,
        "num_plans": num_plans,
        "busy_ms_per_plan": [b * elapsed_s * 1e3 / num_plans for b in busy],
        "bubble_fraction": [max(0.0, 1.0 - b) for b in busy],
    }


def run_workload(client: Client, *, num_requests: int, output_tokens: int) -> int:
    """Submit everything at once and wait; returns the number of generated tokens."""
    rng = random.Random(0)
    sampling = {"temperature": 0.0, "max_tokens": output_tokens, "ignore_eos": True}
    requests = [
        client.submit(
            token_ids=[rng.randrange(ARCHITECTURE["vocab_size"]) for _ in range(PROMPT_TOKENS)],  # type: ignore[arg-type]
            sampling=sampling,
        )
        for _ in range(num_requests)
    ]
    return sum(request.result(600.0).num_output_tokens for request in requests)


def stage_times(client: Client) -> list[int]:
    """Busy nanoseconds of each stage since its start."""
    return [stage.get("busy_ns", 0) for stage in client.status()["stages"]]


def describe(result: dict[str, Any]) -> str:
    """One run in words."""
    busy = ", ".join(f"{ms:.1f}" for ms in result["busy_ms_per_plan"])
    bubble = ", ".join(f"{fraction:.1%}" for fraction in result["bubble_fraction"])
    return (
        f"{result['tokens_per_s']:.0f} tokens/s, {result['num_plans']} plans, busy {busy} ms a "
        f"plan, bubble {bubble}"
    )


if __name__ == "__main__":
    main()
