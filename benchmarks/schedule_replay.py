"""Policies of the scheduler compared, over simulated stages, in virtual time.

    python -m benchmarks.schedule_replay [--trace FILE] [--stages 4,8] [--output FILE]

Stages are what ``ember_pp.cost_model`` counts for a model on a card (peak rates), so what is
compared is the order of work and not any engine's speed. Two kinds of load:

* Steady decode: 8 requests a stage; ``decode`` are as many with long answers, ``replaced`` a
  queue of short prompts, so that each answer that ends is followed by the next request.
* Mixed: a trace of arrivals with prompt and answer lengths (columns ``TIMESTAMP``,
  ``ContextTokens``, ``GeneratedTokens``; ``.xz`` and ``.gz`` are unpacked). ``all at once``
  says how many requests a second each policy serves at most. The trace's time is then scaled
  so that requests come at a share of the best of these: the same arrivals for every policy.

Without ``--trace`` one is drawn: Poisson arrivals, and lengths from two log-normal
distributions with the means and deviations of the logarithms of the Azure conversation trace of
2023. ``fixed`` is what others do, with a budget that is tuned; so several are tried.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.conditions import conditions
from ember_pp import partition
from ember_pp.coordinator.policy import POLICIES
from ember_pp.coordinator.preparation import choose_num_microbatches, default_max_in_flight
from ember_pp.coordinator.scheduler import Scheduler
from ember_pp.coordinator.simulator import Arrival, Report, Simulation, Timing
from ember_pp.cost_model import PlanCost, PlanSize, stage_cost
from ember_pp.devices import DeviceSpec, parse_devices
from ember_pp.jobs.plan_workload import read_trace
from ember_pp.model_config import ModelConfig

PRESETS = Path(__file__).parents[1] / "conf" / "model"
BYTES_PER_ELEMENT, BLOCK_SIZE, RUN_AHEAD = 2, 16, 1
MAX_SEQUENCES, MAX_TOKENS_PER_PLAN, MAX_MODEL_LEN = 256, 2048, 20_000
TYPICAL = PlanSize(num_decodes=16, num_prefill_tokens=64, num_context_tokens=20_000)
"""The plan that layers are split for."""
MEMORY_FOR_MODEL = 0.9
"""Of a card's memory, for weights and KV cache."""
REQUESTS_PER_STAGE, DECODE_TOKENS = 8, 2000
SHARES = (0.5, 0.8, 0.95)
PROMPT_LOG, OUTPUT_LOG, SEED = (6.633, 0.985), (5.019, 0.859), 0
MOST_PROMPT_TOKENS, MOST_OUTPUT_TOKENS = 14_050, 1000


@dataclasses.dataclass(frozen=True)
class Contender:
    """A policy with its settings."""

    policy: str
    max_tokens_per_plan: int = MAX_TOKENS_PER_PLAN
    has_prediction: bool = True

    @property
    def name(self) -> str:
        """As it is printed and stored."""
        if self.policy == "balanced":
            return "balanced" if self.has_prediction else "balanced by tokens"
        return f"{self.policy} {self.max_tokens_per_plan}"


