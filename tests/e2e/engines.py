"""A whole engine on the demo model for a test, and its processes from the outside."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import pytest

from ember_pp import config as configuration
from ember_pp.jobs.session import open_client

PROMPTS = [
    "The capital of France is",
    "A planet is a large body that",
    "Music is",
    "In 1905, the physicist Albert Einstein published four papers. In the first of them he",
]
GREEDY = {"temperature": 0.0, "max_tokens": 24, "ignore_eos": True}


def make_config(**groups):
    plain = {
        "job": {"name": "serve"},
        "model": {"path": "demo", "dtype": "float32"},
        "pipeline": {"stages": 2, "devices": "cpu", "cpu_threads": 1},
        "cache": {"memory_gib": 0.05},
    }
    for name, values in groups.items():
        plain[name] = plain.get(name, {}) | values if isinstance(values, dict) else values
    return configuration.build(plain)


@contextlib.contextmanager
def engine(**groups):
    with open_client(make_config(**groups)) as client:
        yield client


def run_all(client, requests):
    """Token ids of each request, all submitted at once."""
    submitted = [client.submit(prompt, sampling=sampling) for prompt, sampling in requests]
    return [request.result(120.0).token_ids for request in submitted]


def stage_pids(client):
    return [stage["pid"] for stage in client.status()["stages"]]


def parent_of(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def has_ended(pid):
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] == "Z"
    return True


def wait_until_ended(pids, timeout_s=5.0):
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if all(has_ended(pid) for pid in pids):
            return
        time.sleep(0.02)
    pytest.fail(f"still running: {[pid for pid in pids if not has_ended(pid)]}")


def rings_of(pid):
    """Shared memory of hand-offs that a process has open or mapped."""
    found = []
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if "ember-pp ring" in (target := os.readlink(link)):
                    found.append(target)
    return found
