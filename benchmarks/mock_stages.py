"""The real coordinator, processes and hand-off, with stages that only take time.

    python -m benchmarks.mock_stages --stages 4 --times-ms 1,2,5 --output FILE
    python -m benchmarks.mock_stages --stages 4 --times-ms 2 --slow --output FILE
    python -m benchmarks.mock_stages --merge FILE FILE ... --output FILE

Measures plans and tokens per second in steady decode with several settings of the scheduler,
interleaved, and compares them with the simulator (the same scheduler in virtual time), with
stages without any cost beside their work, and with one plan in flight, which is what a pipeline
without overlap does. ``mock_stage`` says what a stage's sleep stands for.

What the simulator needs beside the stage time is measured in the same run, with one plan in
flight: a hop (from the end of a stage to the start of the next), the way through the
coordinator (from the end of the last stage to the start of the next plan), and, where the host
does the work of a stage, what else its thread does for a plan. So is, for each run,
the CPU time of every process per plan, and what else the machine did meanwhile.

``--slow`` measures instead a coordinator that sleeps in every turn before it makes plans: with a
plan ahead, that must not be seen in the tokens per second.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.conditions import conditions
from benchmarks.mock_stage import BY_HOST, KEPT_PLANS, ON_DEVICE, Board
from ember_pp import config as configuration
from ember_pp.client import Client
from ember_pp.coordinator import preparation
from ember_pp.coordinator.coordinator import serve
from ember_pp.coordinator.launcher import LocalProcess, child_environment
from ember_pp.coordinator.pipeline import Pipeline
from ember_pp.coordinator.scheduler import Scheduler
from ember_pp.coordinator.simulator import Arrival, Simulation, Timing
from ember_pp.coordinator.stop_signal import StopSignal

SEQUENCES_PER_STAGE = 8
WARM_UP_S, MEASURE_S = 0.3, 1.2
READY_TIMEOUT_S = 120.0
DELAYS = (0.0, 0.25, 0.5)
"""What the slow coordinator sleeps in each turn, in stage times."""
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
    """How plans overlap: numbers beyond the number of stages, S, or 1 for the control."""

    name: str
    more_microbatches: int
    more_in_flight: int
    run_ahead: int

    def num_microbatches(self, num_stages: int) -> int:
        return 1 if self is ONE else num_stages + self.more_microbatches

    def max_in_flight(self, num_stages: int) -> int:
        return 1 if self is ONE else num_stages + self.more_in_flight


DEFAULT = Settings("default", 0, 1, 1)
SLACK = Settings("a micro-batch more", 1, 2, 1)
NOT_AHEAD = Settings("not ahead", 0, 0, 0)
NOT_AHEAD_SLACK = Settings("not ahead, a micro-batch more", 1, 1, 0)
ONE = Settings("one plan in flight", 0, 0, 0)
ALL = (DEFAULT, SLACK, NOT_AHEAD, NOT_AHEAD_SLACK, ONE)
BRIEF = (DEFAULT, SLACK, ONE)


class MockLauncher:
    """Starts ``benchmarks.mock_stage`` where ``local`` would start a stage."""

    def __init__(self, board: Path, num_stages: int) -> None:
        self._arguments = ["--board", str(board), "--num-stages", str(num_stages)]

    def start(self, stage_index: int, *, address: str, token: str) -> LocalProcess:
        command = [
            *(sys.executable, "-m", "benchmarks.mock_stage", *self._arguments),
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
            "cache": {"memory_gib": 0.05, "prefix": False, "block_size": 256},
            "scheduler": {"max_sequences": SEQUENCES_PER_STAGE * num_stages},
            "coordinator": {"address": address},
        }
    )


def serve_mock(name: str, num_stages: int, address: str, board_path: Path) -> None:
    """The coordinator of one engine, in a process of its own."""
    settings = next(settings for settings in ALL if settings.name == name)
    board = Board(board_path, num_stages)
    patched: Any = preparation
    patched.choose_num_microbatches = lambda *_: settings.num_microbatches(num_stages)
    issue_plans = Pipeline.issue_plans

    def issue_plans_late(pipeline: Pipeline) -> None:
        if (delay_s := board.delay_s) > 0:
            time.sleep(delay_s)
        issue_plans(pipeline)

    patched = Pipeline
    patched.issue_plans = issue_plans_late
    with StopSignal() as stop:
        config = make_config(settings, num_stages, address)
        serve(config, stop, launcher=MockLauncher(board_path, num_stages))


class Engine:
    """A coordinator in a process of its own, with mock stages; idle until ``run``."""

    def __init__(self, settings: Settings, num_stages: int, folder: Path) -> None:
        self.settings = settings
        self.num_stages = num_stages
        stem = folder / settings.name.replace(" ", "-").replace(",", "")
        self.board = Board(stem.with_suffix(".board"), num_stages)
        self._address = f"ipc://{stem}.sock"
        command = [sys.executable, "-m", "benchmarks.mock_stages", "--serve", settings.name]
        command += [str(num_stages), self._address, str(stem.with_suffix(".board"))]
        self._coordinator = subprocess.Popen(command)
        self._client: Client | None = None
        self._pids: list[int] = []

    def wait_ready(self) -> None:
        """Until it takes requests."""
        self._client = Client(self._address, timeout_s=READY_TIMEOUT_S)
        until_s = time.monotonic() + READY_TIMEOUT_S
        while (status := self._client.status())["phase"] != "ready":
            if self._coordinator.poll() is not None or time.monotonic() > until_s:
                raise RuntimeError(f"the coordinator of {self.settings.name!r} did not get ready")
            time.sleep(0.1)
        self._pids = [self._coordinator.pid, *(stage["pid"] for stage in status["stages"])]

    def run(self, time_ms: float, work: str, delay_ms: float = 0.0) -> dict[str, Any]:
        """Rates in steady decode, and where time and CPU went."""
        assert self._client is not None, "wait_ready comes first"
        client = self._client
        time_ns, delay_ns = round(time_ms * 1e6), round(delay_ms * 1e6)
        self.board.set(time_ns=time_ns, work=work, delay_ns=delay_ns)
        for index in range(SEQUENCES_PER_STAGE * self.num_stages):
            sampling = {"temperature": 0.0, "max_tokens": MAX_TOKENS, "ignore_eos": True}
            client.submit(token_ids=[index % 60 + 1] * PROMPT_TOKENS, sampling=sampling)
        while client.status()["num_waiting"]:
            time.sleep(0.05)
        time.sleep(WARM_UP_S)
        first, first_cpu, first_s = client.status(), self._cpu_ns(), time.monotonic()
        time.sleep(MEASURE_S)
        last, last_cpu, last_s = client.status(), self._cpu_ns(), time.monotonic()
        starts = self._starts(round(first_s * 1e9))
        client.cancel(everyone=True)
        while client.status()["open_requests"]:
            time.sleep(0.01)
        self.board.set(time_ns=0, work=work)
        elapsed_s, num_plans = last_s - first_s, last["num_plans"] - first["num_plans"]
        num_tokens = last["num_output_tokens"] - first["num_output_tokens"]
        cpu_ns = [after - before for before, after in zip(first_cpu, last_cpu, strict=True)]
        return {
            "plans_per_s": round(num_plans / elapsed_s, 2),
            "tokens_per_s": round(num_tokens / elapsed_s, 1),
            "rows_per_plan": round(num_tokens / num_plans, 2),
            "cpu_us_per_plan": {
                "coordinator": round(cpu_ns[0] / num_plans / 1e3, 1),
                "stages": [round(ns / num_plans / 1e3, 1) for ns in cpu_ns[1:-1]],
            },
            "busy_us_per_plan": [
                round((stage["busy_ns"] - before["busy_ns"]) / num_plans / 1e3, 1)
                for before, stage in zip(first["stages"], last["stages"], strict=True)
            ],
            "cores_used": round(sum(cpu_ns[:-1]) / 1e9 / elapsed_s, 2),
            "cores_used_by_others": round((cpu_ns[-1] - sum(cpu_ns[:-1])) / 1e9 / elapsed_s, 2),
            "shares": [
                shares(*stages) for stages in zip(first["stages"], last["stages"], strict=True)
            ],
            "starts": starts,
        }

    def _cpu_ns(self) -> list[int]:
        """Of coordinator, stages, and the whole machine."""
        return [*(process_cpu_ns(pid) for pid in self._pids), machine_cpu_ns()]

    def _starts(self, since_ns: int) -> list[tuple[int, ...]]:
        """When recent plans started on each stage, in order, none that is under way."""
        rows = [
            tuple(self.board.start_of(stage, plan) for stage in range(self.num_stages))
            for plan in range(KEPT_PLANS)
        ]
        return sorted(row for row in rows if min(row) > since_ns and list(row) == sorted(row))

    def close(self) -> None:
        """End it."""
        if self._client is not None:
            self._client.close()
        self._coordinator.terminate()
        self._coordinator.wait(30)


def shares(first: dict[str, Any], last: dict[str, Any]) -> dict[str, float]:
    """Where the time of one stage went between two statuses."""
    states = ("busy", "wait_input", "wait_output", "host_gap")
    parts = {state: last[f"{state}_ns"] - first[f"{state}_ns"] for state in states}
    total_ns = sum(parts.values()) or 1
    return {state: round(part_ns / total_ns, 4) for state, part_ns in parts.items()}


def process_cpu_ns(pid: int) -> int:
    """CPU time of all threads so far."""
    total_ns = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            total_ns += int((task / "schedstat").read_text().split()[0])
    return total_ns


def machine_cpu_ns() -> int:
    """CPU time of everything on this machine so far, and what the host took away."""
    user, nice, system, _, _, interrupts, soft, steal, *_ = map(
        int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    )
    ticks = user + nice + system + interrupts + soft + steal
    return ticks * 1_000_000_000 // os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def engines(num_stages: int, chosen: tuple[Settings, ...]) -> Iterator[dict[str, Engine]]:
    """One for each of the settings, all ready."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        started = [Engine(settings, num_stages, Path(folder)) for settings in chosen]
        for engine in started:
            stack.callback(engine.close)
        for engine in started:
            engine.wait_ready()
        yield {engine.settings.name: engine for engine in started}


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What the simulator needs, from a run with one plan in flight, where nothing overlaps."""

    timing: Timing
    host_work_s: list[float]
    """Of the thread of each stage, for a plan; nothing where a device works beside it."""

    def to_plain(self) -> dict[str, Any]:
        """In microseconds."""
        timing = {
            name.removesuffix("_s"): round(value * 1e6, 1)
            for name, value in dataclasses.asdict(self.timing).items()
        }
        return timing | {"host_work": [round(value * 1e6, 1) for value in self.host_work_s]}


def calibrate(one: dict[str, Any], time_ms: float, work: str) -> Calibration:
    """From a run with one plan in flight.

    Between the end of the sleep on a stage and its start on the next are a part of the host
    work and what the hand-off takes; host work belongs to the stage, so the rest is the hop.
    """
    time_ns, starts = time_ms * 1e6, one["starts"]
    hops_ns = [b - a - time_ns for row in starts for a, b in itertools.pairwise(row)]
    ways_ns = [after[0] - before[-1] - time_ns for before, after in itertools.pairwise(starts)]
    host_us = one["cpu_us_per_plan"]["coordinator"]
    hop_us, way_us = statistics.median(hops_ns) / 1e3, statistics.median(ways_ns) / 1e3
    host_work_us = [0.0] * len(one["busy_us_per_plan"])
    if work == BY_HOST:
        host_work_us = [busy_us - time_ms * 1e3 for busy_us in one["busy_us_per_plan"]]
        hop_us = max(0.0, hop_us - statistics.median(host_work_us))
        way_us -= host_work_us[-1]
    timing = Timing(
        hop_s=hop_us / 1e6, latency_s=max(0.0, way_us - host_us) / 2e6, host_s=host_us / 1e6
    )
    return Calibration(timing, [us / 1e6 for us in host_work_us])


def simulate(
    settings: Settings, num_stages: int, time_ms: float, calibration: Calibration
) -> dict[str, float]:
    """The same in virtual time: the real scheduler, perfect stages."""
    num_sequences = SEQUENCES_PER_STAGE * num_stages
    scheduler = Scheduler(
        num_blocks=64 * num_sequences,
        block_size=256,
        max_in_flight=settings.max_in_flight(num_stages),
        max_sequences=num_sequences,
        max_tokens_per_plan=512,
        max_model_len=131_072,
        prefix_caching=False,
        num_microbatches=settings.num_microbatches(num_stages),
        run_ahead=settings.run_ahead,
    )

    times_s = [time_ms / 1e3 + host_work_s for host_work_s in calibration.host_work_s]
    costs = [lambda *_, time_s=time_s: time_s for time_s in times_s]
    report = Simulation(scheduler, costs, calibration.timing).run(
        [Arrival(0.0, PROMPT_TOKENS, 400)] * num_sequences
    )
    return {
        "plans_per_s": round(report.num_plans / report.makespan_s, 2),
        "tokens_per_s": round(report.output_tokens_per_s, 1),
    }


def measure(
    by_name: dict[str, Engine], num_stages: int, time_ms: float, work: str, repeats: int
) -> dict[str, Any]:
    """All settings in turns."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in by_name}
    for _ in range(repeats):
        for name, of_settings in runs.items():
            of_settings.append(by_name[name].run(time_ms, work))
    one = max(runs[ONE.name], key=lambda run: run["plans_per_s"])
    calibration = calibrate(one, time_ms, work)
    result: dict[str, Any] = {
        "stages": num_stages,
        "stage_time_ms": time_ms,
        "work": work,
        "calibration_us": calibration.to_plain(),
        "settings": {},
    }
    ideal = 1e3 / time_ms
    for settings in (engine.settings for engine in by_name.values()):
        rates = [run["plans_per_s"] for run in runs[settings.name]]
        best = max(runs[settings.name], key=lambda run: run["plans_per_s"])
        simulated = simulate(settings, num_stages, time_ms, calibration)
        result["settings"][settings.name] = {
            "num_microbatches": settings.num_microbatches(num_stages),
            "max_in_flight": settings.max_in_flight(num_stages),
            "run_ahead": settings.run_ahead,
            "plans_per_s": rates,
            "best": {key: value for key, value in best.items() if key != "starts"},
            "simulated": simulated,
            "best_of_simulated": round(max(rates) / simulated["plans_per_s"], 4),
            "median_of_simulated": round(statistics.median(rates) / simulated["plans_per_s"], 4),
            "best_of_ideal": round(max(rates) / ideal, 4),
            "best_of_one_in_flight_x_stages": round(
                max(rates) / one["plans_per_s"] / num_stages, 4
            ),
        }
    return result


