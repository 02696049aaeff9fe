"""Relates the clock of a card to the host's, so that times of both can be compared.

A card's clock is one for all processes that use it, and so is ``time.monotonic_ns`` for all of a
host. A *sample* is a time of the card between two of the host: the offset is known to half of
what passed between these. Clocks drift apart, so a sample gets worse with age.
"""

from __future__ import annotations

import ctypes
import time

import torch

from ember_pp.kernels.kernel_set import KernelSet

_DRIFT = 100e-6
"""How fast two clocks may part."""
_PERIOD_NS = 2_000_000_000
_LIMIT_NS = 200_000
"""A card that is full may keep a kernel waiting: then the host does not wait for the sample."""


class ClockOffset:
    """What a host's clock shows more than a card's, by the best of all samples so far."""

    def __init__(self) -> None:
        self._offset_ns = 0
        self._error_ns = float("inf")
        self._at_ns = 0

    @property
    def ns(self) -> int:
        """To be added to the card's time; 0 before the first sample."""
        return self._offset_ns

    def add(self, before_ns: int, card_ns: int, after_ns: int) -> None:
        """A sample: the card's time, and the host's before and after it."""
        error_ns = (after_ns - before_ns) / 2
        if error_ns <= self._error_ns + (after_ns - self._at_ns) * _DRIFT:
            self._offset_ns = (before_ns + after_ns) // 2 - card_ns
            self._error_ns, self._at_ns = error_ns, after_ns


class CardClock:
    """Takes samples of one card, now and then, on a stream of its own.

    Args:
        device: of the stage; the current one.
    """

    def __init__(self, device: torch.device) -> None:
        kernels = KernelSet(torch.device("cuda", device.index or 0))
        self._write_time = kernels.get("handoff.cuh", "write_time_kernel", "P", overlaps=False)
        # Of a high priority: not behind a stream that waits.
        self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._word = torch.zeros(1, dtype=torch.int64, pin_memory=True)
        self._card_ns = ctypes.c_int64.from_address(self._word.data_ptr())
        self._is_under_way = False
        self._next_ns = 0
        self.offset = ClockOffset()

    def sample(self) -> None:
        """Take a sample if the last is old; waits for a fraction of a millisecond at most."""
        before_ns = time.monotonic_ns()
        if before_ns < self._next_ns or (self._is_under_way and not self._card_ns.value):
            return
        self._next_ns = before_ns + _PERIOD_NS
        self._card_ns.value = 0
        with torch.cuda.stream(self._stream):
            self._write_time.launch((1, 1), 32, (self._word.data_ptr(),))
        while not self._card_ns.value:
            if time.monotonic_ns() - before_ns > _LIMIT_NS:
                self._is_under_way = True
                return
        self._is_under_way = False
        self.offset.add(before_ns, self._card_ns.value, time.monotonic_ns())
