"""Speed targets of one GPU, through ``job=bench``: ``python -m benchmarks.targets``.

Random weights of the true shapes, bf16, one stage. Each row runs by itself, in a coordinator of
its own, with the rates of the device measured in the same run; ``--rows`` chooses some. Rows that
were stored before stay in the result until they run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULT = Path(__file__).with_name("results") / "targets.json"
TIMEOUT_S = 240

_LARGE_PLANS = ("scheduler.max_tokens_per_plan=8192",)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table, and the ``job=bench`` that measures it."""

    what: str
    overrides: tuple[str, ...]
    metric: str
    """Key of the result's ``summary`` that the targets are about."""
    must: float
    aim: float


ROWS = {
    "0.6b-single": Row(
        "Qwen3-0.6B, one stream, context <= 256",
        ("model=qwen3-0.6b", "job.workload=single"),
        *("ratio", 0.60, 0.90),
    ),
    "8b-single": Row(
        "Qwen3-8B, one stream",
        ("model=qwen3-8b", "job.workload=single"),
        *("ratio", 0.90, 0.97),
    ),
    "8b-fixed-64": Row(
        "Qwen3-8B, decode step at batch 64, context about 640",
        ("model=qwen3-8b", "job.workload=fixed", "job.batch=64", "job.repeats=2", *_LARGE_PLANS),
        *("ratio", 0.75, 0.90),
    ),
    "8b-fixed-256": Row(
        "Qwen3-8B, decode step at batch 256, context about 640",
        (
            *("model=qwen3-8b", "job.workload=fixed", "job.batch=256", "job.repeats=2"),
            *("scheduler.max_sequences=256", *_LARGE_PLANS),
        ),
        *("ratio", 0.75, 0.90),
    ),
    "0.6b-mixed": Row(
        "256 requests of 100-1024 tokens, 0.6B, output tokens/s",
        (
            *("model=qwen3-0.6b", "job.workload=mixed", "job.repeats=2"),
            *("scheduler.max_sequences=256", *_LARGE_PLANS),
        ),
        *("output_tokens_per_s", 18_000, 22_000),
    ),
    "8b-mixed": Row(
        "256 requests of 100-1024 tokens, 8B, output tokens/s",
        (
            *("model=qwen3-8b", "job.workload=mixed", "job.repeats=2"),
            *("scheduler.max_sequences=256", *_LARGE_PLANS),
        ),
        *("output_tokens_per_s", 7_600, 8_600),
    ),
    "8b-prefill": Row(
        "Qwen3-8B, prefill of 8 x 2048 tokens, of the measured matrix rate",
        ("model=qwen3-8b", "job.workload=prefill", *_LARGE_PLANS),
        *("ratio", 0.70, 0.85),
    ),
}


def run(row: Row, given: list[str]) -> dict[str, Any]:
    """The result of ``job=bench``, or its error; ``given`` overrides the row."""
    command = ["-m", "ember_pp", "job=bench", "model.load=random", *row.overrides, *given]
    started_s = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *command, "job.output=-"],
            stdout=subprocess.PIPE,
            timeout=TIMEOUT_S,
            text=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {TIMEOUT_S} s"}
    if done.returncode:
        return {"error": f"exit code {done.returncode}"}
    result: dict[str, Any] = json.loads(done.stdout)
    return {"command": " ".join(["python", *command]), "result": result} | {
        "took_s": round(time.monotonic() - started_s, 1)
    }


def describe(row: Row, measured: dict[str, Any]) -> dict[str, Any]:
    """The row of the table: what was asked, what came out, with its spread."""
    entry: dict[str, Any] = {"what": row.what, "metric": row.metric}
    entry |= {"must": row.must, "aim": row.aim}
    spread = measured.get("result", {}).get("summary", {}).get(row.metric)
    if spread is None:
        error = measured.get("error", "no steady decode; see job.output_tokens")
        return entry | {"measured": None, "error": error}
    return entry | {
        "measured": spread["median"],
        "spread": [spread["min"], spread["max"]],
        "reaches": "aim" if spread["median"] >= row.aim else _must_or_not(row, spread["median"]),
    }


def _must_or_not(row: Row, value: float) -> str:
    return "must" if value >= row.must else "neither"


def main() -> None:
    """Print a table, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default=",".join(ROWS), help="some of: " + ",".join(ROWS))
    parser.add_argument("--commit", default=None, help="kept where the files are no git checkout")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("overrides", nargs="*", help="settings for every row, key=value")
    options = parser.parse_args()
    names = options.rows.split(",")
    if unknown := set(names) - set(ROWS):
        parser.error(f"--rows: no row {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    stored = {"benchmark": "targets", "rows": {}}
    if options.output.exists():
        stored = json.loads(options.output.read_text())
    for name in names:
        row = ROWS[name]
        measured = run(row, options.overrides)
        if "result" in measured and measured["result"]["conditions"]["commit"] is None:
            measured["result"]["conditions"]["commit"] = options.commit
        stored["rows"][name] = entry = describe(row, measured) | measured
        value = "-" if entry["measured"] is None else f"{entry['measured']:,.3f}"
        note = entry.get("error") or f"{entry['spread']}, {entry['reaches']}"
        print(
            f"{name:14} must {row.must:<8g} aim {row.aim:<8g} measured {value} ({note})", flush=True
        )
        options.output.write_text(json.dumps(stored, indent=2) + "\n")  # each row, as it ends
    print(f"written: {options.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