def measure_slow_host(
    by_name: dict[str, Engine], num_stages: int, time_ms: float, repeats: int
) -> dict[str, Any]:
    """Tokens per second with a coordinator that sleeps in each turn."""
    names = (DEFAULT.name, NOT_AHEAD.name, NOT_AHEAD_SLACK.name)
    rates: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    for _ in range(repeats):
        for delay in DELAYS:
            for name in names:
                delay_ms = delay * time_ms
                run = by_name[name].run(time_ms, ON_DEVICE, delay_ms)
                rates[name].setdefault(f"{delay_ms:g}", []).append(run["tokens_per_s"])
    return {
        "stages": num_stages,
        "stage_time_ms": time_ms,
        "work": ON_DEVICE,
        "tokens_per_s_by_delay_ms": rates,
    }


def describe(result: dict[str, Any]) -> str:
    """A line for each of the settings."""
    lines = [
        f"{result['stages']} stages of {result['stage_time_ms']:g} ms, work {result['work']}, "
        f"calibration in us {result['calibration_us']}"
    ]
    for name, part in result["settings"].items():
        best = part["best"]
        lines.append(
            f"  {name:<30} {max(part['plans_per_s']):7.1f} plans/s {best['tokens_per_s']:8.0f} "
            f"tokens/s; of simulated {part['best_of_simulated']:.3f} "
            f"(median {part['median_of_simulated']:.3f}), of ideal {part['best_of_ideal']:.3f}, "
            f"{part['best_of_one_in_flight_x_stages']:.3f} x S of one in flight; "
            f"cores {best['cores_used']} + {best['cores_used_by_others']}"
        )
    return "\n".join(lines)


