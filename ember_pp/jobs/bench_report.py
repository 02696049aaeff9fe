"""What a benchmark's runs come to: numbers with their spread, ratios to the floor, a table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ember_pp.jobs.bench_floor import Floor
from ember_pp.jobs.bench_run import BenchRun
from ember_pp.jobs.bench_workload import BenchWorkload, find_steady_decode

FLOORS = {
    "step": "decode step: weights once and the keys and values of all contexts over the read "
    "bandwidth, or its operations over the matrix rate if that is longer",
    "prefill": "operations of the layers for all prompt tokens, and of the lm_head for a row of "
    "each prompt, over the matrix rate, or the weights over the read bandwidth if that is longer",
    "whole": "weights for each token of the longest answer, and the keys and values of all decode "
    "steps, over the read bandwidth, or all operations over the matrix rate if that is longer",
}

_LABELS = {
    "output_tokens_per_s": "output tokens/s",
    "prompt_tokens_per_s": "prompt tokens/s",
    "elapsed_s": "whole run, s",
    "step_ms": "decode step, ms",
    "steady_output_tokens_per_s": "output tokens/s, decode",
    "ttft_ms": "first token, ms",
}


def floor_kind(workload: BenchWorkload) -> str:
    """The key of ``FLOORS`` that this workload is held against."""
    return {"prefill": "prefill", "mixed": "whole"}.get(workload.name, "step")


def measure_run(run: BenchRun, workload: BenchWorkload, floor: Floor) -> dict[str, Any]:
    """The numbers of one run; times in the unit of their name.

    ``floor_ms`` is the floor of what ``floor_kind`` names, and ``ratio`` that over what was
    measured; both None where a run of ``fixed`` has no steady part.
    """
    numbers: dict[str, Any] = {
        "elapsed_s": run.elapsed_s,
        "output_tokens_per_s": workload.output_tokens / run.elapsed_s,
        "ttft_ms": statistics.median(stream.ttft_s for stream in run.streams) * 1e3,
        "cached_tokens": sum(stream.cached_tokens for stream in run.streams),
    }
    kind = floor_kind(workload)
    if kind == "step":
        return numbers | _measure_step(run, workload, floor)
    least_s = floor.prefill_s(workload) if kind == "prefill" else floor.whole_s(workload)
    if kind == "prefill":
        numbers["prompt_tokens_per_s"] = workload.input_tokens / run.elapsed_s
    return numbers | {"floor_ms": least_s * 1e3, "ratio": least_s / run.elapsed_s}


def _measure_step(run: BenchRun, workload: BenchWorkload, floor: Floor) -> dict[str, Any]:
    steady = find_steady_decode(run.streams)
    if steady is None:
        return {"step_ms": None, "floor_ms": None, "ratio": None}
    least_s = floor.step_s(batch=workload.batch, context_tokens=steady.context_tokens)
    return {
        "step_ms": steady.step_s * 1e3,
        "steady_output_tokens_per_s": workload.batch / steady.step_s,
        "steady_steps": steady.steps,
        "context": steady.context_tokens / workload.batch,
        "floor_ms": least_s * 1e3,
        "ratio": least_s / steady.step_s,
    }


def summarize(repeats: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Median, lowest and highest of every number that all runs have."""
    return {
        name: _spread([float(numbers[name]) for numbers in repeats])
        for name in repeats[0]
        if all(numbers[name] is not None for numbers in repeats)
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def latencies(runs: Sequence[BenchRun]) -> dict[str, dict[str, float]]:
    """Percentiles over all requests of all runs, in ms."""
    streams = [stream for run in runs for stream in run.streams]
    tpot_s = [stream.tpot_s for stream in streams if stream.tpot_s is not None]
    found = {"ttft_ms": _percentiles([stream.ttft_s for stream in streams])}
    if tpot_s:
        found["tpot_ms"] = _percentiles(tpot_s)
    return found


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    ordered = sorted(seconds)

    def percentile(share: float) -> float:
        """The least value that so many are not above."""
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)] * 1e3

    shares = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    return {
        "min": ordered[0] * 1e3,
        **{name: percentile(share) for name, share in shares.items()},
        "max": ordered[-1] * 1e3,
    }


# --------------------------------------------------------------------------------------
# table


