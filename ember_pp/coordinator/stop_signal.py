"""SIGTERM and SIGINT as something that a poll loop can wait for."""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType, TracebackType


class StopSignal:
    """Context manager that turns SIGTERM and SIGINT into a readable descriptor.

    The first signal asks for an orderly end; a second one ends the process at once. For the child
    of a job (``is_child``) it is the third: Slurm signals every process of a step, and the job then
    asks for the end itself.

    The descriptor is written to when the signal arrives, not when Python comes to run its
    handler: a poll that was about to begin at that moment would sleep on, for ever.
    """

    def __init__(self, *, is_child: bool = False) -> None:
        self.name: str | None = None
        """Name of the first signal that came, or None."""
        self.is_urgent = False
        """True once an orderly end is asked for again: nobody waits for what is open."""
        self._is_child = is_child
        self.descriptor, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._previous: dict[int, object] = {}
        self._previous_wakeup = -1

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._on_signal)
        self._previous_wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        signal.set_wakeup_fd(self._previous_wakeup)
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal() gave us
        os.close(self.descriptor)
        os.close(self._writer)

    def take(self) -> None:
        """Make the descriptor unreadable until the next signal."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.descriptor, 4096)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.name is None:
            self.name = signal.Signals(number).name
        elif self._is_child and not self.is_urgent:
            self.is_urgent = True
        else:
            os._exit(128 + number)
