"""CPU time of the coordinator per plan, in steady decode, with stages that do nothing.

    python -m benchmarks.coordinator_cpu [--repeats 7] [--output FILE]

One plan of all running sequences after the other, in one process: ``next_plan``,
``plan_to_execute``, ``encode``, then ``decode`` of a ready-made ``Sampled`` and ``complete``.
Every 16th plan gives each row a block; ``usual`` is the median plan, which gives none, and
``mean`` is over whole periods of 16. ``append`` is, measured alone, the part of ``complete``
that grows with the rows: pairing them with their tokens and appending these. Turning tokens
into text (``Request.on_token``) is measured apart, per token. Times are CPU time of the
process, less that of reading the clock. Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ember_pp
from benchmarks.conditions import conditions
from ember_pp import protocol
from ember_pp.coordinator.request import Request
from ember_pp.coordinator.scheduler import Scheduler, plan_to_execute
from ember_pp.coordinator.sequence import Sequence
from ember_pp.sampling_params import SamplingParams
from ember_pp.tokenizer import IncrementalDetokenizer, Tokenizer

NUM_ROWS = (1, 64, 512, 4096)
BLOCK_SIZE = 16
DEMO = Path(ember_pp.__file__).parent / "demo"
PARTS = ("next_plan", "plan_to_execute", "encode", "decode", "complete")
TEXT = "The Roman Empire was one of the largest empires in history, and its roads lasted. " * 8


def _clock_ns() -> float:
    """What one reading of the clock adds to what is measured."""
    readings = [time.process_time_ns() for _ in range(2001)]
    return statistics.median(b - a for a, b in itertools.pairwise(readings))


CLOCK_NS = _clock_ns()


def num_plans(num_rows: int) -> int:
    """Plans of one run: whole periods of blocks, fewer where plans take longer."""
    return BLOCK_SIZE * max(4, min(64, 4096 // num_rows))


def steady_decode(num_rows: int, plans: int) -> Scheduler:
    """A scheduler with ``num_rows`` decoding rows, none of them due for a block."""
    scheduler = Scheduler(
        num_blocks=num_rows * (plans // BLOCK_SIZE + 4),
        block_size=BLOCK_SIZE,
        max_in_flight=1,
        max_sequences=num_rows,
        max_tokens_per_plan=num_rows,
        max_model_len=plans + BLOCK_SIZE,
    )
    for row in range(num_rows):
        scheduler.add(Sequence(str(row), [row], SamplingParams(), seed=row))
    for _ in range(3):  # prefill, the rows join, an unchanged roster
        plan = scheduler.next_plan()
        assert plan is not None
        scheduler.complete(plan.number, range(plan.num_rows))
    return scheduler


def make_sampled(scheduler: Scheduler, num_rows: int, plans: int) -> list[bytes]:
    """What the last stage would send, encoded."""
    first = scheduler.in_flight.next_number
    token_ids = protocol.pack_i32(range(num_rows))
    return [
        protocol.encode(protocol.Sampled(0, number, token_ids, []))
        for number in range(first, first + plans)
    ]


def time_plans(num_rows: int) -> dict[str, float]:
    """Microseconds per plan of one run: the usual plan and the mean."""
    plans = num_plans(num_rows)
    scheduler = steady_decode(num_rows, plans)
    sampled = make_sampled(scheduler, num_rows, plans)
    now = time.process_time_ns
    stamps = [now()]
    for packed in sampled:
        plan = scheduler.next_plan()
        assert plan is not None
        protocol.encode(plan_to_execute(plan, 0))
        message = protocol.decode(packed)
        assert isinstance(message, protocol.Sampled)
        scheduler.complete(message.plan, protocol.unpack_i32(message.token_ids))
        stamps.append(now())
    assert len(plan.decodes) == num_rows
    times_us = per_interval_us(stamps)
    return {"usual_us": statistics.median(times_us), "mean_us": statistics.fmean(times_us)}


def time_parts(num_rows: int) -> dict[str, float]:
    """Microseconds of each part of the usual plan, of one run."""
    plans = num_plans(num_rows)
    scheduler = steady_decode(num_rows, plans)
    sampled = make_sampled(scheduler, num_rows, plans)
    now = time.process_time_ns
    times_us: dict[str, list[float]] = {part: [] for part in PARTS}
    for packed in sampled:
        stamps = [now()]
        plan = scheduler.next_plan()
        stamps.append(now())
        assert plan is not None
        execute = plan_to_execute(plan, 0)
        stamps.append(now())
        protocol.encode(execute)
        stamps.append(now())
        message = protocol.decode(packed)
        assert isinstance(message, protocol.Sampled)
        token_ids = protocol.unpack_i32(message.token_ids)
        stamps.append(now())
        scheduler.complete(message.plan, token_ids)
        stamps.append(now())
        for part, time_us in zip(PARTS, per_interval_us(stamps), strict=True):
            times_us[part].append(time_us)
    return {part: statistics.median(times) for part, times in times_us.items()}


def time_append(num_rows: int) -> dict[str, float]:
    """Microseconds for giving every row its token, with nothing else done."""
    plan = steady_decode(num_rows, BLOCK_SIZE).next_plan()
    assert plan is not None
    token_ids = protocol.unpack_i32(protocol.pack_i32(range(num_rows)))
    stamps = [time.process_time_ns()]
    for _ in range(num_plans(num_rows)):
        sampled = list(zip(plan.rows, token_ids, strict=True))
        for sequence, token in sampled:
            sequence.output_ids.append(token)
        stamps.append(time.process_time_ns())
    return {"append": statistics.median(per_interval_us(stamps))}


def per_interval_us(stamps: list[int]) -> list[float]:
    """Times between readings of the clock, which costs ``CLOCK_NS`` itself."""
    return [(b - a - CLOCK_NS) / 1e3 for a, b in itertools.pairwise(stamps)]


def time_text(tokenizer: Tokenizer | None) -> float:
    """Microseconds of ``Request.on_token`` for one token; without a tokenizer: ids alone."""
    token_ids = Tokenizer.load(DEMO).encode(TEXT)
    params = SamplingParams()
    sequence = Sequence("r", [0], params, seed=0)
    sequence.max_total_tokens = len(token_ids) + 1
    detokenizer = IncrementalDetokenizer(tokenizer) if tokenizer is not None else None
    request = Request("r", b"c", sequence, params, frozenset(), False, detokenizer, None)
    started_ns = time.process_time_ns()
    for token_id in token_ids:
        request.on_token(token_id, None)
    return (time.process_time_ns() - started_ns - CLOCK_NS) / 1e3 / len(token_ids)


def median_of(repeats: int, measure: Callable[[], dict[str, float]]) -> dict[str, Any]:
    """The median of several runs for each number, and all of them."""
    runs = [measure() for _ in range(repeats)]
    return {
        name: {
            "median": round(statistics.median(run[name] for run in runs), 2),
            "all": [round(run[name], 2) for run in runs],
        }
        for name in runs[0]
    }


def measure_all(repeats: int) -> list[dict[str, Any]]:
    """One entry per number of rows, printed as it comes."""
    print("microseconds per plan".ljust(24), "usual", " mean", *PARTS, "append", sep="  ")
    results = []
    for num_rows in NUM_ROWS:
        totals = median_of(repeats, lambda n=num_rows: time_plans(n))
        parts = median_of(repeats, lambda n=num_rows: time_parts(n))
        append = median_of(repeats, lambda n=num_rows: time_append(n))
        columns = [totals["usual_us"], totals["mean_us"], *parts.values(), append["append"]]
        widths = [7, 7, *(len(part) for part in PARTS), 6]
        shown = [f"{c['median']:{w}.1f}" for c, w in zip(columns, widths, strict=True)]
        print(f"{num_rows:>5} sequences".ljust(22), *shown, sep="  ", flush=True)
        sizes = {"num_rows": num_rows, "num_plans": num_plans(num_rows)}
        results.append({**sizes, **totals, "parts_us": parts, "append_us": append["append"]})
    return results


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    load_average = os.getloadavg()[0]
    results = measure_all(options.repeats)
    tokenizer = Tokenizer.load(DEMO)
    text = median_of(
        options.repeats,
        lambda: {"with_text_us": time_text(tokenizer), "ids_alone_us": time_text(None)},
    )
    print("per token, apart:", *(f"{name} {t['median']:.2f}" for name, t in text.items()))
    report = {
        "benchmark": "coordinator_cpu",
        "conditions": conditions()
        | {
            "load_average_1min": round(load_average, 2),
            "repeats": options.repeats,
            "time": "CPU time of the process, less the clock's own",
            "clock_us": CLOCK_NS / 1e3,
            "block_size": BLOCK_SIZE,
            "max_in_flight": 1,
            "prefix_caching": True,
        },
        "per_plan": results,
        "per_token": text,
    }
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=1) + "\n")
        print(f"written: {options.output}")


if __name__ == "__main__":
    main()
