"""What only a running pipeline can say: ``benchmarks/multi_gpu.py`` starts it.

    python -m benchmarks.multi_gpu_serving edges  [settings as for job=serve]
    python -m benchmarks.multi_gpu_serving killed [settings as for job=serve]

``edges`` says which path each edge took with the settings given. ``killed`` sends 256 requests,
kills the last stage with SIGKILL when a quarter of the tokens are there, and says how long nothing
came and what memory every GPU had in use before and afterwards. Both print JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.multi_gpu_child import gpu_memory_mib
from ember_pp.client import Client
from ember_pp.config import BenchJob
from ember_pp.errors import EmberError
from ember_pp.jobs.bench_run import BenchAnswer, submit_all
from ember_pp.jobs.bench_workload import BenchWorkload, make_workload

_POLL_S = 0.2
_KILL_AT = 0.25
"""Of all tokens."""
_END_S = 20.0
_VOCABULARY = 1000
"""Ids that every model has."""


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("edges", "killed"))
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--lengths", type=int, nargs=2, default=(100, 1024))
    options, settings = parser.parse_known_args()
    with serving(settings) as client:
        if options.what == "edges":
            said = edges(client)
        else:
            job = BenchJob(workload="mixed", batch=options.requests, lengths=list(options.lengths))
            said = killed(client, make_workload(job, _VOCABULARY, sum(options.lengths) * 2))
    print(json.dumps(said))


@contextlib.contextmanager
def serving(settings: Sequence[str]) -> Iterator[Client]:
    """A client of ``job=serve`` with these settings, once every stage is ready.

    Raises:
        EmberError: it ended instead.
    """
    with tempfile.TemporaryDirectory() as folder:
        address = f"ipc://{Path(folder) / 'clients.sock'}"
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "ember_pp", "job=serve", *settings),
                f"coordinator.address={address}",
            ],
            stdout=sys.stderr.fileno(),
        )

        def check_alive() -> None:
            if process.poll() is not None:
                raise EmberError(f"job=serve ended with exit code {process.returncode}")

        try:
            with Client(address, check_alive=check_alive) as client:
                while client.status()["phase"] != "ready":
                    time.sleep(_POLL_S)
                yield client
        finally:
            process.terminate()
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def edges(client: Client) -> dict[str, Any]:
    """Path of each edge, and the device of each stage."""
    status = client.status()
    return {
        "edges": status["edges"],
        "devices": [stage["device"] for stage in status["stages"]],
    }


def killed(client: Client, workload: BenchWorkload) -> dict[str, Any]:
    """The last stage dies in the middle of ``workload``.

    Returns:
        ``reason`` if the run ends with it; else ``serving_again_s``, from the kill to the end of
        the longest silence after it, what memory was taken and how many answers came whole.
    """
    stages = client.status()["stages"]
    memory_before = gpu_memory_mib()
    requests = submit_all(client, workload, {}, seed_key="killed")
    num_ended = 0
    while client.status()["num_output_tokens"] < _KILL_AT * workload.output_tokens:
        num_ended += len(client.wait_any(_POLL_S))
        if num_ended == len(requests):
            requests[0].result()  # raises what it was refused for
            raise EmberError("all requests ended before a quarter of their tokens had come")
    victim = stages[-1]
    os.kill(victim["pid"], signal.SIGKILL)
    killed_s = time.monotonic()
    try:
        while num_ended < len(requests):
            num_ended += len(client.wait_any())
        arrivals = _arrivals(requests)
    except EmberError as error:
        return {"reason": f"the run ends when a stage dies: {error}"}
    status = client.status()
    memory_after = gpu_memory_mib()
    wrong = sum(
        len(request.result().token_ids) != wanted.output_tokens
        for request, wanted in zip(requests, workload.requests, strict=True)
    )
    return {
        "requests": workload.batch,
        "output_tokens": workload.output_tokens,
        "killed_stage": victim["stage_index"],
        "serving_again_s": round(silence_end(arrivals, killed_s) - killed_s, 3),
        "whole_run_s": round(arrivals[-1] - arrivals[0], 2),
        "num_wrong_lengths": wrong,
        "new_pid": status["stages"][-1]["pid"] != victim["pid"],
        "memory_before_mib": memory_before,
        "memory_after_mib": memory_after,
    }


def _arrivals(requests: Sequence[BenchAnswer]) -> list[float]:
    """When any tokens came, in order; raises what a request failed with."""
    return sorted(delta.received_s for request in requests for delta in request if delta.token_ids)


def silence_end(arrivals: Sequence[float], since_s: float) -> float:
    """End of the longest time without a token that ends after ``since_s``."""
    later = [pair for pair in itertools.pairwise(arrivals) if pair[1] > since_s]
    return max(later, key=lambda pair: pair[1] - max(pair[0], since_s))[1]


if __name__ == "__main__":
    main()
