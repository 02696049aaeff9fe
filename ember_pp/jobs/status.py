"""``job=status``: what a running coordinator is doing, as JSON on stdout."""

from __future__ import annotations

import json
import sys

from ember_pp.config import Config
from ember_pp.errors import EXIT_FAILED, EXIT_OK
from ember_pp.jobs.session import open_running


def run(config: Config) -> int:
    """Print the status map; the exit code says whether work goes on, or has nothing to do."""
    with open_running(config, timeout_s=5.0) as client:
        status = client.status()
    json.dump(status, sys.stdout, indent=2)
    sys.stdout.write("\n")
    return EXIT_FAILED if status["problems"] else EXIT_OK
