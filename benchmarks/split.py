"""Layers split by cost against layers split equally: in the simulator, and with real processes.

    python -m benchmarks.split [--output benchmarks/results/split.json]

Simulated: Qwen3 0.6B, 4B, 8B and 32B on four equal cards, eight requests a stage, the times of
stages from byte counts; short requests, whose steps read weights and little else, and longer
ones. ``decode`` is the ratio of the times between tokens, ``whole run`` counts prompts too.

Measured: two CPU stages of one thread each, a model whose lm_head reads as much as four of its
eight layers. A profile is measured first; then the same requests run with layers split equally,
by counts (``counted``) and by the profile (``measured``). All else is the same in these. Runs
alternate, and ratios are taken round by round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.conditions import conditions
from ember_pp import config as configuration
from ember_pp.__main__ import conf_folder
from ember_pp.client import Client
from ember_pp.config import Config
from ember_pp.coordinator.simulator import Arrival
from ember_pp.devices import cpu_device, parse_devices
from ember_pp.jobs.plan_prediction import Prediction, predict
from ember_pp.jobs.plan_profile import measure_all
from ember_pp.jobs.plan_workload import make_scheduler, make_simulation
from ember_pp.jobs.session import open_client
from ember_pp.model_config import ModelConfig

CARDS = "4xRTX 3090"
PRESETS = ("qwen3-0.6b", "qwen3-4b", "qwen3-8b", "qwen3-32b")
SIMULATED = {
    # What a step reads is weights, nearly all of it.
    "short": {"sequences": 32, "prompt_tokens": 16, "output_tokens": 64},
    # Keys and values of long sequences are read by layers alone, and make the head count less.
    "long": {"sequences": 32, "prompt_tokens": 512, "output_tokens": 256},
}

ARCHITECTURE = {
    "model_type": "qwen3",
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1536,
    "vocab_size": 25_600,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
MEASURED = {"sequences": 32, "prompt_tokens": 16, "output_tokens": 96}


def main() -> None:
    """Simulate, measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    simulated = {
        name: {preset: simulate_preset(preset, name) for preset in PRESETS} for name in SIMULATED
    }
    with tempfile.TemporaryDirectory() as folder:
        measured = measure_processes(folder, options.repeats)
    report = {
        "benchmark": "split",
        "conditions": conditions(),
        "simulated": {"devices": CARDS, "workloads": SIMULATED, "models": simulated},
        "measured": measured,
    }
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=2) + "\n")


# --------------------------------------------------------------------------------------
# simulated


def simulate_preset(preset: str, workload: str) -> dict[str, Any]:
    """One model over the cards, with both splits."""
    model = yaml.safe_load((conf_folder() / "model" / f"{preset}.yaml").read_text())
    results = {}
    for split in ("equal", "auto"):
        config = configuration.build(
            {
                "model": model,
                "pipeline": {"stages": 4, "split": split},
                "plan": SIMULATED[workload] | {"use_profile": False},
            }
        )
        cfg = ModelConfig.from_hf(model["architecture"])
        prediction = predict(config, cfg, parse_devices(CARDS), 1, 4)
        results[split] = simulate(config, prediction)
    equal, auto = results["equal"], results["auto"]
    decode = equal["tpot_ms"] / auto["tpot_ms"]
    whole_run = auto["tokens_per_s"] / equal["tokens_per_s"]
    print(
        f"{workload} {preset}: {equal['layers']} -> {auto['layers']}: decode {decode:.3f}x, "
        f"whole run {whole_run:.3f}x"
    )
    return results | {"decode_speedup": decode, "whole_run_speedup": whole_run}


def simulate(config: Config, prediction: Prediction) -> dict[str, Any]:
    """All requests of ``plan`` at once, once each."""
    plan = config.plan
    arrivals = [Arrival(0.0, plan.prompt_tokens, plan.output_tokens)] * plan.sequences
    report = make_simulation(make_scheduler(config, prediction), prediction).run(arrivals)
    return {
        "layers": layer_counts(prediction),
        "tokens_per_s": report.output_tokens_per_s,
        "tpot_ms": report.tpot_s[50] * 1e3,
        "bubbles": report.bubbles,
    }


def layer_counts(prediction: Prediction) -> list[int]:
    """Layers of each stage."""
    return [end - start for start, end in (stage.layers for stage in prediction.stages)]


# --------------------------------------------------------------------------------------
# measured


