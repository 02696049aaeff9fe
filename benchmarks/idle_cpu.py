"""CPU time that every process uses with nothing to do.

    python -m benchmarks.idle_cpu [--stages 4] [--output benchmarks/results/idle_cpu.json]

Starts the demo model with a metrics endpoint, answers a few requests, waits until the last
counters are out, then reads the CPU time of each process over 20 seconds. Nothing is asked of
the coordinator in that time. Prints the share of a core of each process.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

from benchmarks.conditions import conditions
from ember_pp import config as configuration
from ember_pp.jobs.session import open_client

SETTLE_S, MEASURE_S = 2.0, 20.0


def cpu_ns(pid: int) -> int:
    """CPU time of all threads of a process so far."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)


def parent_of(pid: int) -> int:
    """Pid of the process that started it."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def measure(num_stages: int) -> dict[str, float]:
    """Share of a core by process."""
    config = configuration.build(
        {
            "job": {"name": "serve"},
            "model": {"path": "demo"},
            "pipeline": {"stages": num_stages, "devices": "cpu", "cpu_threads": 1},
            "cache": {"memory_gib": 0.05},
            "metrics": {"port": 0},
        }
    )
    with open_client(config) as client:
        prompts = [list(range(5, 20 + index)) for index in range(8)]
        requests = [client.submit(token_ids=prompt) for prompt in prompts]
        for request in requests:
            request.result(120.0)
        stages = [stage["pid"] for stage in client.status()["stages"]]
        pids = {"coordinator": parent_of(stages[0])}
        pids |= {f"stage {index}": pid for index, pid in enumerate(stages)}
        time.sleep(SETTLE_S)
        before = {name: cpu_ns(pid) for name, pid in pids.items()}
        time.sleep(MEASURE_S)
        after = {name: cpu_ns(pid) for name, pid in pids.items()}
    return {name: round((after[name] - before[name]) / 1e9 / MEASURE_S, 6) for name in pids}


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    shares = measure(options.stages)
    for name, share in shares.items():
        print(f"{name:<12} {share:.3%} of a core")
    if options.output is not None:
        load = {"load_average_1min": round(os.getloadavg()[0], 2)}
        report = {
            "benchmark": "idle_cpu",
            "conditions": conditions() | load,
            "settled_s": SETTLE_S,
            "measured_s": MEASURE_S,
            "cores_used": shares,
        }
        options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
