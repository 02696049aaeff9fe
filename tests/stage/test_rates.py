"""Rates of a device: what the measured times come to."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch

from ember_pp.stage import rates

CPU = torch.device("cpu")


def test_rates_are_medians_of_bytes_and_operations_over_time(monkeypatch) -> None:
    monkeypatch.setattr(rates, "_CPU_BYTES", 4096)
    monkeypatch.setattr(rates, "_CPU_SIZE", 8)
    monkeypatch.setattr(rates, "_times", lambda run, device: [4.0, 1.0, 2.0])
    measured = rates.measure(CPU, torch.float32)
    assert measured["read_bytes_per_s"] == 4096 / 2
    assert measured["read_spread"] == [4096 / 4, 4096]
    assert measured["flops_per_s"] == 2 * 8**3 / 2
    assert measured["matrix_spread"] == [2 * 8**3 / 4, 2 * 8**3]
    assert measured["matrix_method"] == "torch.mm of 8 x 8 float32"


def test_every_run_that_is_timed_is_one_more_than_the_first() -> None:
    runs = []
    times = rates._times(lambda: runs.append(0), CPU)
    assert len(runs) == len(times) + 1
    assert min(times) > 0


def test_the_process_says_what_it_measured() -> None:
    wanted = {"devices": ["cpu"], "dtype": "float32", "num_threads": 1, "parent_pid": os.getpid()}
    done = subprocess.run(
        [sys.executable, "-m", "ember_pp.stage.rates"],
        input=json.dumps(wanted),
        capture_output=True,
        text=True,
        check=True,
    )
    said = json.loads(done.stdout)
    assert said["versions"]["torch"] == torch.__version__
    measured = said["rates"]["cpu"]
    assert measured["num_threads"] == 1
    assert 1e8 < measured["read_bytes_per_s"] < 1e12
    assert 1e8 < measured["flops_per_s"] < 1e13