CONTENDERS = [
    Contender("balanced"),
    Contender("balanced", has_prediction=False),
    *(Contender("greedy", budget) for budget in (512, 2048)),
    *(Contender("fixed", budget) for budget in (64, 96, 128, 256, 512, 2048)),
]


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Stages as cost functions, and the KV cache that they have room for."""

    costs: list[PlanCost]
    num_layers: list[int]
    num_kv_tokens: int

    def simulate(
        self, contender: Contender, arrivals: Sequence[Arrival], max_sequences: int = MAX_SEQUENCES
    ) -> Report:
        """Serve all arrivals."""
        num_stages = len(self.costs)
        max_in_flight = default_max_in_flight(num_stages, RUN_AHEAD)
        slowest = max(self.costs, key=TYPICAL.time_s)
        scheduler = Scheduler(
            num_blocks=self.num_kv_tokens // BLOCK_SIZE,
            block_size=BLOCK_SIZE,
            max_in_flight=max_in_flight,
            num_microbatches=choose_num_microbatches(num_stages, max_in_flight, RUN_AHEAD),
            run_ahead=RUN_AHEAD,
            max_sequences=max_sequences,
            max_tokens_per_plan=contender.max_tokens_per_plan,
            max_model_len=MAX_MODEL_LEN,
            prefix_caching=False,
            policy=POLICIES[contender.policy],
            plan_time_s=slowest.time_s if contender.has_prediction else None,
        )
        return Simulation(scheduler, [cost.time_s for cost in self.costs]).run(arrivals)


def make_pipeline(cfg: ModelConfig, device: DeviceSpec, num_stages: int) -> Pipeline:
    """The split that is fastest for a typical plan, on equal devices."""

    def cost(stage: int, num_layers: int) -> PlanCost:
        return stage_cost(
            cfg,
            num_layers,
            is_last=stage == num_stages - 1,
            bytes_per_element=BYTES_PER_ELEMENT,
            device=device,
        )

    table = [
        [
            round(TYPICAL.time_s(cost(stage, count)) * 1e12)
            if count >= partition.least_count(stage, num_stages)
            else None
            for count in range(cfg.num_layers + 1)
        ]
        for stage in range(num_stages)
    ]
    counts = partition.best_counts(table)
    assert counts is not None
    memory = (device.memory_bytes or 0) * MEMORY_FOR_MODEL
    kv_tokens = [
        (memory - _weight_bytes(cfg, layers, stage, num_stages))
        / partition.kv_bytes_per_token(cfg, counts[stage], BYTES_PER_ELEMENT)
        for stage, layers in enumerate(partition.layer_ranges(counts))
        if counts[stage]
    ]
    if min(kv_tokens) < MAX_MODEL_LEN:
        raise SystemExit(
            f"{num_stages} stages: no room for {MAX_MODEL_LEN} tokens on {device.name}"
        )
    costs = [cost(stage, count) for stage, count in enumerate(counts)]
    return Pipeline(costs, counts, int(min(kv_tokens)))


def _weight_bytes(
    cfg: ModelConfig, layers: partition.LayerRange, stage: int, num_stages: int
) -> int:
    return partition.stage_weight_bytes(
        cfg,
        layers,
        is_first=stage == 0,
        is_last=stage == num_stages - 1,
        bytes_per_element=BYTES_PER_ELEMENT,
    )


# --------------------------------------------------------------------------------------
# loads


def synthetic_trace(num_requests: int) -> list[Arrival]:
    """One request a second on average; see the top of this file."""
    rng = random.Random(SEED)
    now_s, arrivals = 0.0, []
    for _ in range(num_requests):
        prompt, output = round(rng.lognormvariate(*PROMPT_LOG)), rng.lognormvariate(*OUTPUT_LOG)
        arrivals.append(
            Arrival(
                now_s,
                min(max(1, prompt), MOST_PROMPT_TOKENS),
                min(max(1, round(output)), MOST_OUTPUT_TOKENS),
            )
        )
        now_s += rng.expovariate(1.0)
    return arrivals


def decode_loads(num_stages: int) -> dict[str, list[Arrival]]:
    """Steady decode, without and with answers that end."""
    rng = random.Random(SEED)
    num_sequences = REQUESTS_PER_STAGE * num_stages
    return {
        "decode": [Arrival(0.0, 64, DECODE_TOKENS)] * num_sequences,
        "replaced": [
            Arrival(0.0, rng.randrange(8, 65), rng.randrange(100, 501))
            for _ in range(10 * num_sequences)
        ],
    }


def scaled(trace: Sequence[Arrival], requests_per_s: float) -> list[Arrival]:
    """The same arrivals, at another rate; 0: all at once."""
    factor = 0.0
    if requests_per_s:
        factor = len(trace) / trace[-1].time_s / requests_per_s
    return [dataclasses.replace(arrival, time_s=arrival.time_s * factor) for arrival in trace]


# --------------------------------------------------------------------------------------
# results


def summary(report: Report) -> dict[str, Any]:
    """What is stored of a run; times in seconds."""

    def rounded(values: dict[int, float]) -> dict[str, float]:
        return {f"p{number}": round(value, 5) for number, value in values.items()}

    busiest = max(range(len(report.stages)), key=lambda stage: report.stages[stage].busy_s)
    return {
        "num_requests": report.num_requests,
        "num_plans": report.num_plans,
        "num_sequence_steps": report.num_sequence_steps,
        "num_preemptions": report.num_preemptions,
        "output_tokens_per_s": round(report.output_tokens_per_s, 2),
        "requests_per_s": round(report.num_requests / report.makespan_s, 4),
        "ttft_s": rounded(report.ttft_s),
        "tpot_s": rounded(report.tpot_s),
        "max_gap_s": rounded(report.max_gap_s),
        "bubbles": [round(bubble, 4) for bubble in report.bubbles],
        "slowest_stage": busiest,
        "bubble_of_slowest": round(report.bubbles[busiest], 4),
    }


def show(result: dict[str, Any]) -> None:
    """One line."""
    load, name = result["load"], result["policy"]
    ttft, tpot, gap = (result[key] for key in ("ttft_s", "tpot_s", "max_gap_s"))
    bubbles = result["bubbles"]
    print(
        f"{load:12} {name:18} {result['output_tokens_per_s']:7.0f} tok/s"
        f"  ttft s {ttft['p50']:7.2f} {ttft['p90']:7.2f} {ttft['p99']:7.2f}"
        f"  tpot ms {1e3 * tpot['p50']:6.1f} {1e3 * tpot['p90']:6.1f} {1e3 * tpot['p99']:6.1f}"
        f"  gap ms {1e3 * gap['p99']:5.0f}"
        f"  bubble {100 * result['bubble_of_slowest']:4.1f}%"
        f" mean {100 * sum(bubbles) / len(bubbles):4.1f}%"
    )


def replay(pipeline: Pipeline, trace: Sequence[Arrival]) -> list[dict[str, Any]]:
    """All contenders under all loads."""
    num_stages, runs = len(pipeline.costs), []

    def run(load: str, contender: Contender, arrivals: Sequence[Arrival], limit: int) -> Report:
        report = pipeline.simulate(contender, arrivals, limit)
        runs.append({"load": load, "policy": contender.name, **summary(report)})
        return report

    for load, arrivals in decode_loads(num_stages).items():
        for contender in CONTENDERS:
            run(load, contender, arrivals, REQUESTS_PER_STAGE * num_stages)
    most = max(
        report.num_requests / report.makespan_s
        for report in (
            run("all at once", contender, scaled(trace, 0), MAX_SEQUENCES)
            for contender in CONTENDERS
        )
    )
    for share in SHARES:
        arrivals = scaled(trace, share * most)
        for contender in CONTENDERS:
            run(f"{share:.0%}", contender, arrivals, MAX_SEQUENCES)
    return runs


def trace_conditions(trace: Path | None) -> dict[str, Any]:
    """What every result says; of the trace's path the name alone."""
    where = conditions()
    if trace is not None:
        where["command"] = where["command"].replace(str(trace), trace.name)
    return where


