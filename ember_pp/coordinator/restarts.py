"""How many failures are borne, and which are not."""

from __future__ import annotations

import logging
from collections import deque

from ember_pp.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    EmberError,
    HandoffError,
    KernelBuildError,
)

logger = logging.getLogger(__name__)

_HOPELESS = (CheckpointError, KernelBuildError)
_HOPELESS_AT_FIRST = (CapacityError, HandoffError)


class RestartBudget:
    """Failures of one pipeline, counted over a sliding window.

    Args:
        max_restarts: failures within the window that are borne.
        window_s: its length.
    """

    def __init__(self, max_restarts: int, window_s: float) -> None:
        self._max_restarts = max_restarts
        self._window_s = window_s
        self._times_s: deque[float] = deque()
        self.num_restarts = 0
        """Since the start."""

    def spend(self, error: EmberError, now_s: float, *, has_served: bool) -> None:
        """Count one failure.

        Args:
            error: what failed.
            now_s: on any clock that goes on.
            has_served: False before the pipeline was ready for the first time.

        Raises:
            EmberError: ``error`` itself, if it would be the same the next time, or if it is one
                too many; its text then says so.
        """
        if _is_hopeless(error, has_served=has_served):
            raise error
        while self._times_s and now_s - self._times_s[0] > self._window_s:
            self._times_s.popleft()
        if len(self._times_s) >= self._max_restarts:
            if self._max_restarts:
                error.args = (
                    f"{error}\n(failure {len(self._times_s) + 1} within "
                    f"{self._window_s:g} s; supervisor.max_restarts={self._max_restarts})",
                )
            raise error
        self._times_s.append(now_s)
        self.num_restarts += 1


def _is_hopeless(error: EmberError, *, has_served: bool) -> bool:
    if isinstance(error, _HOPELESS):
        return True
    if isinstance(error, _HOPELESS_AT_FIRST):
        return not has_served
    return isinstance(error, ConfigError)