def measure_processes(profile_folder: str, repeats: int) -> dict[str, Any]:
    """Two CPU stages, all splits in turn, and what was predicted of them."""
    cfg, devices = ModelConfig.from_hf(ARCHITECTURE), [cpu_device()]
    measure_all(make_config("auto", profile_folder), cfg, devices)
    splits = {
        "equal": make_config("equal", profile_folder),
        "counted": make_config("auto", profile_folder, use_profile=False),
        "measured": make_config("auto", profile_folder),
    }
    results: dict[str, dict[str, Any]] = {}
    configs: dict[str, Config] = {}
    for name, config in splits.items():
        counts = layer_counts(predict(config, cfg, devices, 1, 2))
        configs[name] = make_config(counts, profile_folder)
        predicted = simulate(configs[name], predict(configs[name], cfg, devices, 1, 2))
        results[name] = {"layers": counts, "predicted": predicted, "runs": []}
    for _ in range(repeats):
        for name, result in results.items():
            result["runs"].append(run_once(configs[name]))
            print(f"  {name} {result['layers']}: {describe(result['runs'][-1])}", flush=True)
    return {
        "architecture": ARCHITECTURE,
        "workload": MEASURED,
        "threads_per_stage": 1,
        "splits": results,
        "speedups": {name: speedups(results, name) for name in ("counted", "measured")},
    }


def speedups(results: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """Of one split over the equal one: round by round, and as predicted by the profile."""
    rounds = [
        run["tokens_per_s"] / equal["tokens_per_s"]
        for run, equal in zip(results[name]["runs"], results["equal"]["runs"], strict=True)
    ]
    predicted = (
        results[name]["predicted"]["tokens_per_s"] / results["equal"]["predicted"]["tokens_per_s"]
    )
    print(f"{name}: {statistics.median(rounds):.3f}x of equal, predicted {predicted:.3f}x")
    return {"median": statistics.median(rounds), "all": rounds, "predicted": predicted}


def make_config(split: str | list[int], profile_folder: str, *, use_profile: bool = True) -> Config:
    """Two stages on the CPU."""
    return configuration.build(
        {
            "job": {"name": "serve"},
            "model": {"load": "random", "architecture": ARCHITECTURE, "dtype": "float32"},
            "pipeline": {"stages": 2, "devices": "cpu", "cpu_threads": 1, "split": split},
            "cache": {"memory_gib": 0.25, "prefix": False},
            "scheduler": {"max_sequences": MEASURED["sequences"]},
            "plan": MEASURED | {"use_profile": use_profile, "profile_folder": profile_folder},
        }
    )


def run_once(config: Config) -> dict[str, Any]:
    """One engine: warm up, then time the workload."""
    with open_client(config) as client:
        run_workload(client, output_tokens=4)
        time.sleep(1.2)  # stages report once a second
        before = stage_times(client)
        started_s = time.perf_counter()
        num_tokens = run_workload(client, output_tokens=MEASURED["output_tokens"])
        elapsed_s = time.perf_counter() - started_s
        time.sleep(1.2)
        busy = [(end - start) / 1e9 for start, end in zip(before, stage_times(client), strict=True)]
        layers = [stage["end_layer"] - stage["start_layer"] for stage in client.status()["stages"]]
    return {
        "tokens_per_s": num_tokens / elapsed_s,
        "layers": layers,
        "bubbles": [1 - busy_s / elapsed_s for busy_s in busy],
    }


def describe(run: dict[str, Any]) -> str:
    """One run in words."""
    bubbles = ", ".join(f"{bubble:.1%}" for bubble in run["bubbles"])
    return f"{run['tokens_per_s']:.0f} tokens/s, bubbles {bubbles}"


def run_workload(client: Client, *, output_tokens: int) -> int:
    """Submit everything at once and wait; returns the number of generated tokens."""
    sampling = {"temperature": 0.0, "max_tokens": output_tokens, "ignore_eos": True}
    prompt_tokens = MEASURED["prompt_tokens"]
    requests = [
        client.submit(
            token_ids=[97 * request + index for index in range(prompt_tokens)], sampling=sampling
        )
        for request in range(MEASURED["sequences"])
    ]
    return sum(request.result(600.0).num_output_tokens for request in requests)


def stage_times(client: Client) -> list[int]:
    """Busy nanoseconds of each stage since its start."""
    return [stage.get("busy_ns", 0) for stage in client.status()["stages"]]


if __name__ == "__main__":
    main()
