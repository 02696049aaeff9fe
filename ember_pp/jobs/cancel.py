"""``job=cancel``: end requests of a running coordinator, from the shell."""

from __future__ import annotations

import sys

from ember_pp.config import CancelJob, Config
from ember_pp.errors import EXIT_OK
from ember_pp.jobs.session import open_running


def run(config: Config) -> int:
    """Cancel ``job.request_ids`` (none: all requests) and print how many ended."""
    if not isinstance(config.job, CancelJob):
        raise AssertionError("dispatched by job.name")
    with open_running(config, timeout_s=5.0) as client:
        num_cancelled = client.cancel(config.job.request_ids, everyone=True)
    sys.stdout.write(f"{num_cancelled} requests cancelled\n")
    return EXIT_OK
