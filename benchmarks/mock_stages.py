"""The real coordinator, processes and hand-off, with stages that only take time.

    python -m benchmarks.mock_stages [--stages 2,4,8] [--times-ms 1,2,5] [--output FILE]

Measures plans per second in steady decode against the simulator, which runs the same
scheduler on the same settings, and against one plan in flight, which is what a pipeline without
overlap does. That one is also the control: it must not be faster than one plan after the other.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.conditions import conditions
from ember_pp import config as configuration
from ember_pp.client import Client
from ember_pp.coordinator.coordinator import serve
from ember_pp.coordinator.launcher import LocalProcess, child_environment
from ember_pp.coordinator.scheduler import Scheduler
from ember_pp.coordinator.simulator import Arrival, Simulation
from ember_pp.coordinator.stop_signal import StopSignal

SEQUENCES_PER_STAGE = 8
WARM_UP_PLANS = 100
MEASURE_S = 3.0
PROMPT_TOKENS, MAX_TOKENS = 4, 100_000
ARCHITECTURE = {
    "model_type": "qwen3",
    "hidden_size": 16,
    "num_hidden_layers": 8,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 16,
    "vocab_size": 64,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How plans overlap."""

    name: str
    num_microbatches_of: Any
    """Micro-batches and plans in flight for a number of stages."""
    run_ahead: int

    def max_in_flight(self, num_stages: int) -> int:
        return int(self.num_microbatches_of(num_stages))


DEFAULT = Settings("default", lambda num_stages: num_stages + 1, 1)
SLACK = Settings("two micro-batches more", lambda num_stages: num_stages + 2, 0)
ONE = Settings("one plan in flight", lambda num_stages: 1, 0)


class MockLauncher:
    """Starts ``benchmarks.mock_stage`` where ``local`` would start a stage."""

    def __init__(self, stage_time_us: int) -> None:
        self._stage_time_us = stage_time_us

    def start(self, stage_index: int, *, address: str, token: str) -> LocalProcess:
        command = [
            *(sys.executable, "-m", "benchmarks.mock_stage"),
            *("--stage-time-us", str(self._stage_time_us)),
            *("--address", address, "--stage-index", str(stage_index)),
            *("--parent-pid", str(os.getpid())),
        ]
        environment = child_environment() | {"EMBER_STAGE_TOKEN": token, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, env=environment, process_group=0
        )
        return LocalProcess(stage_index, process)


def make_config(settings: Settings, num_stages: int, address: str) -> configuration.Config:
    """One thread a stage, greedy, no prefix cache."""
    return configuration.build(
        {
            "job": {"name": "serve"},
            "model": {"load": "random", "architecture": ARCHITECTURE, "dtype": "float32"},
            "pipeline": {
                "stages": num_stages,
                "devices": "cpu",
                "cpu_threads": 1,
                "split": "equal",
                "max_in_flight": settings.max_in_flight(num_stages),
                "run_ahead": settings.run_ahead,
            },
            "cache": {"memory_gib": 0.2, "prefix": False, "block_size": 256},
            "scheduler": {"max_sequences": SEQUENCES_PER_STAGE * num_stages},
            "coordinator": {"address": address},
        }
    )


@contextlib.contextmanager
def engine(settings: Settings, num_stages: int, stage_time_us: int) -> Iterator[Client]:
    """A coordinator in a process of its own, with mock stages."""
    with tempfile.TemporaryDirectory() as folder:
        address = f"ipc://{folder}/clients.sock"
        command = [sys.executable, "-m", "benchmarks.mock_stages", "--serve", address]
        command += [settings.name, str(num_stages), str(stage_time_us)]
        coordinator = subprocess.Popen(command)
        try:
            with Client(address, timeout_s=60) as client:
                yield client
        finally:
            coordinator.terminate()
            coordinator.wait(20)


def run_once(settings: Settings, num_stages: int, stage_time_us: int) -> dict[str, Any]:
    """Plans per second in steady decode, and where the time of each stage went."""
    with engine(settings, num_stages, stage_time_us) as client:
        for index in range(SEQUENCES_PER_STAGE * num_stages):
            sampling = {"temperature": 0.0, "max_tokens": MAX_TOKENS, "ignore_eos": True}
            client.submit(token_ids=[index % 60 + 1] * PROMPT_TOKENS, sampling=sampling)
        while client.status()["num_plans"] < WARM_UP_PLANS:
            time.sleep(0.05)
        first, first_s = client.status(), time.monotonic()
        time.sleep(MEASURE_S)
        last, last_s = client.status(), time.monotonic()
        client.cancel()
    elapsed_s = last_s - first_s
    num_plans = last["num_plans"] - first["num_plans"]
    num_tokens = last["num_output_tokens"] - first["num_output_tokens"]
    return {
        "plans_per_s": num_plans / elapsed_s,
        "tokens_per_s": num_tokens / elapsed_s,
        "rows_per_plan": num_tokens / num_plans,
        "stages": [
            {
                state: stage[f"{state}_fraction"]
                for state in ("busy", "wait_input", "wait_output", "host_gap")
            }
            for stage in last["stages"]
        ],
    }


