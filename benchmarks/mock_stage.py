"""A stage whose model only sleeps: ``python -m benchmarks.mock_stage``, for ``mock_stages``.

Everything else is the real stage: process, threads, messages, slot tables, hand-off, feedback,
sampler. The model stands for a device that takes the same time for every plan, works through
plans in order, and lets the host work beside it: a plan starts on it when the one before is
done and its input is there, and the thread sleeps until it ends. Where the input came while
the device was busy, host work of the meantime costs nothing; where the stage had to wait,
everything from waking up on counts.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from typing import Any

import torch
from torch import Tensor

from ember_pp.stage import __main__ as process
from ember_pp.stage import worker as worker_module
from ember_pp.stage.timing import StageClock
from ember_pp.stage.weights import StageWeights

_PR_SET_TIMERSLACK = 29
_LOOKING_NS = 30_000
"""To take what is there is a wait of this length at most."""


class SleepingModel:
    """``StageModel`` without arithmetic.

    The first two values of the hidden states carry the moment at which the stage before was
    done, so that the next one knows when its input came.
    """

    def __init__(self, clock: StageClock, time_ns: int, hidden_size: int, vocab_size: int) -> None:
        self._clock = clock
        self._time_ns = time_ns
        self._hidden_size = hidden_size
        self._vocab_size = vocab_size
        self._deadline_ns = 0
        self._waited_ns = -_LOOKING_NS

    def forward(
        self, inputs: Any, hidden_states: Tensor | None, kv_cache: Any, on_layer: Any = None
    ) -> Tensor:
        """[T, D] after one stage time."""
        start_ns = time.monotonic_ns()
        times = self._clock.totals()
        waited_ns = times.wait_input_ns + times.host_gap_ns + times.idle_ns
        if waited_ns - self._waited_ns < _LOOKING_NS:  # all was there already
            came_ns = 0 if hidden_states is None else int(_stamp(hidden_states))
            start_ns = max(self._deadline_ns, came_ns)
        self._waited_ns = waited_ns
        self._deadline_ns = start_ns + self._time_ns
        left_ns = self._deadline_ns - time.monotonic_ns()
        if left_ns > 0:
            time.sleep(left_ns / 1e9)
        output = torch.zeros(len(inputs.token_ids), self._hidden_size)
        _stamp(output).fill_(time.monotonic_ns())
        return output

    def logits(self, hidden_states: Tensor) -> Tensor:
        """[N, V], all alike."""
        return torch.zeros(len(hidden_states), self._vocab_size)


def _stamp(hidden_states: Tensor) -> Tensor:
    return hidden_states[0, :2].view(torch.int64)


def main() -> int:
    """Run a stage with a sleeping model; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage-time-us", type=int, required=True)
    options, rest = parser.parse_known_args()
    # A device does not oversleep; the thread below inherits this.
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
    clock = StageClock()
    worker_module.StageClock = lambda: clock  # type: ignore[assignment,misc]

    def make_model(cfg: Any, *_: Any, **__: Any) -> SleepingModel:
        return SleepingModel(clock, options.stage_time_us * 1000, cfg.hidden_size, cfg.vocab_size)

    worker_module.StageModel = make_model  # type: ignore[assignment,misc]
    worker_module.load_stage = lambda *_, **__: StageWeights(
        embedding=None, layers=(), final_norm=None, lm_head=None
    )
    return process.main(rest)


if __name__ == "__main__":
    sys.exit(main())
