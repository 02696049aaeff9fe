"""Memory that the host and the device share for plans: their rows one way, their tokens the other.

All of it is pinned, so that kernels read and write it without a copy. The host writes with plain
stores and reads a mark to see that a plan is done: neither calls the driver. On a stage that hands
on to another, the mark is the last time in the plan's record.
"""

from __future__ import annotations

import ctypes
import time

import torch
from torch import Tensor

from ember_pp.kernels import PlanWords, StepState
from ember_pp.kernels.step_state import RECORD_WORDS
from ember_pp.stage.slots import PlanRows
from ember_pp.stage.timing import PlanTimes

_POLL_S = 20e-6
_POLLS_PER_CHECK = 512
"""Polls before the device is asked whether it has failed: then no mark would ever come. At a poll
every 0.1 ms or so that is known long before anybody calls the stage slow."""


class PlanWriter:
    """Writes the rows of plans, each into the next of a ring of buffers.

    Args:
        max_rows: most rows of a plan.
        max_tokens: most tokens of a plan.
        max_pending: plans that may not be done at once.
        device: reads the rows.
    """

    def __init__(
        self, max_rows: int, max_tokens: int, max_pending: int, device: torch.device
    ) -> None:
        self._is_pinned = device.type == "cuda"
        self._max_pending = max_pending
        capacity = 4 * max_rows + 3 * (max_rows + max_tokens) + max_tokens
        self._buffers = [self._allocate(capacity) for _ in range(max_pending)]

    def write(self, plan: int, rows: PlanRows, padded_tokens: int) -> PlanWords:
        """The words of ``plan``; good until ``max_pending`` plans later."""
        turn = plan % self._max_pending
        parts = [rows.roster.packed_rows]
        if rows.chunk_slots or rows.new_blocks:
            parts += [rows.packed_chunks, rows.new_blocks.tobytes(), rows.chunk_ids]
        packed = parts[0] if len(parts) == 1 else b"".join(parts)
        words, memory = self._buffers[turn]
        if len(packed) > len(memory):  # prefixes found in the cache, of many long sequences
            words, memory = self._buffers[turn] = self._allocate(len(packed) // 4)
        memory[: len(packed)] = packed
        return PlanWords(
            words=words,
            num_rows=rows.num_rows,
            num_decodes=rows.num_decodes,
            decode_offset=rows.num_plans,
            num_new_blocks=len(rows.new_blocks) // 3,
            num_tokens=rows.num_tokens,
            padded_tokens=padded_tokens,
            turn=turn,
            mark=plan + 1,
        )

    def _allocate(self, num_words: int) -> tuple[Tensor, memoryview]:
        words = torch.zeros(num_words, dtype=torch.int32, pin_memory=self._is_pinned)
        return words, _memory_of(words)


class PendingTokens:
    """The tokens of a plan, which may not be drawn yet.

    Args:
        memory: bytes of the plan's row of ``StepState.results``.
        mark: that of the plan.
        num_tokens: how many it draws.
        stream: to ask for a failure; None: none can happen.
    """

    __slots__ = ("_mark", "_memory", "_num_polls", "_num_tokens", "_stream")

    def __init__(
        self, memory: memoryview, mark: int, num_tokens: int, stream: torch.cuda.Stream | None
    ) -> None:
        self._memory = memory
        self._mark = mark.to_bytes(8, "little")
        self._num_polls = 0
        self._num_tokens = num_tokens
        self._stream = stream

    @property
    def is_ready(self) -> bool:
        """Whether they are drawn."""
        return self._memory[:8] == self._mark

    def poll(self) -> bool:
        """Whether they are drawn; for whoever waits: now and then sees to the device, too.

        Raises:
            RuntimeError: the device has failed.
        """
        if self.is_ready:
            return True
        self._num_polls += 1
        if self._num_polls % _POLLS_PER_CHECK == 0:
            self.check()
        return False

    def read(self) -> bytes:
        """The tokens, i32; waits for them.

        Raises:
            RuntimeError: the device has failed.
        """
        while not self.poll():
            time.sleep(_POLL_S)
        return bytes(self._memory[8 : 8 + 4 * self._num_tokens])

    def check(self) -> None:
        """See that the device has not failed.

        Raises:
            RuntimeError: it has.
        """
        if self._stream is not None:
            self._stream.query()


class TokenReader:
    """Reads what plans drew, by their numbers.

    Args:
        state: of the stage's steps; its stream is the current one.
    """

    def __init__(self, state: StepState) -> None:
        results = state.results
        self._results = results  # the memory is theirs
        self._memory = _memory_of(results)
        self._row_bytes = results.shape[1] * results.itemsize
        self._max_pending = len(results)
        self._stream = torch.cuda.current_stream() if results.is_pinned() else None

    def pending(self, plan: int, num_tokens: int) -> PendingTokens:
        """What ``plan`` draws: to be read before ``max_pending`` plans later."""
        start = plan % self._max_pending * self._row_bytes
        memory = self._memory[start : start + self._row_bytes]
        return PendingTokens(memory, plan + 1, num_tokens, self._stream)


class PlanRecords:
    """When the device did what of the plans that are not done, written by the device itself.

    Args:
        records: ``StepState.records``; a plan has the row of its turn.
    """

    def __init__(self, records: Tensor) -> None:
        self._records = records  # the memory is theirs
        self._memory = _memory_of(records).cast("q")
        self._stream = torch.cuda.current_stream() if records.is_pinned() else None
        self._num_polls = 0

    @property
    def max_pending(self) -> int:
        """Plans that have a row at once."""
        return len(self._records)

    def open(self, plan: int) -> None:
        """Take the row for ``plan``: the plan that had it is done, and was read."""
        start = plan % self.max_pending * RECORD_WORDS
        for word in range(start, start + RECORD_WORDS):
            self._memory[word] = 0

    def address(self, plan: int, word: str) -> int:
        """Where a kernel writes one of ``PlanTimes``."""
        index = plan % self.max_pending * RECORD_WORDS + PlanTimes._fields.index(word)
        return self._records.data_ptr() + index * self._records.itemsize

    def read(self, plan: int) -> PlanTimes:
        """What has been written so far. Any thread."""
        start = plan % self.max_pending * RECORD_WORDS
        return PlanTimes(*self._memory[start : start + RECORD_WORDS])

    def is_done(self, plan: int) -> bool:
        """Whether the device is done with ``plan``; for whoever waits: now and then sees to the
        device, too.

        Raises:
            RuntimeError: the device has failed.
        """
        if self._memory[(plan % self.max_pending + 1) * RECORD_WORDS - 1]:
            return True
        self._num_polls += 1
        if self._num_polls % _POLLS_PER_CHECK == 0 and self._stream is not None:
            self._stream.query()
        return False


def _memory_of(tensor: Tensor) -> memoryview:
    array = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return memoryview(array).cast("B")