def simulate(settings: Settings, num_stages: int, stage_time_us: int) -> dict[str, Any]:
    """The same in virtual time: the real scheduler, perfect stages."""
    max_in_flight, num_sequences = (
        settings.max_in_flight(num_stages),
        SEQUENCES_PER_STAGE * num_stages,
    )
    scheduler = Scheduler(
        num_blocks=64 * num_sequences,
        block_size=256,
        max_in_flight=max_in_flight,
        max_sequences=num_sequences,
        max_tokens_per_plan=512,
        max_model_len=131_072,
        prefix_caching=False,
        num_microbatches=max_in_flight if settings.run_ahead == 0 else num_stages,
        run_ahead=settings.run_ahead,
    )

    def plan_time_s(num_decodes: int, num_prefill_tokens: int, num_context_tokens: int) -> float:
        return stage_time_us / 1e6

    report = Simulation(scheduler, [plan_time_s] * num_stages).run(
        [Arrival(0.0, PROMPT_TOKENS, 2000)] * num_sequences
    )
    return {
        "plans_per_s": report.num_plans / report.makespan_s,
        "tokens_per_s": report.output_tokens_per_s,
    }


def measure(num_stages: int, stage_time_us: int, repeats: int) -> dict[str, Any]:
    """All settings for one pipeline: best and all runs, so that a disturbed one shows."""
    result: dict[str, Any] = {"stages": num_stages, "stage_time_ms": stage_time_us / 1000}
    for settings in (DEFAULT, SLACK, ONE):
        runs = [run_once(settings, num_stages, stage_time_us) for _ in range(repeats)]
        best = max(runs, key=lambda run: run["plans_per_s"])
        simulated = simulate(settings, num_stages, stage_time_us)
        result[settings.name] = {
            "max_in_flight": settings.max_in_flight(num_stages),
            "run_ahead": settings.run_ahead,
            "all_plans_per_s": [run["plans_per_s"] for run in runs],
            "best": best,
            "simulated": simulated,
            "of_simulated": best["plans_per_s"] / simulated["plans_per_s"],
            "of_ideal": best["plans_per_s"] * stage_time_us / 1e6,
        }
    one = result[ONE.name]["best"]["plans_per_s"]
    for settings in (DEFAULT, SLACK):
        result[settings.name]["of_one_in_flight"] = (
            result[settings.name]["best"]["plans_per_s"] / one
        )
    result[ONE.name]["of_one_after_the_other"] = one * num_stages * stage_time_us / 1e6
    return result


def describe(result: dict[str, Any]) -> str:
    """One line."""
    parts = [f"{result['stages']} stages of {result['stage_time_ms']:g} ms:"]
    for settings in (DEFAULT, SLACK):
        part = result[settings.name]
        parts.append(
            f"{settings.name} {part['of_simulated']:.3f} of simulated, "
            f"{part['of_one_in_flight'] / result['stages']:.3f} x S of one in flight;"
        )
    parts.append(f"control {result[ONE.name]['of_one_after_the_other']:.3f}")
    return " ".join(parts)


def main() -> None:
    """Measure, print, store; or serve, as the child of a measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", default="2,4,8")
    parser.add_argument("--times-ms", default="1,2,5")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--serve", nargs=4, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        address, name, num_stages, stage_time_us = options.serve
        settings = next(s for s in (DEFAULT, SLACK, ONE) if s.name == name)
        with StopSignal() as stop:
            config = make_config(settings, int(num_stages), address)
            serve(config, stop, MockLauncher(int(stage_time_us)))
        return
    load_average = os.getloadavg()[0]
    results = []
    for num_stages in map(int, options.stages.split(",")):
        for time_ms in map(float, options.times_ms.split(",")):
            results.append(measure(num_stages, round(time_ms * 1000), options.repeats))
            print(describe(results[-1]), flush=True)
    report = {
        "benchmark": "mock_stages",
        "conditions": conditions()
        | {"load_average_1min_before": round(load_average, 2), "nice": os.nice(0)},
        "sequences_per_stage": SEQUENCES_PER_STAGE,
        "measured_s": MEASURE_S,
        "results": results,
    }
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
