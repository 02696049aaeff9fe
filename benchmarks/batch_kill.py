"""A batch that is killed again and again, and still ends: ``python -m benchmarks.batch_kill``.

``kill -9`` of the job, its coordinator and its stages at once, at a random moment of its life:
while it starts, loads, computes, writes or ends. Then the same command again, and again the same,
until all answers are there. Their union must be that of a run that nothing happened to: every id
once, ``choices`` and ``usage`` equal (float32).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.conditions import conditions
from ember_pp.coordinator.launcher import child_environment

DEADLINE_S = 120.0
SETTINGS = (
    "model.path=demo",
    "model.dtype=float32",
    "pipeline.stages=2",
    "pipeline.devices=cpu",
    "pipeline.cpu_threads=1",
    "cache.memory_gib=0.05",
    "job.max_open_requests=6",
    "sampling.seed=3",
)


def write_input(path: Path, num_requests: int) -> None:
    """Text and chat, greedy and drawn, with and without seeds, short and long."""
    with path.open("w") as file:
        for n in range(num_requests):
            line: dict[str, Any] = {"custom_id": f"r{n}", "max_tokens": 4 + 3 * (n % 7)}
            line["ignore_eos"] = n % 2 == 0
            if n % 3:
                line["prompt"] = f"In the year {1900 + n}, the"
            else:
                line["messages"] = [{"role": "user", "content": f"Tell me about {n}."}]
            if n % 5:
                line |= {"temperature": 0.9, "top_k": 40}
            if n % 4 == 0:
                line["seed"] = n
            file.write(json.dumps(line) + "\n")


def start(source: Path, output: Path, *more: str) -> subprocess.Popen[bytes]:
    """The job, in a process group of its own."""
    command = [sys.executable, "-m", "ember_pp", *SETTINGS, f"job.input={source}"]
    return subprocess.Popen(
        [*command, f"job.output={output}", *more],
        cwd=output.parent,
        env=child_environment() | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    """Exit code and what it wrote to stderr."""
    _, stderr = process.communicate(timeout=DEADLINE_S)
    return process.returncode, stderr.decode()


def num_answers(output: Path) -> int:
    """Lines so far."""
    return output.read_bytes().count(b"\n") if output.exists() else 0


def wait_for(is_true: Callable[[], bool], process: subprocess.Popen[bytes], what: str) -> None:
    """Poll until it is true or the process has ended by itself."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not is_true() and process.poll() is None:
        assert time.monotonic() < deadline_s, f"never came: {what}"
        time.sleep(0.005)


def descendants(pid: int) -> list[int]:
    """Process ids of children, their children and so on."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found += [child, *descendants(child)]
    return found


def kill_everything(process: subprocess.Popen[bytes]) -> tuple[float, bool]:
    """``kill -9`` of the job and all below it; seconds until nothing is left, and if it ran."""
    processes = [process.pid, *descendants(process.pid)]
    was_running = process.poll() is None
    began_s = time.monotonic()
    for pid in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    finish(process)
    while any(Path(f"/proc/{pid}").exists() for pid in processes):
        assert time.monotonic() < began_s + 10.0, "a process outlived the job"
        time.sleep(0.005)
    return time.monotonic() - began_s, was_running


def answers(output: Path) -> dict[str, tuple[Any, Any]]:
    """What depends on the request alone, by id; every id once."""
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    found = {line["custom_id"]: line["response"]["body"] for line in lines}
    assert len(found) == len(lines), "an id was answered twice"
    return {key: (body["choices"], body["usage"]) for key, body in found.items()}


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Kill so many lives of jobs; a job that gets to its end makes room for another."""
    source = folder / "in.jsonl"
    write_input(source, options.requests)
    until_s = time.monotonic() + options.seconds
    began_s = time.monotonic()
    code, stderr = finish(start(source, folder / "undisturbed.jsonl"))
    life_s = time.monotonic() - began_s
    assert code == 0, stderr
    expected = answers(folder / "undisturbed.jsonl")
    rng = random.Random(options.seed)
    kills: list[dict[str, Any]] = []
    jobs: list[dict[str, Any]] = []

    def is_enough() -> bool:
        return len(kills) >= options.kills or time.monotonic() > until_s

    while not is_enough():
        output = folder / f"out{len(jobs)}.jsonl"
        is_over = False
        while not is_over and not is_enough():
            process = start(source, output)
            moment_s = rng.uniform(0.0, life_s)
            before = num_answers(output)
            kill_at_s = time.monotonic() + moment_s
            wait_for(lambda at_s=kill_at_s: time.monotonic() > at_s, process, "the moment")
            is_over = process.poll() is not None
            if is_over:
                finish(process)
            else:
                gone_s, _ = kill_everything(process)
                kills.append({"after_s": round(moment_s, 3), "gone_s": round(gone_s, 3)})
                kills[-1] |= {"answers_before": before, "answers_after": num_answers(output)}
                print(json.dumps(kills[-1]), flush=True)
        code, stderr = finish(start(source, output))  # what is missing, or nothing
        found = answers(output)
        job = {
            "exit_code": code,
            "missing": len(set(expected) - set(found)),
            "differing": sum(found[key] != expected[key] for key in found),
        }
        jobs.append(job)
        print(json.dumps(job), flush=True)
    return {"kills": kills, "jobs": jobs, "undisturbed_s": round(life_s, 2)}


def summarise(seen: dict[str, Any]) -> dict[str, Any]:
    """What has to be 0."""
    kills, jobs = seen["kills"], seen["jobs"]
    return {
        "kills": len(kills),
        "kills before an answer of that life": sum(
            k["answers_after"] == k["answers_before"] for k in kills
        ),
        "jobs": len(jobs),
        "answers missing": sum(job["missing"] for job in jobs),
        "answers differing": sum(job["differing"] for job in jobs),
        "answered twice": 0,  # or ``answers`` had failed
        "jobs that failed": sum(job["exit_code"] != 0 for job in jobs),
        "slowest end of all processes, s": max((kill["gone_s"] for kill in kills), default=0.0),
    }


def merge(paths: Sequence[Path]) -> dict[str, Any]:
    """Runs that were stored, as one."""
    reports = [json.loads(path.read_text()) for path in paths]
    merged: dict[str, Any] = reports[0]
    for name in ("kills", "jobs"):
        merged[name] = [entry for report in reports for entry in report[name]]
    for name in ("conditions", "undisturbed_s"):
        merged[name] = [report[name] for report in reports]
    merged["summary"] = summarise(merged)
    return merged


def main() -> None:
    """Run, print, store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--requests", type=int, default=45)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9, help="kill no more after this")
    parser.add_argument("--merge", nargs="+", type=Path, default=None, help="stored runs")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    if options.merge is not None:
        report = merge(options.merge)
        print(json.dumps(report["summary"], indent=1))
        options.output.write_text(json.dumps(report, indent=1) + "\n")
        return
    load = {"load_average_1min_before": round(os.getloadavg()[0], 2), "nice": os.nice(0)}
    with tempfile.TemporaryDirectory(prefix="batch-kill-") as name:
        seen = run(options, Path(name))
    report = {
        "benchmark": "batch_kill",
        "conditions": conditions() | load,
        "requests": options.requests,
        "summary": summarise(seen),
    }
    print(json.dumps(report["summary"], indent=1))
    if options.output is not None:
        options.output.write_text(json.dumps(report | seen, indent=1) + "\n")


if __name__ == "__main__":
    main()
