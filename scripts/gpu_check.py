"""All proofs that need a GPU, step by step, into one result file: ``scripts/gpu_check``.

    scripts/gpu_check                    every step but those that must be named
    scripts/gpu_check tests racecheck    these alone; the file is written only with --output

A step that fails does not stop the others. The exit code is 1 if one failed, or was not run because
something is missing, which ``--allow-missing`` lets pass. ``docs/gpu_checks.md`` has the steps.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.conditions import conditions, gpu_conditions

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "gpu_check.json"
MOST_WORKERS = 10
"""Test processes at once: each has a context on the card, and builds kernels on a core."""
CORES_FOR_SEVERAL = 12
"""With fewer, steps that could run at the same time run one after another."""
MOST_NAMED = 20
"""Failures of a step whose names are kept in the result."""
PACKAGES = (
    "torch",
    "transformers",
    "cuda-core",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
    "pytest",
    "pytest-xdist",
)
SANITIZER = "compute-sanitizer"
SANITIZER_FOLDERS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")

Counts = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Step:
    """A command, and how to read what came of it."""

    name: str
    command: Sequence[str]
    count: Callable[[str], Counts]
    """Counts from what it wrote; ``passed`` is one of them and must not be 0."""
    needs: Sequence[str] = ()
    """What ``missing`` knows."""
    together: str = ""
    """Neighbours of the same name may run at the same time."""
    limit_s: float = 300.0
    must_be_named: bool = False


# ------------------------------------------------------------------------------------
# the steps


def make_steps(scratch: Path, sanitizer: str, workers: int) -> list[Step]:
    """All of them in order; ``scratch`` is a folder for files that pass between processes."""
    oracle = "tests/gpu/test_oracle.py"
    names = ("memory", "card_rates", "cuda_ipc", "stage_processes")
    alone = [f"tests/gpu/test_{name}.py" for name in names]
    others = ["tests/gpu", *(f"--ignore={path}" for path in (oracle, *alone))]

    def watched(tool: str) -> Step:
        return _launch_step(tool, sanitizer_command(sanitizer, tool), scratch, together="checkers")

    return [
        _launch_step("kernels", [], scratch, together="tests"),
        _pytest_step("tests", ["tests", "--ignore=tests/gpu"], scratch, workers, together="tests"),
        _pytest_step(
            "oracle", [oracle], scratch, min(workers, 2), together="tests", needs=("transformers",)
        ),
        # A file of these starts its engines once, for all its tests.
        _pytest_step("engine", others, scratch, min(workers, 3), dist="loadfile", together="tests"),
        *(watched(tool) for tool in ("memcheck", "racecheck", "initcheck", "synccheck")),
        _pytest_step("alone", alone, scratch, 1),
        Step(
            "benchmark",
            [sys.executable, "-m", "benchmarks.kernels"],
            lambda output: {"passed": len(re.findall(r" ratio \d", output))},
            limit_s=600.0,
            must_be_named=True,
        ),
    ]


def _pytest_step(
    name: str,
    paths: list[str],
    scratch: Path,
    workers: int,
    *,
    dist: str = "worksteal",
    together: str = "",
    needs: Sequence[str] = (),
) -> Step:
    """Tests marked ``gpu`` below ``paths``. Plugins that would get in the way are left out, and
    one that a setting of ours asks for may be missing."""
    report = scratch / f"{name}.xml"
    # A benchmark plugin warns when there are several processes, and warnings are errors.
    options = ["-q", "-m", "gpu", "-p", "no:benchmark", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("pytest_timeout") is None:
        options += ["-o", "addopts=--import-mode=importlib --strict-markers"]
        options += ["-W", "ignore::pytest.PytestConfigWarning"]
    if workers > 1 and importlib.util.find_spec("xdist") is not None:
        options += ["-n", str(workers), "--dist", dist]
    return Step(
        name,
        [sys.executable, "-m", "pytest", *paths, *options, "--junit-xml", str(report)],
        lambda output: count_tests(report),
        needs=("pytest", *needs),
        together=together,
    )


def _launch_step(name: str, prefix: Sequence[str], scratch: Path, *, together: str) -> Step:
    """Every kernel launched once, behind ``prefix``."""
    report = scratch / f"{name}.json"
    command = [sys.executable, "-m", "scripts.sanitize_kernels", "--report", str(report)]
    return Step(
        name,
        [*prefix, *command],
        lambda output: count_launches(report) | count_findings(output),
        needs=(SANITIZER,) if prefix else (),
        together=together,
    )


def sanitizer_command(program: str, tool: str) -> list[str]:
    """What stands before a command for ``tool`` to watch; exit code 1 if it found something."""
    # cuda.core asks the driver for functions that it need not have; what a call of ours answers
    # is looked at where it is made.
    options = ["--report-api-errors", "no", "--padding", "512"] if tool == "memcheck" else []
    return [program or SANITIZER, "--tool", tool, "--error-exitcode", "1", *options]


# ------------------------------------------------------------------------------------
# what came of a step


def count_tests(report: Path) -> Counts:
    """From pytest's JUnit XML; with names of what failed, reasons of what was
    skipped, and the worst of each number that tests record."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    bad = {_name(case) for case in cases if case.find("failure") is not None}
    bad |= {_name(case) for case in cases if case.find("error") is not None}
    skipped = [skip for case in cases if (skip := case.find("skipped")) is not None]
    counts: Counts = {
        "passed": len({_name(case) for case in cases} - bad) - len(skipped),
        "failed": len(bad),
        "skipped": len(skipped),
    }
    if bad:
        counts["failures"] = sorted(bad)[:MOST_NAMED]
    if skipped:
        counts["skip_reasons"] = sorted({str(skip.get("message")) for skip in skipped})[:MOST_NAMED]
    if worst := _worst_properties(cases):
        counts["worst"] = worst
    return counts


