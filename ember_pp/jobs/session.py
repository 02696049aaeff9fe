"""A client of the coordinator that the configuration names, or of one that is started for it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from ember_pp import config as configuration
from ember_pp.client import Client
from ember_pp.config import Config
from ember_pp.coordinator.launcher import child_environment
from ember_pp.errors import ConfigError, EmberError, PipelineError, from_wire
from ember_pp.key_files import client_keys
from ember_pp.sockets import PrivateDirectory, default_address

_KILL_AFTER_S = 3.0  # beyond coordinator.shutdown_grace_s, in which it ends its stages


class CoordinatorProcess:
    """A coordinator that this job started, and that ends with it.

    It runs in a process group of its own, so that Ctrl-C reaches the job alone, which decides
    what becomes of the work in flight.
    """

    def __init__(self, config: Config, address: str) -> None:
        coordinator = dataclasses.replace(config.coordinator, address=address, curve=None)
        plain = configuration.to_plain(dataclasses.replace(config, coordinator=coordinator))
        self._grace_s = config.coordinator.shutdown_grace_s + _KILL_AFTER_S
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "ember_pp.coordinator"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=child_environment(),
            process_group=0,
        )
        if self._process.stdin is None:
            raise AssertionError("stdin is a pipe")
        with contextlib.suppress(BrokenPipeError), self._process.stdin as pipe:
            pipe.write(json.dumps({"parent_pid": os.getpid(), "config": plain}).encode())

    def check_alive(self) -> None:
        """Raise what the coordinator ended with, if it has ended."""
        status = self._process.poll()
        if status is None:
            return
        raise self._reported_error() or PipelineError(f"the coordinator ended with status {status}")

    def stop(self) -> None:
        """Ask it to end, with its stages; kill it if it does not."""
        self._process.terminate()
        try:
            self._process.wait(self._grace_s)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _reported_error(self) -> EmberError | None:
        if self._process.stdout is None:
            return None
        lines = self._process.stdout.read().decode(errors="replace").splitlines()
        try:
            report: Any = json.loads(lines[-1]) if lines else None
        except ValueError:
            return None
        return from_wire(report) if isinstance(report, dict) else None


@contextlib.contextmanager
def open_running(config: Config, *, timeout_s: float) -> Iterator[Client]:
    """A client of the coordinator that runs at ``coordinator.address``, or where one is by default.

    Raises:
        ConfigError: keys that the address needs are missing.
    """
    address = config.coordinator.address or default_address()
    keys = client_keys(config.coordinator, address)
    with Client(address, timeout_s=timeout_s, keys=keys) as client:
        yield client


@contextlib.contextmanager
def open_client(config: Config) -> Iterator[Client]:
    """A client of the coordinator at ``coordinator.address``, or of one started for this job.

    Call from the main thread: the coordinator ends with the thread that started it.

    Raises:
        ConfigError: the coordinator runs already, and cannot do what only its start decides.
        EmberError: the coordinator ended; the error is the one that ended it.
    """
    if config.coordinator.address is not None:
        _check_runs_with(config, config.coordinator.address)
        keys = client_keys(config.coordinator, config.coordinator.address)
        with Client(config.coordinator.address, keys=keys) as client:
            client.status()  # a wrong address is known now, not at the first answer
            yield client
        return
    with PrivateDirectory() as directory:
        address = directory.address("clients.sock")
        process = CoordinatorProcess(config, address)
        try:
            with Client(address, check_alive=process.check_alive) as client:
                yield client
        finally:
            process.stop()


def _check_runs_with(config: Config, address: str) -> None:
    """Refuse what would silently not happen."""
    asked = {
        "trace.output": config.trace.output,
        "trace.picture": config.trace.picture,
        "metrics.port": config.metrics.port,
    }
    for key, value in asked.items():
        if value is not None:
            raise ConfigError(
                f"{key}: the coordinator at {address} runs already; set this where job=serve "
                "starts it"
            )
