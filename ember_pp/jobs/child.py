"""A child process of a job that loads torch, as jobs never do: JSON in, JSON out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from ember_pp.coordinator.launcher import child_environment
from ember_pp.errors import EmberError, from_wire


def run_child(
    module: str, wanted: dict[str, Any], *, timeout_s: float, what: str
) -> dict[str, Any]:
    """What ``python -m module`` writes as its last line, given ``wanted`` on stdin.

    It also gets ``parent_pid``, to end with this process; what it has to say goes to stderr. An
    error of ours comes as ``{"error": ...}``.

    Raises:
        EmberError: it took longer than ``timeout_s`` (``coordinator.start_timeout_s``), failed, or
            reported this error; starts with ``what``.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", module],
            input=json.dumps(wanted | {"parent_pid": os.getpid()}),
            stdout=subprocess.PIPE,
            text=True,
            env=child_environment(),
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise EmberError(
            f"{what} took more than coordinator.start_timeout_s={timeout_s:g}"
        ) from None
    if done.returncode != 0:
        raise EmberError(f"{what} ended with status {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "error" in result:
        raise from_wire(result["error"])
    return result
