"""SIGTERM and SIGINT as something that a poll loop can wait for."""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType


class StopSignal:
    """Context manager that turns SIGTERM and SIGINT into a readable descriptor.

    The first signal asks for an orderly end; a second one ends the process at once.

    The descriptor is written to when the signal arrives, not when Python comes to run its
    handler: a poll that was about to begin at that moment would sleep on, for ever.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        """Name of the signal that came, or None."""
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

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None:
            os._exit(128 + number)
        self.name = signal.Signals(number).name