def _name(case: ElementTree.Element) -> str:
    return f"{case.get('classname')}::{case.get('name')}"


def _worst_properties(cases: Sequence[ElementTree.Element]) -> dict[str, float]:
    """The largest value of each property that tests record: errors, as they do."""
    worst: dict[str, float] = {}
    for found in (found for case in cases for found in case.iter("property")):
        name, value = str(found.get("name")), float(found.get("value") or 0.0)
        worst[name] = max(value, worst.get(name, value))
    return worst


def count_launches(report: Path) -> Counts:
    """From the report of ``scripts/sanitize_kernels.py``."""
    counts: Counts = json.loads(report.read_text())
    return {"passed": counts["instances"]} | counts


def count_findings(output: str) -> Counts:
    """From the last line of compute-sanitizer: ``errors`` and, of racecheck, ``warnings``."""
    if match := re.search(r"(\d+) hazards? displayed \((\d+) errors?, (\d+) warnings?\)", output):
        return {"errors": int(match[2]), "warnings": int(match[3])}
    if match := re.search(r"ERROR SUMMARY: (\d+) errors?", output):
        return {"errors": int(match[1])}
    return {}


# ------------------------------------------------------------------------------------
# running


def missing(step: Step, sanitizer: str) -> list[str]:
    """What the step needs and is not here, for a reader."""
    names = []
    for need in step.needs:
        if need == SANITIZER:
            if not sanitizer:
                names.append(f"{SANITIZER} (of the CUDA toolkit; on PATH, or --sanitizer PATH)")
        elif importlib.util.find_spec(need) is None:
            names.append(f"the Python package {need}")
    return names


def run_steps(steps: Sequence[Step], sanitizer: str) -> Iterator[dict[str, Any]]:
    """The row of each, in order."""
    has_cores = len(os.sched_getaffinity(0)) >= CORES_FOR_SEVERAL
    for _, group in itertools.groupby(steps, lambda step: step.together or step.name):
        members = list(group)
        for step in members:
            print(f"== {step.name}: {readable(step.command)}", flush=True)
        at_once = len(members) if has_cores else 1
        with ThreadPoolExecutor(at_once) as threads:
            yield from threads.map(lambda step: run_step(step, sanitizer), members)


def run_step(step: Step, sanitizer: str) -> dict[str, Any]:
    """The row of a step: command, seconds, outcome (``passed``, ``failed``, ``not run``)."""
    row: dict[str, Any] = {"name": step.name, "command": readable(step.command), "seconds": 0.0}
    if names := missing(step, sanitizer):
        return row | {"outcome": "not run", "reason": f"missing: {', '.join(names)}"}
    began = time.monotonic()
    code, output = run_command(step.command, step.limit_s, prefix=f"{step.name}: ")
    row["seconds"] = round(time.monotonic() - began, 1)
    reason = "" if code == 0 else f"exit code {code}"
    if code is None:
        reason = f"not done after {step.limit_s:.0f} s"
    try:
        row["counts"] = step.count(output)
    except (OSError, ValueError, KeyError, ElementTree.ParseError) as error:
        reason = reason or f"no report: {error}"
    else:
        if not row["counts"]["passed"]:
            reason = reason or "nothing was checked"
    return row | ({"outcome": "failed", "reason": reason} if reason else {"outcome": "passed"})


