"""``python -m ember_pp.coordinator``: the coordinator as the child of a job.

Reads the configuration as JSON from stdin. If it ends with an error, the last line of its
stdout is that error as JSON (``EmberError.to_wire``), for the job that started it. It ends
with its parent.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys

from ember_pp import config as configuration
from ember_pp.coordinator.coordinator import serve
from ember_pp.coordinator.stop_signal import StopSignal
from ember_pp.errors import EXIT_FAILED, EXIT_OK, EmberError

_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Serve until a signal; returns the exit code."""
    plain = json.load(sys.stdin)
    with StopSignal(is_child=True) as stop:
        _end_with_parent(plain["parent_pid"])
        config = configuration.build(plain["config"])
        logging.basicConfig(
            level=config.log_level.upper(),
            format="%(asctime)s coordinator %(levelname)s %(name)s: %(message)s",
        )
        try:
            serve(config, stop)
        except EmberError as error:
            _report(error)
            return EXIT_FAILED
        except Exception as bug:
            _report(EmberError(f"the coordinator failed: {type(bug).__name__}: {bug}"))
            raise
    return EXIT_OK


def _report(error: EmberError) -> None:
    print(json.dumps(error.to_wire()), flush=True)  # noqa: T201  for the job


def _end_with_parent(parent_pid: int) -> None:
    # SIGTERM, not SIGKILL: the coordinator then takes its stages and its folder with it.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent_pid:  # it died before the line above
        raise SystemExit(EXIT_FAILED)


if __name__ == "__main__":
    sys.exit(main())
