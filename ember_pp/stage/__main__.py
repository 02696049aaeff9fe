"""Process of one stage: ``python -m ember_pp.stage --address A --stage-index I --parent-pid P``.

Three threads. This one, the main thread, owns the socket and never blocks for long: it passes
messages to the worker, sends what the worker posts, reports its state, and ends the process
when told to. The worker thread (``worker.py``) imports torch, loads and computes; it may wait
in a hand-off for a neighbour that never comes, and the process still answers. The heart
(``sockets.Heart``) returns heartbeats even while one of the other two holds the interpreter's lock.

Both sides of the socket count what they send and tell the other (``Tally``): a message that was
lost, came twice or is none ends the epoch, and the coordinator begins another (``Renew``).

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

from ember_pp.errors import EXIT_FAILED, EXIT_OK, ProtocolError
from ember_pp.protocol import (
    Message,
    Renew,
    Shutdown,
    StageConfig,
    StageFailed,
    StageHello,
    StageProgress,
    StageStats,
    Tally,
)
from ember_pp.sockets import DealerSocket, Heart
from ember_pp.stage.capacity import host_facts
from ember_pp.stage.failure import failure_of

if TYPE_CHECKING:
    from ember_pp.stage.worker import StageWorker

TOKEN_VARIABLE = "EMBER_STAGE_TOKEN"
_REPORT_PERIOD_S = 0.25
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


def is_under_mps() -> bool:
    """Whether the processes of this user share their GPUs through an MPS daemon."""
    folder = os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")
    return os.path.exists(os.path.join(folder, "control"))


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
        self._num_sent = 0
        self._num_sent_told = 0
        self._num_received = 0
        self._is_count_doubtful = False
        """What is wrong has been told: a count that differs is no news."""
        self._building_told = ""
        self._last_stats: StageStats | None = None
        self._next_report_s = 0.0
        self._thread = threading.Thread(
            target=self._work, name=f"stage-{stage_index}-worker", daemon=True
        )

    def run(self, hello: StageHello) -> int:
        """Serve until ``Shutdown`` or a failure; the exit code."""
        self._send(hello)
        self._thread.start()
        try:
            exit_code = self._serve()
        except Exception as error:  # noqa: BLE001  whatever it is, the coordinator must know
            self._send(failure_of(error, epoch=-1, stage_index=self._stage_index, plan=-1))
            exit_code = EXIT_FAILED
        self._stop_worker()
        return exit_code

    def _serve(self) -> int:
        while True:
            message = self._receive()
            stats = self._stats_if_due()  # before what is posted goes out: that comes first
            if self._send_posted():
                return EXIT_FAILED
            if isinstance(message, Shutdown):
                self._stop_worker()
                self._send_trace()
                return EXIT_OK
            if isinstance(message, StageConfig):
                level = str(message.config.get("log_level", "warning")).upper()
                logging.getLogger("ember_pp").setLevel(level)
            if isinstance(message, Renew) and self._worker is not None:
                self._worker.end_waits(message.epoch)
            if message is not None:
                self._inbox.put(message)
            self._report(stats)

    def _receive(self) -> Message | None:
        """The next message for the worker, if there is one; what is wrong with any is reported."""
        try:
            message = self._socket.receive(_REPORT_PERIOD_S)
        except ProtocolError as error:
            self._is_count_doubtful = True
            self._end_epoch(error)
            return None
        if isinstance(message, Tally):
            self._check_tally(message)
            return None
        self._num_received += message is not None
        return message

    def _check_tally(self, tally: Tally) -> None:
        num_received, self._num_received = self._num_received, tally.num_messages
        is_doubtful, self._is_count_doubtful = self._is_count_doubtful, False
        if num_received != tally.num_messages and not is_doubtful:
            text = f"got {num_received} messages of {tally.num_messages} that were sent"
            self._end_epoch(ProtocolError(f"stage {self._stage_index} {text}"))

    def _end_epoch(self, error: ProtocolError) -> None:
        # Of no epoch: whichever it is, a message of it may be the one that is missing.
        index = self._stage_index
        self._send(failure_of(error, epoch=-1, stage_index=index, plan=-1, is_ending=False))

    def _send(self, message: Message) -> None:
        self._socket.send(message)
        self._num_sent += 1

    def _send_posted(self) -> bool:
        """Send what the worker posted; True when its last word was that it failed."""
        while self._outbox:
            message = self._outbox.popleft()
            self._send(message)
            if isinstance(message, StageFailed):
                if message.is_ending:
                    return True
                self._is_count_doubtful = True
        return False

    def _stats_if_due(self) -> StageStats | None:
        is_due = self._worker is not None and time.monotonic() >= self._next_report_s
        return self._worker.stats() if is_due and self._worker is not None else None

    def _report(self, stats: StageStats | None) -> None:
        """Every now and then, what is new."""
        building = "" if self._worker is None else self._worker.building
        if building != self._building_told:
            self._building_told = building
            self._send(StageProgress(self._stage_index, building, 0, 0))
        if stats is not None and stats != self._last_stats:
            self._send(stats)
            self._last_stats = stats
        if time.monotonic() < self._next_report_s:
            return
        self._next_report_s = time.monotonic() + _REPORT_PERIOD_S
        if self._num_sent != self._num_sent_told:
            self._num_sent_told = self._num_sent
            self._socket.send(Tally(self._num_sent))

    def _send_trace(self) -> None:
        """What the worker recorded last; nothing if no trace is wanted, or if it still works."""
        if self._worker is None or self._thread.is_alive():
            return
        trace = self._worker.take_trace()
        if trace is not None:
            self._send(trace)
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
    identity = f"{name}-{os.getpid()}".encode()  # of this process, not of the next of this stage
    heart = Heart(options.address, identity=identity)
    socket = DealerSocket(options.address, identity=identity)
    token = os.environ.pop(TOKEN_VARIABLE, "")
    facts = host_facts() | {"is_mps": is_under_mps()}
    control = StageControl(options.stage_index, socket)
    exit_code = control.run(StageHello(options.stage_index, token, os.getpid(), facts))
    if exit_code == EXIT_OK or control.is_worker_alive:
        # Nothing is left to be sent or written. Taking the interpreter and torch apart would
        # cost half a second, and wait for a worker that computes and cannot be asked to stop.
        logging.shutdown()
        os._exit(exit_code)
    socket.close()
    heart.close()
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