def run_command(
    command: Sequence[str], limit_s: float, *, prefix: str = ""
) -> tuple[int | None, str]:
    """Exit code (None: it was killed at its limit) and what it wrote, which is shown as well, each
    line behind ``prefix``.

    It has a process group of its own, and nothing of that is left when it returns.
    """
    is_late = threading.Event()
    lines = []
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": _python_path(), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:

        def end() -> None:
            is_late.set()
            _kill_group(process.pid)

        timer = threading.Timer(limit_s, end)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                sys.stdout.write(prefix + line)
                sys.stdout.flush()
                lines.append(line)
            code = process.wait()
        finally:
            timer.cancel()
            _kill_group(process.pid)
    return None if is_late.is_set() else code, "".join(lines)


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _python_path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))


def readable(command: Sequence[str]) -> str:
    """A command line as one would type it, without folders of this machine."""
    words = ("python" if word == sys.executable else word for word in command)
    return shlex.join(Path(word).name if word.startswith("/") else word for word in words)


def find_sanitizer(given: str) -> str:
    """Path of compute-sanitizer; empty if it is not here."""
    folders = os.pathsep.join([os.environ.get("PATH", ""), *SANITIZER_FOLDERS])
    return shutil.which(given or SANITIZER, path=folders) or ""


def has_gpu() -> bool:
    """Asked in another process: this one takes no memory of the card."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def versions(sanitizer: str) -> dict[str, str]:
    """Of what the steps use, as far as it is installed."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    if sanitizer:
        command = [sanitizer, "--version"]
        output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        if match := re.search(r"Version (\S+)", output):
            found[SANITIZER] = match[1]
    return found


def summary(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line a step."""
    for row in rows:
        counts = row.get("counts", {})
        numbers = ", ".join(f"{n} {name}" for name, n in counts.items() if isinstance(n, int))
        text = f"{row['name']:10} {row['outcome']:8} {row['seconds']:7.1f} s  {numbers}"
        yield text + (f"  ({row['reason']})" if "reason" in row else "")


def parse_options(names: Sequence[str], arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; ``names`` are those of all steps."""
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {' '.join(names)}")
    parser.add_argument("--output", type=Path, help=f"default benchmarks/results/{RESULT.name}")
    parser.add_argument("--sanitizer", default="", help="path of compute-sanitizer")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--workers",
        type=int,
        default=min(MOST_WORKERS, cores),
        help="test processes at once, each with its context on the card; default %(default)s here",
    )
    parser.add_argument("--benchmark", action="store_true", help="benchmarks.kernels as well")
    parser.add_argument(
        "--allow-missing", action="store_true", help="a step that cannot run is no failure"
    )
    parser.add_argument("--commit", default="", help="for the result, where there is no git")
    options = parser.parse_args(arguments)
    if unknown := set(options.steps) - set(names):
        parser.error(f"no such step: {', '.join(sorted(unknown))}; there are {' '.join(names)}")
    return options


def choose(steps: Sequence[Step], options: argparse.Namespace) -> list[Step]:
    """Those named, else all that need no naming."""
    named = set(options.steps) or {step.name for step in steps if not step.must_be_named}
    named |= {"benchmark"} if options.benchmark else set()
    return [step for step in steps if step.name in named]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 if everything passed."""
    with tempfile.TemporaryDirectory(prefix="ember-gpu-check-") as folder:
        scratch = Path(folder)
        names = [step.name for step in make_steps(scratch, "", 1)]
        options = parse_options(names, arguments)
        sanitizer = find_sanitizer(options.sanitizer)
        steps = choose(make_steps(scratch, sanitizer, options.workers), options)
        if not has_gpu():
            print("scripts/gpu_check: no CUDA device, or no torch for one", file=sys.stderr)
            return 1
        result: dict[str, Any] = {
            "benchmark": "gpu_check",
            "conditions": conditions() | gpu_conditions() | {"versions": versions(sanitizer)},
            "left_out": sorted(set(names) - {step.name for step in steps}),
        }
        if options.commit:
            result["conditions"]["commit"] = options.commit
        output = options.output or (None if options.steps else RESULT)
        began, rows = time.monotonic(), []
        for row in run_steps(steps, sanitizer):
            rows.append(row)
            result["seconds"] = round(time.monotonic() - began, 1)
            result["is_whole"] = len(rows) == len(steps)
            fine = {"passed", "not run"} if options.allow_missing else {"passed"}
            result["passed"] = all(row["outcome"] in fine for row in rows)
            if output:  # after each: what is known stays, whatever ends this process
                output.parent.mkdir(parents=True, exist_ok=True)
                output.write_text(json.dumps(result | {"steps": rows}, indent=2) + "\n")
    print("", *summary(rows), f"{'all':19} {result['seconds']:7.1f} s", sep="\n")
    if output:
        print(f"written: {output}", file=sys.stderr)
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
