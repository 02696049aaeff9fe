"""Time from ``./launch.sh`` in a ready environment to the first token of the demo model.

    python -m benchmarks.first_token [--repeats 5] [--output FILE]

Runs ``job=chat`` over two stages with one question on stdin, and stops the clock at the first
byte of the answer on stdout: shell, Hydra, coordinator, torch in two stages, weights, probe,
prefill and the first draw are all in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from pathlib import Path

from benchmarks.conditions import conditions

ROOT = Path(__file__).parents[1]


def seconds_to_first_token() -> float:
    """One run, from the start of the shell to the first byte of the answer."""
    started_s = time.perf_counter()
    with subprocess.Popen(
        [str(ROOT / "launch.sh"), "job=chat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"What is the capital of France?\n")
        process.stdin.close()
        first = process.stdout.read(1)
        elapsed_s = time.perf_counter() - started_s
        process.stdout.read()
    assert first, "the chat ended without an answer"
    return elapsed_s


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    seconds_to_first_token()  # file cache and byte code
    runs = [seconds_to_first_token() for _ in range(options.repeats)]
    median_s = statistics.median(runs)
    print(f"first token after {median_s:.2f} s (of {sorted(round(run, 2) for run in runs)})")
    if options.output is not None:
        report = {
            "benchmark": "first_token",
            "conditions": conditions(),
            "stages": 2,
            "seconds": {"median": median_s, "all": runs},
        }
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