def merge(paths: list[Path]) -> dict[str, Any]:
    """One report of several."""
    reports = [json.loads(path.read_text()) for path in paths]
    merged: dict[str, Any] = reports[0]
    merged["conditions"] = [report["conditions"] for report in reports]
    for name in ("results", "slow_coordinator"):
        merged[name] = [result for report in reports for result in report[name]]
    return merged


def run_all(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what was asked for."""
    load = {"load_average_1min_before": round(os.getloadavg()[0], 2), "nice": os.nice(0)}
    results, slow = [], []
    with engines(options.stages, BRIEF if options.brief else ALL) as by_name:
        for time_ms in map(float, options.times_ms.split(",")):
            if options.slow:
                slow.append(measure_slow_host(by_name, options.stages, time_ms, options.repeats))
                print(json.dumps(slow[-1]), flush=True)
                continue
            for work in (ON_DEVICE, BY_HOST):
                results.append(measure(by_name, options.stages, time_ms, work, options.repeats))
                print(describe(results[-1]), flush=True)
    return {
        "benchmark": "mock_stages",
        "conditions": conditions() | load,
        "sequences_per_stage": SEQUENCES_PER_STAGE,
        "warm_up_s": WARM_UP_S,
        "measured_s": MEASURE_S,
        "results": results,
        "slow_coordinator": slow,
    }


def main() -> None:
    """Measure, print, store; or serve, as the child of a measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--times-ms", default="1,2,5")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--slow", action="store_true", help="with a slow coordinator")
    parser.add_argument("--brief", action="store_true", help="no settings without run-ahead")
    parser.add_argument("--merge", nargs="+", type=Path, default=None)
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--serve", nargs=4, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        name, num_stages, address, board = options.serve
        serve_mock(name, int(num_stages), address, Path(board))
        return
    report = run_all(options) if options.merge is None else merge(options.merge)
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
