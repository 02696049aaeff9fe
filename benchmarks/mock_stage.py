"""A stage whose model only sleeps: ``python -m benchmarks.mock_stage``, for ``mock_stages``.

Everything else is the real stage: process, threads, messages, slot tables, hand-off, feedback,
sampler. What the sleep stands for is said on the ``Board``, which all processes of a
measurement map, so that one pipeline serves several measurements:

    by the host      the thread does the work: it takes the stage time from the moment at which
                     the thread has plan and input in hand. A CPU stage. Preparing a plan,
                     waking up late and handing on all cost time.
    on the device    the thread gives work to a device that waits for its input and for its own
                     last plan by itself, as with flags in device memory. A plan starts at the
                     latest of: end of the plan before it, end of the same plan one stage
                     earlier (on the first stage, of the plan whose tokens it starts from), and
                     the moment its ``Execute`` came if the stage waited for that. It ends one
                     stage time later, and until then the thread sleeps. Host work costs time
                     only where it takes longer than the plan.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ember_pp.protocol import Execute, Sampled
from ember_pp.stage import __main__ as process
from ember_pp.stage import worker as worker_module
from ember_pp.stage.runner import StageRunner
from ember_pp.stage.timing import StageClock
from ember_pp.stage.weights import StageWeights

BY_HOST, ON_DEVICE = "by the host", "on the device"
_PR_SET_TIMERSLACK = 29
_LOOKING_NS = 30_000
"""To take a plan that is there is a wait of this length at most."""
_HEADER = 8
KEPT_PLANS = 256
"""Start times on the board are of the last so many plans."""
_TIME, _IS_ON_DEVICE, _DELAY = range(3)


class Board:
    """Settings of a measurement and the latest start times, in a file that all processes map."""

    def __init__(self, path: Path, num_stages: int) -> None:
        num_bytes = 8 * (_HEADER + num_stages * KEPT_PLANS)
        if not path.exists():
            path.write_bytes(bytes(num_bytes))
        with path.open("r+b") as file:
            self._values = memoryview(mmap.mmap(file.fileno(), num_bytes)).cast("q")
        self.num_stages = num_stages

    @property
    def time_ns(self) -> int:
        """What a plan takes on a stage."""
        return self._values[_TIME]

    @property
    def is_on_device(self) -> bool:
        """``ON_DEVICE``, not ``BY_HOST``."""
        return bool(self._values[_IS_ON_DEVICE])

    @property
    def delay_s(self) -> float:
        """What the coordinator sleeps in each turn before it makes plans."""
        return self._values[_DELAY] / 1e9

    def set(self, *, time_ns: int, work: str, delay_ns: int = 0) -> None:
        """For the next plans."""
        self._values[_TIME], self._values[_DELAY] = time_ns, delay_ns
        self._values[_IS_ON_DEVICE] = work == ON_DEVICE

    def start_of(self, stage_index: int, plan: int) -> int:
        """When one of the last plans started on a stage; ns of the monotonic clock."""
        return self._values[_HEADER + stage_index * KEPT_PLANS + plan % KEPT_PLANS]

    def set_start(self, stage_index: int, plan: int, start_ns: int) -> None:
        """A plan starts."""
        self._values[_HEADER + stage_index * KEPT_PLANS + plan % KEPT_PLANS] = start_ns


class SleepingModel:
    """``StageModel`` without arithmetic.

    Args:
        board: of the measurement.
        stage_index: of this stage.
        clock: of this stage.
        hidden_size: D.
        vocab_size: V.
    """

    def __init__(
        self, board: Board, stage_index: int, clock: StageClock, hidden_size: int, vocab_size: int
    ) -> None:
        self._board = board
        self._stage_index = stage_index
        self._clock = clock
        self._hidden_states = torch.zeros(512, hidden_size)
        self._logits = torch.zeros(512, vocab_size)
        self._waited_ns = 0
        self._plan_at_ns = 0
        self._deadline_ns = 0
        self._execute: Execute | None = None

    def begin(self, execute: Execute) -> None:
        """A plan has come: by now, or while the stage was at work."""
        self._execute = execute
        times = self._clock.totals()
        waited_ns = times.host_gap_ns + times.idle_ns
        is_late = waited_ns - self._waited_ns > _LOOKING_NS
        self._plan_at_ns = time.monotonic_ns() if is_late else 0
        self._waited_ns = waited_ns

    def prepare(self, inputs: Any, kv_cache: Any) -> None:
        """Nothing."""

    def forward(self, inputs: Any, hidden_states: Tensor | None, *_: Any, **__: Any) -> Tensor:
        """[T, D] after one stage time."""
        assert self._execute is not None, "begin comes first"
        start_ns = self._start_ns(self._execute)
        self._board.set_start(self._stage_index, self._execute.plan, start_ns)
        self._deadline_ns = start_ns + self._board.time_ns
        left_ns = self._deadline_ns - time.monotonic_ns()
        if left_ns > 0:
            time.sleep(left_ns / 1e9)
        return self._hidden_states[: len(inputs.token_ids)]

    def _start_ns(self, execute: Execute) -> int:
        board = self._board
        if not board.is_on_device:
            return time.monotonic_ns()
        before, plan = self._stage_index - 1, execute.plan
        if self._stage_index == 0:
            before, plan = board.num_stages - 1, execute.feedback
        input_at_ns = board.start_of(before, plan) + board.time_ns if plan >= 0 else 0
        return max(self._deadline_ns, input_at_ns, self._plan_at_ns)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """[N, V], all alike."""
        return self._logits[: len(hidden_states)]


class MockRunner(StageRunner):
    """``StageRunner`` that tells its model which plan it is."""

    def run(self, execute: Execute) -> Sampled | None:
        model: Any = self._model
        model.begin(execute)
        return super().run(execute)


def main() -> int:
    """Run a stage with a sleeping model; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--board", type=Path, required=True)
    parser.add_argument("--num-stages", type=int, required=True)
    options, rest = parser.parse_known_args()
    stage_index = int(rest[rest.index("--stage-index") + 1])
    # A device does not oversleep; the worker thread inherits this.
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
    board = Board(options.board, options.num_stages)
    clock = StageClock()
    patched: Any = worker_module
    patched.StageClock = lambda: clock
    patched.StageRunner = MockRunner
    patched.StageModel = lambda cfg, *_, **__: SleepingModel(
        board, stage_index, clock, cfg.hidden_size, cfg.vocab_size
    )
    patched.load_stage = lambda *_, **__: StageWeights(
        embedding=None, layers=(), final_norm=None, lm_head=None
    )
    return process.main(rest)


if __name__ == "__main__":
    sys.exit(main())
