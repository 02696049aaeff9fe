"""Resident memory of ``job=batch`` against the length of its input, with a client in memory.

    python -m benchmarks.batch_memory [--lines 1000 200000] [--output FILE]

Each measurement is a process of its own that runs one batch: a fresh one, one that goes on
where half of the answers are there, and an ordered one. No model is loaded and no coordinator
started: what is measured is the job itself, whose memory must not grow with its input
(``ru_maxrss``). Prints a table and writes one JSON file with all conditions.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.conditions import conditions
from ember_pp import config as configuration
from ember_pp.client import Completion
from ember_pp.jobs import batch

MODES = ("fresh", "resumed", "ordered")
PER_WAIT = 64


@dataclasses.dataclass(frozen=True)
class EchoRequest:
    """A request that has ended."""

    request_id: str

    def result(self) -> Completion:
        """An answer of a few hundred characters."""
        return Completion(
            request_id=self.request_id,
            text=f"The answer to {self.request_id}: " + "word " * 60,
            token_ids=[1, 2, 3],
            logprobs=[],
            finish_reason="stop",
            stop_reason=None,
            num_prompt_tokens=42,
            num_cached_tokens=0,
            num_output_tokens=64,
        )


class EchoClient:
    """Ends the oldest requests first, and remembers none that has ended."""

    def __init__(self) -> None:
        self.num_submitted = 0
        self._open: collections.deque[EchoRequest] = collections.deque()

    def submit(self, **fields: Any) -> EchoRequest:
        """Open a request."""
        request = EchoRequest(f"req-{self.num_submitted}")
        self.num_submitted += 1
        self._open.append(request)
        return request

    def wait_any(self, timeout_s: float | None = None) -> list[EchoRequest]:
        """The oldest open requests."""
        return [self._open.popleft() for _ in range(min(PER_WAIT, len(self._open)))]

    def cancel(self, request_ids: Any = ()) -> int:
        """Nothing stays open."""
        return 0

    def status(self) -> dict[str, Any]:
        """Ready at once."""
        return {"phase": "ready", "stages": []}


def run_child(folder: Path, num_lines: int, mode: str) -> None:
    """Run one batch in this process; print what it took as JSON."""
    job = {
        "name": "batch",
        "input": str(folder / f"{num_lines}.jsonl"),
        "output": str(folder / f"{num_lines}.{mode.replace('resumed', 'fresh')}.jsonl"),
        "ordered": mode == "ordered",
    }
    plain = {"job": job, "model": {"path": "demo"}}
    client = EchoClient()
    started_s = time.process_time()
    code = batch.run(configuration.build(plain), connect=lambda _: contextlib.nullcontext(client))
    assert code == 0
    result = {
        "num_lines": num_lines,
        "mode": mode,
        "num_submitted": client.num_submitted,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "cpu_s": round(time.process_time() - started_s, 2),
    }
    print(json.dumps(result))


def write_input(folder: Path, num_lines: int) -> None:
    """Requests of about 250 bytes."""
    with (folder / f"{num_lines}.jsonl").open("w") as file:
        for n in range(num_lines):
            body = {"custom_id": f"customer-{n:09d}", "prompt": f"Prompt {n}: " + "word " * 40}
            file.write(json.dumps(body) + "\n")


def measure(folder: Path, num_lines: int, mode: str) -> dict[str, Any]:
    """Run a child and return what it printed."""
    if mode == "resumed":
        output = folder / f"{num_lines}.fresh.jsonl"
        os.truncate(output, output.stat().st_size // 2)
    command = [sys.executable, "-m", "benchmarks.batch_memory", "--child"]
    ended = subprocess.run(
        [*command, str(folder), str(num_lines), mode], stdout=subprocess.PIPE, text=True, check=True
    )
    result: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, nargs=2, default=[1_000, 200_000])
    parser.add_argument("--output", default="benchmarks/results/batch_memory.json")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_child(Path(options.child[0]), int(options.child[1]), options.child[2])
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for num_lines in options.lines:
            write_input(Path(folder), num_lines)
            results += [measure(Path(folder), num_lines, mode) for mode in MODES]
    growth = {
        mode: max(r["peak_bytes"] for r in results if r["mode"] == mode)
        - min(r["peak_bytes"] for r in results if r["mode"] == mode)
        for mode in MODES
    }
    for result in results:
        print(
            "{num_lines:>9,} lines  {mode:<8}".format(**result),
            f"peak {result['peak_bytes'] / 1e6:7.1f} MB, {result['cpu_s']:6.2f} s of CPU",
        )
    for mode, num_bytes in growth.items():
        print(f"growth {mode:<8} {num_bytes / 1e6:6.1f} MB")
    report = {"conditions": conditions(), "results": results, "growth_bytes": growth}
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {output}")


if __name__ == "__main__":
    main()
