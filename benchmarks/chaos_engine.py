"""A coordinator with its stages behind a ``chaos_link``, seen from outside."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zmq

from benchmarks.chaos_link import Fault
from ember_pp import config as configuration
from ember_pp.client import Client
from ember_pp.config import Config
from ember_pp.coordinator.coordinator import serve
from ember_pp.coordinator.launcher import LocalLauncher, LocalProcess, child_environment
from ember_pp.coordinator.stop_signal import StopSignal
from ember_pp.stage.__main__ import die_with_parent

READY_TIMEOUT_S = 120.0
END_TIMEOUT_S = 10.0
RING_NAME = "ember-pp ring"
_BEGINS = re.compile(
    r"epoch (\d+) begins, with new processes for stages (\[.*?\]): (.*)", re.DOTALL
)
_IS_READY = re.compile(r"epoch (\d+): all stages are ready again")


class LinkedLauncher:
    """Starts stages as ``local`` does, connected to the link, which it starts with the first."""

    def __init__(self, front: str, control: str) -> None:
        self._front, self._control = front, control
        self._local = LocalLauncher()
        self._link: subprocess.Popen[bytes] | None = None

    def start(self, stage_index: int, *, address: str, token: str) -> LocalProcess:
        """As ``Launcher.start``."""
        if self._link is None:
            command = [sys.executable, "-m", "benchmarks.chaos_link", "--back", address]
            command += ["--front", self._front, "--control", self._control]
            command += ["--parent-pid", str(os.getpid())]
            self._link = subprocess.Popen(command, env=child_environment())
        return self._local.start(stage_index, address=self._front, token=token)


class Journal(logging.Handler):
    """Writes when epochs begin and are ready, from what the supervisor logs: a JSON line each."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("a", buffering=1)

    def emit(self, record: logging.LogRecord) -> None:
        """Take one line of the log."""
        at_s, text = time.monotonic(), record.getMessage()
        if (begins := _BEGINS.match(text)) is not None:
            entry: dict[str, Any] = {"epoch": int(begins[1]), "begins_at_s": at_s}
            entry |= {"replaced": json.loads(begins[2]), "why": begins[3]}
        elif (ready := _IS_READY.match(text)) is not None:
            entry = {"epoch": int(ready[1]), "ready_at_s": at_s}
        else:
            return
        self._file.write(json.dumps(entry) + "\n")


def serve_linked(path: Path) -> None:
    """Be the coordinator that ``path`` describes, until SIGTERM."""
    plain = json.loads(path.read_text())
    die_with_parent(plain["parent_pid"])
    logging.getLogger("ember_pp.coordinator.supervisor").addHandler(Journal(Path(plain["journal"])))
    logging.getLogger("ember_pp").setLevel("WARNING")
    with StopSignal() as stop:
        launcher = LinkedLauncher(plain["front"], plain["control"])
        serve(configuration.build(plain["config"]), stop, launcher=launcher)


class Engine:
    """A coordinator process, its stages, and a client of it."""

    def __init__(self, config: Config, folder: Path) -> None:
        self._journal = folder / "journal"
        self._journal.touch()
        self._context = zmq.Context()
        self._control = self._context.socket(zmq.PAIR)
        self._control.bind(f"ipc://{folder}/control")
        assert config.coordinator.address is not None, "chosen by the caller"
        plan = {"parent_pid": os.getpid(), "config": configuration.to_plain(config)}
        plan |= {"front": f"ipc://{folder}/front", "control": f"ipc://{folder}/control"}
        plan |= {"journal": str(self._journal)}
        path = folder / "engine.json"
        path.write_text(json.dumps(plan))
        command = [sys.executable, "-m", "benchmarks.chaos", "--serve", str(path)]
        with (folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, env=child_environment(), stderr=log)
        self.log = folder / "log"
        self.client = Client(
            config.coordinator.address, timeout_s=READY_TIMEOUT_S, check_alive=self.check_alive
        )
        self.all_pids: set[int] = set()
        self.wait_ready()

    def check_alive(self) -> None:
        """Raise with the end of its log if the coordinator has ended."""
        if self._process.poll() is not None:
            tail = self.log.read_text(errors="replace")[-3000:]
            raise RuntimeError(f"the coordinator ended with {self._process.returncode}:\n{tail}")

    def wait_ready(self) -> None:
        """Until every stage takes plans."""
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while self.client.status()["phase"] != "ready":
            self.check_alive()
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"not ready: {self.client.status()}")
            time.sleep(0.02)
        self.pids()

    def pids(self) -> list[int]:
        """Of the stages, in order."""
        found = [stage["pid"] for stage in self.client.status()["stages"]]
        self.all_pids.update(found)
        return found

    def journal(self) -> list[dict[str, Any]]:
        """All epochs so far."""
        return [json.loads(line) for line in self._journal.read_text().splitlines()]

    def arm(self, fault: Fault | None) -> None:
        """Have the link do this to the next message of its kind; None: nothing any more."""
        while self._control.poll(0):
            self._control.recv()
        self._control.send(json.dumps(None if fault is None else vars(fault)).encode())

    def fired_at_s(self, timeout_s: float) -> float | None:
        """When the fault happened; None if it has not by then."""
        if not self._control.poll(int(timeout_s * 1000)):
            return None
        at_s: float = json.loads(self._control.recv())
        return at_s

    def close(self) -> dict[str, Any]:
        """End it; the processes and shared memory that were left."""
        with contextlib.suppress(Exception):
            self.pids()
        self.client.close()
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(READY_TIMEOUT_S)
        deadline_s = time.monotonic() + END_TIMEOUT_S
        while (left := [pid for pid in self.all_pids if is_running(pid)]) and (
            time.monotonic() < deadline_s
        ):
            time.sleep(0.02)
        self._context.destroy(linger=0)
        return {
            "exit_code": self._process.returncode,
            "orphans": len(left),
            "segments": sum(len(rings_of(pid)) for pid in self.all_pids),
            "processes_started": len(self.all_pids),
        }


def is_running(pid: int) -> bool:
    """Whether there is such a process that has not ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def rings_of(pid: int) -> list[str]:
    """Shared memory of hand-offs that a process holds, one entry for each descriptor."""
    found = []
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if RING_NAME in (target := os.readlink(link)):
                    found.append(target)
    return found


@contextlib.contextmanager
def engine(config: Config, folder: Path) -> Iterator[Engine]:
    """An engine that is killed if the run does not get to ``close``."""
    made = Engine(config, folder)
    try:
        yield made
    finally:
        if made._process.poll() is None:
            made._process.kill()
            made._process.wait()
