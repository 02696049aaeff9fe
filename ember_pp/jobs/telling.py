"""What a job that measures tells: a line while it works, then a table, and JSON where asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ember_pp.jobs.json_file import write_json


def say(text: str) -> None:
    """What goes on, in one line where that is possible; empty: nothing any more."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
    elif text:
        sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def report(table: str, result: Mapping[str, Any], output: str | None) -> None:
    """Print ``table``, and write ``result`` where ``job.output`` says.

    Args:
        table: goes to stdout, or to stderr where stdout is for JSON.
        result: what JSON has types for.
        output: a file, ``-`` for stdout, or None.

    Raises:
        ConfigError: the file cannot be written.
    """
    print(table, file=sys.stderr if output == "-" else sys.stdout)
    if output == "-":
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
    elif output is not None:
        write_json("job.output", Path(output), result)
