"""Child processes of ``benchmarks/multi_gpu.py``: each with a time limit, none left behind."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ember_pp.errors import EXIT_CANNOT_FIT

FOLDER = "{folder}"
"""In the arguments of a command: a folder of its own, with its ``files``."""
OUTPUT = f"{FOLDER}/output.json"
"""In the arguments of a command: the file that it writes its JSON to. A command without it prints
JSON as its last line."""

_PR_SET_PDEATHSIG = 1
_SETTLE_S = 20.0
_SETTLE_MIB = 512
_libc = ctypes.CDLL(None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """What one child runs: ``python -m arguments``."""

    arguments: tuple[str, ...]
    limit_s: float
    stdin: dict[str, Any] | None = None
    """JSON for it, with ``parent_pid`` added."""
    files: Mapping[str, Callable[[], str]] = dataclasses.field(default_factory=dict)
    """What makes their text, by name."""
    skip: str = ""
    """Why it is not run here; nothing: it is."""


def run(command: Command, *, left_s: float = float("inf")) -> dict[str, Any]:
    """What became of it: ``result``, ``skipped`` or ``error``, and ``took_s``.

    A child that is over its limit is killed with its process group; what it had started in other
    groups ends with it, as everything of this package does. ``cut`` says that it was ``left_s``
    that it was over, not its own limit.
    """
    if command.skip:
        return {"skipped": command.skip}
    limit_s = min(command.limit_s, left_s)
    started_s = time.monotonic()
    memory_before = gpu_memory_mib()
    with tempfile.TemporaryDirectory() as folder:
        said = _run_in(Path(folder), command, limit_s)
    if "error" in said:
        _wait_for_memory(memory_before)
        if "took more than" in said["error"] and limit_s < command.limit_s:
            said["cut"] = True
    return said | {"took_s": round(time.monotonic() - started_s, 1)}


def _run_in(folder: Path, command: Command, limit_s: float) -> dict[str, Any]:
    for name, make_text in command.files.items():
        (folder / name).write_text(make_text())
    arguments = [argument.replace(FOLDER, str(folder)) for argument in command.arguments]
    stdin = None if command.stdin is None else command.stdin | {"parent_pid": os.getpid()}
    with (folder / "log").open("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            process_group=0,
            preexec_fn=_end_with_parent,
        )
        try:
            printed, _ = process.communicate(
                None if stdin is None else json.dumps(stdin), timeout=limit_s
            )
        except subprocess.TimeoutExpired:
            return {"error": f"took more than {limit_s:.0f} s"}
        finally:
            _kill_group(process)
        errors.seek(0)
        last_line = (errors.read().strip().splitlines() or [""])[-1]
    if process.returncode == EXIT_CANNOT_FIT:
        return {"skipped": last_line}
    if process.returncode:
        return {"error": f"exit code {process.returncode}: {last_line}"}
    try:
        writes_file = any(OUTPUT in argument for argument in command.arguments)
        output = folder / "output.json"
        text = output.read_text() if writes_file else printed.splitlines()[-1]
        result: dict[str, Any] = json.loads(text.replace(str(folder), FOLDER))
    except (OSError, ValueError, IndexError) as error:
        return {"error": f"no JSON came: {error}"}
    return {"skipped": result["reason"]} if "reason" in result else {"result": result}


def _end_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _kill_group(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def gpu_memory_mib() -> dict[str, int]:
    """Memory that is taken on each GPU of this machine, by index; nothing where there is none."""
    command = ["nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    pairs = [line.split(",") for line in done.stdout.splitlines()]
    return {index.strip(): int(used) for index, used in pairs}


def _wait_for_memory(before: dict[str, int]) -> None:
    """The driver takes a moment to take the memory of a killed process back."""
    deadline_s = time.monotonic() + _SETTLE_S
    while time.monotonic() < deadline_s:
        now = gpu_memory_mib()
        if all(now.get(index, 0) <= used + _SETTLE_MIB for index, used in before.items()):
            return
        time.sleep(0.5)