def losses(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Where ``balanced`` is behind another policy by more than 2%."""
    found = []
    for best in (run for run in runs if run["policy"] == "balanced"):
        for other in (run for run in runs if run["load"] == best["load"]):
            for key in ("ttft_s", "tpot_s"):
                mine, theirs = best[key]["p99"], other[key]["p99"]
                if mine > 1.02 * theirs:
                    found.append(
                        f"{best['load']}: P99 {key} {mine:.4g}, {other['policy']} {theirs:.4g}"
                    )
            if best["output_tokens_per_s"] < 0.98 * other["output_tokens_per_s"]:
                found.append(f"{best['load']}: tokens/s, {other['policy']} is faster")
    return found


def replay_stages(
    cfg: ModelConfig, device: DeviceSpec, trace: Sequence[Arrival], num_stages: int
) -> dict[str, Any]:
    """What is stored for one number of stages."""
    pipeline = make_pipeline(cfg, device, num_stages)
    times_s = [TYPICAL.time_s(cost) for cost in pipeline.costs]
    runs = replay(pipeline, trace)
    return {
        "stages": num_stages,
        "layers": pipeline.num_layers,
        "num_kv_tokens": pipeline.num_kv_tokens,
        "typical_plan_ms": [round(1e3 * time_s, 3) for time_s in times_s],
        "bubble_of_split": round(1 - sum(times_s) / len(times_s) / max(times_s), 4),
        "runs": runs,
        "balanced_is_behind": losses(runs),
    }


def main() -> None:
    """Replay, print, store."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trace", type=Path, default=None)
    parser.add_argument("--requests", type=int, default=3000, help="of the trace's beginning")
    parser.add_argument("--model", default="qwen3-32b")
    parser.add_argument("--card", default="RTX 3090")
    parser.add_argument("--stages", default="4,8")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    trace = synthetic_trace(options.requests)
    if options.trace is not None:
        trace = read_trace(options.trace)[: options.requests]
    preset = yaml.safe_load((PRESETS / f"{options.model}.yaml").read_text(encoding="utf-8"))
    cfg = ModelConfig.from_hf(preset["architecture"])
    [device] = parse_devices(options.card)
    started_s = time.monotonic()
    with concurrent.futures.ProcessPoolExecutor() as executor:
        numbers = list(map(int, options.stages.split(",")))
        one = functools.partial(replay_stages, cfg, device, trace)
        results = list(executor.map(one, numbers))
    for result in results:
        print(f"{result['stages']} stages, layers {result['layers']}")
        for run in result["runs"]:
            show(run)
        print("balanced is behind:", *result["balanced_is_behind"], sep="\n  ")
    report = {
        "benchmark": "schedule_replay",
        "conditions": trace_conditions(options.trace),
        "time": "virtual; a bubble is the share of a stage's time that is no work",
        "model": options.model,
        "card": device.name,
        "trace": options.trace.name if options.trace is not None else "synthetic",
        "num_requests": len(trace),
        "num_prompt_tokens": sum(arrival.num_prompt_tokens for arrival in trace),
        "num_output_tokens": sum(arrival.num_output_tokens for arrival in trace),
        "run_ahead": RUN_AHEAD,
        "max_sequences": MAX_SEQUENCES,
        "max_tokens_per_plan": MAX_TOKENS_PER_PLAN,
        "timing_s": dataclasses.asdict(Timing()),
        "took_s": round(time.monotonic() - started_s, 1),
        "results": results,
    }
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
