"""Several GPUs of one host, measured: ``python -m benchmarks.multi_gpu``.

Finds the GPUs, and runs in this order, unless ``--part`` names some: the edge probe; hop times of
every path, of NCCL and of peer copies; bit-equality over the number of stages; models with random
weights on 1, 2, 4, ... GPUs; a stage that is killed; a picture of one steady second.

Each case is a child process with a time limit and is stored as it ends, so that a run which was
cut off goes on where it stopped: what is in the file for this commit and these devices is not run
again without ``--again``. A part takes ``--limit_s`` at most; what does not fit is for the next
call. ``--devices 0,0`` runs everything on one GPU, under MPS where that is installed;
``--devices cpu,cpu`` without any.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import multi_gpu_child, multi_gpu_ratios
from benchmarks.conditions import conditions
from benchmarks.multi_gpu_cases import MODELS, PARTS, Case, all_cases
from ember_pp.devices import count_gpus

RESULT = Path(__file__).with_name("results") / "multi_gpu.json"
LIMIT_S = 530.0
_LEAST_S = 20.0
"""A case is not started with less than this left."""
_ENVIRONMENT = (
    "CUDA_VISIBLE_DEVICES",
    "NCCL_NVLS_ENABLE",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST",
    "NVSHMEM_DISABLE_NVLS",
    "CUDA_MPS_PIPE_DIRECTORY",
)
"""What of it decides how GPUs are seen and how they talk; children have it as it is."""


class Store:
    """The results in a file: read once, written whole after every case.

    Args:
        path: of the file.
        run: conditions of this process.
    """

    def __init__(self, path: Path, run: dict[str, Any]) -> None:
        self._path = path
        self._run = run
        self._plain: dict[str, Any] = {"benchmark": "multi_gpu", "runs": {}, "parts": {}}
        if path.exists():
            self._plain = json.loads(path.read_text())

    @property
    def parts(self) -> dict[str, dict[str, Any]]:
        """Cases by part and name."""
        parts: dict[str, dict[str, Any]] = self._plain["parts"]
        return parts

    def has(self, case: Case) -> bool:
        """Whether all of it is there for this commit and these devices, without an error."""
        entry = self.parts.get(case.part, {}).get(case.name)
        if entry is None or entry["said"].keys() != case.commands.keys():
            return False
        run = self._plain["runs"][entry["run"]]
        is_same = all(run[key] == self._run[key] for key in ("commit", "devices"))
        return is_same and not any("error" in said for said in entry["said"].values())

    def put(self, case: Case, said: dict[str, Any]) -> None:
        """Store what became of a case, in the place of what was there."""
        entry = {"run": self._run["time"], "facts": case.facts, "said": said}
        self.parts.setdefault(case.part, {})[case.name] = entry
        order = {name: self.parts[name] for name in PARTS if name in self.parts}
        used = {one["run"] for cases in order.values() for one in cases.values()}
        runs = self._plain["runs"] | {self._run["time"]: self._run}
        kept = {name: run for name, run in runs.items() if name in used}
        self._plain |= {"runs": kept, "parts": order}
        self._write()

    def put_table(self, rows: Sequence[multi_gpu_ratios.Row]) -> None:
        """Keep what all cases come to."""
        self._plain["table"] = list(rows)
        self._write()

    def _write(self) -> None:
        partial = self._path.with_name(f".{self._path.name}.partial")
        partial.write_text(json.dumps(self._plain, indent=1) + "\n")
        os.replace(partial, self._path)


def run_part(cases: Sequence[Case], store: Store, *, limit_s: float, again: bool) -> None:
    """Run what is not stored yet, as far as the time goes."""
    started_s = time.monotonic()
    for case in cases:
        title = f"{case.part}: {case.name}"
        if store.has(case) and not again:
            _say(f"{title}: is there")
            continue
        left_s = limit_s - (time.monotonic() - started_s)
        if left_s < _LEAST_S:
            _say(f"{title}: no time left in this part")
            continue
        said = _run_case(case, limit_s=left_s)
        whole = {name: one for name, one in said.items() if not one.get("cut")}
        if whole:
            store.put(case, whole)
        if len(whole) < len(said):
            _say(f"{title}: cut off by the limit of the part")
            continue
        _say(f"{title}: " + ", ".join(f"{name} {_outcome(one)}" for name, one in said.items()))


def _run_case(case: Case, *, limit_s: float) -> dict[str, Any]:
    started_s = time.monotonic()
    said = {}
    for name, command in case.commands.items():
        left_s = limit_s - (time.monotonic() - started_s)
        said[name] = multi_gpu_child.run(command, left_s=left_s)
    return said


def _outcome(said: dict[str, Any]) -> str:
    if "result" in said:
        return f"{said['took_s']:.0f} s"
    return f"skipped ({said['skipped']})" if "skipped" in said else f"failed ({said['error']})"


def _say(text: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------
# where it runs


def choose_devices(given: str | None, num_gpus: int) -> list[str]:
    """Device of each stage.

    Raises:
        ValueError: there are not two; says what to give.
    """
    if given is not None:
        names = given.split(",")
        devices = [f"cuda:{name}" if name.isdecimal() else name for name in names]
    else:
        devices = [f"cuda:{index}" for index in range(num_gpus)]
    if len(devices) < 2:
        hint = "0,0" if num_gpus else "cpu,cpu"
        raise ValueError(f"two devices are needed, there are {len(devices)}; give --devices {hint}")
    return devices


def describe_run(devices: Sequence[str], commit: str | None) -> dict[str, Any]:
    """Conditions that every case of this process has."""
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "devices": list(devices),
        **conditions(),
        **({} if commit is None else {"commit": commit}),
        "cards": _lines(
            "--query-gpu=index,name,uuid,driver_version,memory.total,clocks.max.sm,power.limit",
            "--format=csv,noheader",
        ),
        "topology": _lines("topo", "-m"),
        "environment": {name: os.environ.get(name) for name in _ENVIRONMENT},
    }


def _lines(*arguments: str) -> list[str]:
    """What ``nvidia-smi`` prints; nothing where it is not there."""
    command = ["nvidia-smi", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.splitlines()


def main() -> None:
    """Run, store, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", default=",".join(PARTS), help="some of: " + ",".join(PARTS))
    parser.add_argument("--devices", default=None, help="e.g. 0,1 or 0,0 or cpu,cpu")
    parser.add_argument("--models", default=",".join(MODELS), help="some of: " + ",".join(MODELS))
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--limit_s", type=float, default=LIMIT_S, help="of each part")
    parser.add_argument("--again", action="store_true", help="also what is stored")
    parser.add_argument("--list", action="store_true", help="name the cases and run none")
    parser.add_argument("--commit", default=None, help="kept where the files are no git checkout")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    try:
        devices = choose_devices(options.devices, count_gpus())
        parts = _some(options.part, PARTS)
        models = _some(options.models, MODELS)
    except ValueError as error:
        parser.error(str(error))
    cases = [
        case
        for case in all_cases(devices, models, options.output.resolve().parent)
        if options.only in case.name
    ]
    by_part = {part: [case for case in cases if case.part == part] for part in parts}
    if options.list:
        print("\n".join(f"{case.part}: {case.name}" for part in parts for case in by_part[part]))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started ends, too
    with _shared(devices):
        store = Store(options.output, describe_run(devices, options.commit))
        for part in parts:
            run_part(by_part[part], store, limit_s=options.limit_s, again=options.again)
    rows = multi_gpu_ratios.summarize(store.parts)
    store.put_table(rows)
    print(multi_gpu_ratios.render(rows))


def _shared(devices: Sequence[str]) -> contextlib.AbstractContextManager[object]:
    """MPS where stages share a GPU: without it they take turns."""
    gpus = [name for name in devices if name != "cpu"]
    if len(gpus) == len(set(gpus)) or "CUDA_MPS_PIPE_DIRECTORY" in os.environ:
        return contextlib.nullcontext()
    from benchmarks.stage_processes import mps  # loads torch

    return mps()


def _some(given: str, known: Sequence[str]) -> list[str]:
    """The names that were given, in the order of their worth."""
    names = given.split(",")
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"no {', '.join(unknown)}; there are {', '.join(known)}")
    return [name for name in known if name in names]


if __name__ == "__main__":
    main()
