"""Starting and ending stage processes: the launcher interface, and ``local``.

Nothing above this file assumes that stages run on this host: a launcher that places them
through Slurm or Ray fills the same two classes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Protocol

import ember_pp
from ember_pp.errors import StageDiedError

_PACKAGE_PARENT = str(Path(ember_pp.__file__).parent.parent)


class StageProcess(Protocol):
    """A started stage."""

    stage_index: int
    pid: int
    exit_descriptor: int
    """A descriptor that becomes readable when the process ends."""

    def exit_status(self) -> int | None:
        """None while it runs; else the exit code, negative for a signal."""

    def kill(self) -> None:
        """End it at once, with all that it started."""

    def wait(self, timeout_s: float) -> int | None:
        """``exit_status`` after at most ``timeout_s``."""

    def close(self) -> None:
        """Give back what the handle holds; the process has ended."""


class Launcher(Protocol):
    """Starts stages somewhere."""

    def start(self, stage_index: int, *, address: str, token: str) -> StageProcess:
        """Start one stage that will connect to ``address`` and say hello with ``token``."""


def child_environment() -> dict[str, str]:
    """Environment in which a child imports the same ember_pp as this process, from any folder."""
    environment = dict(os.environ)
    paths = [_PACKAGE_PARENT, *environment.get("PYTHONPATH", "").split(os.pathsep)]
    environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path for path in paths if path))
    return environment


class LocalProcess:
    """A child process on this host, leader of its own process group."""

    def __init__(self, stage_index: int, process: subprocess.Popen[bytes]) -> None:
        self.stage_index = stage_index
        self.pid = process.pid
        self._process = process
        self.exit_descriptor = os.pidfd_open(process.pid)

    def exit_status(self) -> int | None:
        return self._process.poll()

    def kill(self) -> None:
        # The group outlives its leader only if the stage started something; end that too.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def wait(self, timeout_s: float) -> int | None:
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def close(self) -> None:
        os.close(self.exit_descriptor)


class LocalLauncher:
    """Starts stages as children of this process.

    ``start`` must be called from the main thread: a stage dies with the *thread* that
    started it (``PR_SET_PDEATHSIG``).
    """

    def start(self, stage_index: int, *, address: str, token: str) -> LocalProcess:
        command = [
            *(sys.executable, "-P", "-m", "ember_pp.stage"),
            *("--address", address, "--stage-index", str(stage_index)),
            *("--parent-pid", str(os.getpid())),
        ]
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno(),  # stdout belongs to answers and tables
                env=child_environment() | {"EMBER_STAGE_TOKEN": token},
                process_group=0,
            )
        except OSError as error:
            raise StageDiedError(
                f"stage {stage_index} could not be started: {error}", stage_index=stage_index
            ) from None
        return LocalProcess(stage_index, process)


def end_all(processes: list[StageProcess], *, grace_s: float) -> None:
    """Wait up to ``grace_s`` for the processes to end by themselves, then kill and reap them."""
    deadline = time.monotonic() + grace_s
    for process in processes:
        if process.wait(max(0.0, deadline - time.monotonic())) is None:
            process.kill()
    for process in processes:
        process.kill()  # what a stage may have started
        process.wait(5.0)
        process.close()
