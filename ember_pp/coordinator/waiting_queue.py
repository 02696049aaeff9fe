"""The sequences that wait for admission, first come first served."""

from __future__ import annotations

import bisect
import itertools
from collections import OrderedDict
from collections.abc import Iterator

from ember_pp.coordinator.sequence import Sequence


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival


class WaitingQueue:
    """Sequences in order of arrival; adding, taking and removing one costs O(1) at any length.

    A preempted sequence comes back here. It was admitted before anything that still waits for
    the first time, so all preempted ones stand, in their own order, before the new ones.
    """

    def __init__(self) -> None:
        self._preempted: list[Sequence] = []  # never more than can run at once
        self._new: OrderedDict[int, Sequence] = OrderedDict()
        self.num_tokens = 0
        """Known tokens of all that wait."""

    def __len__(self) -> int:
        return len(self._preempted) + len(self._new)

    def __iter__(self) -> Iterator[Sequence]:
        return itertools.chain(self._preempted, self._new.values())

    def add_new(self, sequence: Sequence) -> None:
        """Append a sequence that never ran."""
        self._new[sequence.arrival] = sequence
        self.num_tokens += sequence.num_tokens

    def add_preempted(self, sequence: Sequence) -> None:
        """Put a sequence back at its place in the order of arrival."""
        bisect.insort(self._preempted, sequence, key=_arrival)
        self.num_tokens += sequence.num_tokens

    @property
    def head(self) -> Sequence | None:
        """The sequence to be admitted next."""
        if self._preempted:
            return self._preempted[0]
        return next(iter(self._new.values()), None)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, from wherever it stands."""
        if self._new.pop(sequence.arrival, None) is None:
            self._preempted.remove(sequence)
        self.num_tokens -= sequence.num_tokens
