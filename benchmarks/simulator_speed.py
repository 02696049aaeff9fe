"""How fast the simulator is, on one core.

    python -m benchmarks.simulator_speed [--trace FILE] [--output FILE]

A step is a *sequence step*: one row of one plan that draws a token, with all that the real
scheduler, block manager and in-flight book do for it. Loads are those of
``benchmarks.schedule_replay``, all requests at once, under the default policy. Times are CPU
time of the process.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.schedule_replay import (
    PRESETS,
    Contender,
    make_pipeline,
    scaled,
    synthetic_trace,
    trace_conditions,
)
from ember_pp.coordinator.simulator import Arrival
from ember_pp.devices import parse_devices
from ember_pp.jobs.plan_workload import read_trace
from ember_pp.model_config import ModelConfig

MODEL = "qwen3-32b"
CASES = (("RTX 3090", 4, 256), ("RTX 3090", 8, 256), ("H100", 64, 1024))
"""Card, stages, sequences at once."""


def measure(
    cfg: ModelConfig, card: str, num_stages: int, max_sequences: int, trace: Sequence[Arrival]
) -> dict[str, Any]:
    """Simulate once; what it did, and the time that it took."""
    [device] = parse_devices(card)
    pipeline = make_pipeline(cfg, device, num_stages)
    started_s = time.process_time()
    report = pipeline.simulate(Contender("balanced"), trace, max_sequences)
    cpu_s = time.process_time() - started_s
    return {
        "card": card,
        "stages": num_stages,
        "max_sequences": max_sequences,
        "num_requests": report.num_requests,
        "num_plans": report.num_plans,
        "num_sequence_steps": report.num_sequence_steps,
        "cpu_s": round(cpu_s, 2),
        "cpu_s_per_million_steps": round(1e6 * cpu_s / report.num_sequence_steps, 2),
        "cpu_us_per_plan": round(1e6 * cpu_s / report.num_plans, 1),
    }


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trace", type=Path, default=None)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    trace = synthetic_trace(options.requests)
    if options.trace is not None:
        trace = read_trace(options.trace)[: options.requests]
    preset = yaml.safe_load((PRESETS / f"{MODEL}.yaml").read_text(encoding="utf-8"))
    cfg = ModelConfig.from_hf(preset["architecture"])
    results = []
    for card, num_stages, max_sequences in CASES:
        results.append(measure(cfg, card, num_stages, max_sequences, scaled(trace, 0)))
        print(*(f"{key}={value}" for key, value in results[-1].items()), flush=True)
    report = {
        "benchmark": "simulator_speed",
        "conditions": trace_conditions(options.trace),
        "model": MODEL,
        "trace": options.trace.name if options.trace is not None else "synthetic",
        "results": results,
    }
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
