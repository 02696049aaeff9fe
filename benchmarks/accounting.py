"""Cost of counting where the time of a stage goes, for one plan.

    python -m benchmarks.accounting [--output benchmarks/results/accounting.json]

Makes the calls that a plan of a middle stage makes in the worst case: it waits for the plan,
for its input and for a slot. Compared with a clock whose methods do nothing, with and without
a recorder for a trace. ``hot``: one plan after the other. ``cold``: the thread sleeps 1 ms before
each plan, so that caches hold other things by then. Prints microseconds per plan, and the share
of a plan of 1 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.conditions import conditions
from ember_pp.stage.timing import WAIT_INPUT, WAIT_OUTPUT, PlanRecorder, StageClock

PLANS, COLD_PLANS, REPEATS = 20_000, 100, 15
PLAN_US = 1000.0


class NoClock:
    """The calls alone."""

    def begin_plan(self, *, after_idle: bool) -> None:
        pass

    def end_plan(self, plan: int) -> None:
        pass

    def enter(self, state: int) -> int:
        return 0

    def mark_received(self) -> None:
        pass

    def mark_sent(self) -> None:
        pass


def run_plan(clock: Any, plan: int) -> None:
    """The calls of one plan."""
    clock.begin_plan(after_idle=False)
    clock.enter(clock.enter(WAIT_INPUT))
    clock.mark_received()
    clock.enter(clock.enter(WAIT_OUTPUT))
    clock.mark_sent()
    clock.end_plan(plan)


def run_hot(clock: Any) -> float:
    """Microseconds per plan, mean."""
    started_ns = time.perf_counter_ns()
    for plan in range(PLANS):
        run_plan(clock, plan)
    return (time.perf_counter_ns() - started_ns) / PLANS / 1000


def run_cold(clock: Any) -> float:
    """Microseconds per plan, median."""
    times_ns = []
    for plan in range(COLD_PLANS):
        time.sleep(PLAN_US / 1e6)
        started_ns = time.perf_counter_ns()
        run_plan(clock, plan)
        times_ns.append(time.perf_counter_ns() - started_ns)
    return statistics.median(times_ns) / 1000


def make_clocks() -> dict[str, Any]:
    """What is compared."""
    counting, recording = StageClock(), StageClock()
    recording.start(PlanRecorder(0, 0, post=lambda batch: None))
    return {"nothing": NoClock(), "counting": counting, "counting and recording": recording}


def main() -> None:
    """Measure in turns, print, store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    clocks = make_clocks()
    results: dict[str, dict[str, Any]] = {}
    for state, run in (("hot", run_hot), ("cold", run_cold)):
        times_us: dict[str, list[float]] = {name: [] for name in clocks}
        for _ in range(REPEATS):
            for name, clock in clocks.items():
                times_us[name].append(run(clock))
        medians = {name: statistics.median(times) for name, times in times_us.items()}
        for name, median in medians.items():
            share = (median - medians["nothing"]) / PLAN_US
            print(f"{state:<5} {name:<24}{median:>7.2f} us a plan  {share:.3%} of one of 1 ms")
            results.setdefault(name, {})[state] = {
                "us_per_plan": round(median, 3),
                "all_us_per_plan": [round(value, 3) for value in times_us[name]],
                "share_of_1_ms_plan": round(share, 6),
            }
    if options.output is not None:
        load = {"load_average_1min": round(os.getloadavg()[0], 2), "nice": os.nice(0)}
        settings = {"plans": PLANS, "cold_plans": COLD_PLANS, "repeats": REPEATS, "value": "median"}
        report = {
            "benchmark": "accounting",
            "conditions": conditions() | load | settings,
            "results": results,
        }
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