def render(result: Mapping[str, Any]) -> str:
    """The result for people."""
    rows = [
        ("workload", _describe_workload(result["workload"])),
        ("model", _describe_model(result["model"])),
        ("runs", f"{result['num_warmup']} to warm up, {len(result['repeats'])} that count"),
        *((name, _describe_rates(rates)) for name, rates in result["rates"].items()),
    ]
    lines = [f"{name:<10}{text}" for name, text in rows]
    lines += ["", *_table(_summary_rows(result)), ""]
    lines += _table(_latency_rows(result["latency"]))
    lines += ["", *_ratio_lines(result), "", *_table(_stage_rows(result["stages"]))]
    if result["compare"] is not None:
        lines += ["", *_compare_lines(result)]
    return "\n".join(lines)


def _describe_workload(workload: Mapping[str, Any]) -> str:
    batch = workload["batch"]
    return (
        f"{workload['name']}: {batch} request{'s' if batch > 1 else ''} at once, "
        f"{workload['input_tokens']:,} prompt and {workload['output_tokens']:,} output tokens, "
        f"temperature {workload['temperature']:g}"
    )


def _describe_model(model: Mapping[str, Any]) -> str:
    weights = "random weights" if model["load"] == "random" else "its checkpoint"
    return f"{model['path']}, {model['dtype']}, {weights}"


def _describe_rates(rates: Mapping[str, Any]) -> str:
    return (
        f"reads {rates['read_bytes_per_s'] / 1e9:,.1f} GB/s, "
        f"multiplies {rates['flops_per_s'] / 1e12:,.3g} TFLOPS, measured in this run"
    )


def _summary_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("", "median", "lowest", "highest")]
    for name, label in _LABELS.items():
        if (spread := result["summary"].get(name)) is not None:
            rows.append((label, *_spread_cells(spread)))
    return rows


def _latency_rows(latency: Mapping[str, Mapping[str, float]]) -> list[tuple[str, ...]]:
    labels = {"ttft_ms": "time to first token, ms", "tpot_ms": "time per output token, ms"}
    keys = ("p50", "p90", "p99", "max")
    rows: list[tuple[str, ...]] = [("", *keys)]
    for name, spread in latency.items():
        rows.append((labels[name], *(_number(spread[key]) for key in keys)))
    return rows


def _ratio_lines(result: Mapping[str, Any]) -> list[str]:
    summary, kind = result["summary"], result["floor"]["kind"]
    if "ratio" not in summary:
        return [
            "no ratio: at no time did all requests decode, and nothing else happen; raise "
            "job.output_tokens or scheduler.max_tokens_per_plan"
        ]
    ratio = summary["ratio"]
    lines = [
        f"floor {_number(summary['floor_ms']['median'])} ms; floor / measured: "
        f"{ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})",
        f"  {FLOORS[kind]}",
    ]
    if summary["cached_tokens"]["max"] > 0:
        lines.append(f"  {summary['cached_tokens']['max']:,.0f} prompt tokens were not computed")
    return lines


def _stage_rows(stages: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    header = ("stage", "device", "layers", "plans", "busy ms a plan")
    rows: list[tuple[str, ...]] = [(*header, "busy", "no input", "no slot", "no plan")]
    for stage in stages:
        start, end = stage["layers"]
        busy_ms = stage["busy_ms_per_plan"]
        names = ("busy", "wait_input", "wait_output", "host_gap")
        rows.append(
            (
                str(stage["stage_index"]),
                stage["device"],
                f"{start}-{end - 1}" if end > start else "none",
                f"{stage['plans']:,}",
                "-" if busy_ms is None else _number(busy_ms),
                *(f"{stage[f'{name}_fraction']:.1%}" for name in names),
            )
        )
    return rows


def _compare_lines(result: Mapping[str, Any]) -> list[str]:
    compare, batch = result["compare"], result["workload"]["batch"]
    rows: list[tuple[str, ...]] = [
        (f"{compare['unit']}, on {compare['device']}", "median", "lowest", "highest", "times ours")
    ]
    if compare["ours"] is not None:
        rows.append(("ember-pp", *_spread_cells(compare["ours"]), "1"))
    notes = []
    for name, other in compare["others"].items():
        if "error" in other:
            notes.append(f"{name}: {other['error']}")
            continue
        times = other["times_ours"]
        rows.append(
            (name, *_spread_cells(other["summary"]), "-" if times is None else _number(times))
        )
        notes.append(
            f"{name}: the first token is ours in {other['equal_first_tokens']} of {batch} answers"
        )
    return [*_table(rows), *(f"  {note}" for note in notes)]


def _spread_cells(spread: Mapping[str, float]) -> list[str]:
    return [_number(spread[key]) for key in ("median", "min", "max")]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
        ).rstrip()
        for row in rows
    ]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
