"""Process of one stage: ``python -m ember_pp.stage --address A --stage-index I --parent-pid P``.

Two threads. This one, the main thread, owns the socket and never blocks for long: it passes
messages to the worker, sends what the worker posts, reports its state, and ends the process
when told to. The worker thread (``worker.py``) imports torch, loads and computes; it may wait
in a hand-off for a neighbour that never comes, and the process still answers.

The one-time token of ``StageHello`` comes in the environment, not in the arguments, which any
user of the machine can read.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from queue import SimpleQueue
from typing import TYPE_CHECKING

from ember_pp.errors import EXIT_FAILED, EXIT_OK
from ember_pp.protocol import Message, Shutdown, StageConfig, StageFailed, StageHello, StageStats
from ember_pp.sockets import DealerSocket
from ember_pp.stage.capacity import host_facts
from ember_pp.stage.failure import failure_of

if TYPE_CHECKING:
    from ember_pp.stage.worker import StageWorker

TOKEN_VARIABLE = "EMBER_STAGE_TOKEN"
_STATS_PERIOD_S = 0.25
_JOIN_TIMEOUT_S = 1.0
_SWITCH_INTERVAL_S = 0.0005  # the control thread gets the GIL from the worker this soon
_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when the thread that started it ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:  # it died before the call above
        sys.exit(EXIT_FAILED)


class StageControl:
    """The main thread's loop.

    Args:
        stage_index: of this stage.
        socket: connected to the coordinator; used by this thread alone.
    """

    def __init__(self, stage_index: int, socket: DealerSocket) -> None:
        self._stage_index = stage_index
        self._socket = socket
        self._inbox: SimpleQueue[Message | None] = SimpleQueue()
        self._outbox: deque[Message] = deque()
        self._worker: StageWorker | None = None
        self._is_stopping = False
        self._last_stats: StageStats | None = None
        self._next_stats_s = 0.0
        self._thread = threading.Thread(
            target=self._work, name=f"stage-{stage_index}-worker", daemon=True
        )

    def run(self) -> int:
        """Serve until ``Shutdown`` or a failure; the exit code."""
        self._thread.start()
        try:
            exit_code = self._serve()
        except Exception as error:  # noqa: BLE001  whatever it is, the coordinator must know
            failure = failure_of(error, epoch=-1, stage_index=self._stage_index, plan=-1)
            self._socket.send(failure)
            exit_code = EXIT_FAILED
        self._stop_worker()
        return exit_code

    def _serve(self) -> int:
        while True:
            message = self._socket.receive(_STATS_PERIOD_S)
            if self._send_posted():
                return EXIT_FAILED
            if isinstance(message, Shutdown):
                self._stop_worker()
                self._send_trace()
                return EXIT_OK
            if isinstance(message, StageConfig):
                level = str(message.config.get("log_level", "warning")).upper()
                logging.getLogger("ember_pp").setLevel(level)
            if message is not None:
                self._inbox.put(message)
            self._report()

    def _send_posted(self) -> bool:
        """Send what the worker posted; True when its last word was that it failed."""
        while self._outbox:
            message = self._outbox.popleft()
            self._socket.send(message)
            if isinstance(message, StageFailed):
                return True
        return False

    def _report(self) -> None:
        now_s = time.monotonic()
        if self._worker is None or now_s < self._next_stats_s:
            return
        stats = self._worker.stats()
        if stats is not None and stats != self._last_stats:
            self._socket.send(stats)
            self._last_stats = stats
        self._next_stats_s = now_s + _STATS_PERIOD_S

    def _send_trace(self) -> None:
        """What the worker recorded last; nothing if no trace is wanted, or if it still works."""
        if self._worker is None or self._thread.is_alive():
            return
        trace = self._worker.take_trace()
        if trace is not None:
            self._socket.send(trace)
            self._socket.flush()

    def _stop_worker(self) -> None:
        if self._is_stopping:
            return
        self._is_stopping = True
        self._inbox.put(None)
        if self._worker is not None:
            self._worker.close()
        self._thread.join(_JOIN_TIMEOUT_S)

    @property
    def is_worker_alive(self) -> bool:
        """True when the worker is in the middle of something that cannot be interrupted."""
        return self._thread.is_alive()

    # ---------------------------------------------------------------- worker thread

    def _work(self) -> None:
        try:
            from ember_pp.stage.worker import StageWorker  # loads torch

            self._worker = worker = StageWorker(self._stage_index, self._post)
        except BaseException as error:  # noqa: BLE001  whatever it is, the coordinator must know
            self._post(failure_of(error, epoch=-1, stage_index=self._stage_index, plan=-1))
            return
        if not self._is_stopping:
            worker.run(self._inbox)

    def _post(self, message: Message) -> None:
        self._outbox.append(message)
        self._socket.wake()


def main(arguments: list[str] | None = None) -> int:
    """Run a stage; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ember_pp.stage", description=__doc__)
    parser.add_argument("--address", required=True)
    parser.add_argument("--stage-index", type=int, required=True)
    parser.add_argument("--parent-pid", type=int, required=True)
    options = parser.parse_args(arguments)
    die_with_parent(options.parent_pid)
    # Ctrl-C reaches the whole foreground group, and Slurm's SIGTERM every process of a step; what
    # they mean is for the coordinator to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    name = f"stage-{options.stage_index}"
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)
    logging.basicConfig(
        level=logging.WARNING, format=f"%(asctime)s {name} %(levelname)s %(name)s: %(message)s"
    )
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    socket = DealerSocket(options.address, identity=name.encode())
    token = os.environ.pop(TOKEN_VARIABLE, "")
    socket.send(StageHello(options.stage_index, token, os.getpid(), host_facts()))
    control = StageControl(options.stage_index, socket)
    exit_code = control.run()
    if exit_code == EXIT_OK or control.is_worker_alive:
        # Nothing is left to be sent or written. Taking the interpreter and torch apart would
        # cost half a second, and wait for a worker that computes and cannot be asked to stop.
        logging.shutdown()
        os._exit(exit_code)
    socket.close()
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
