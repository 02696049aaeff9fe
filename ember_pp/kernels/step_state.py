"""What a step reads and leaves behind on the device, at addresses that never change.

A step that is captured in a CUDA graph reads its inputs where they were when it was captured. So
they are expanded on the device, into the beginning of tensors that are as large as the largest
step, from a few numbers per row which the host writes into pinned memory. Behind a step's own
entries there is padding: rows without tokens or context, tokens without a KV slot.

Shape letters: T most tokens of a step, R most rows, M slots, W most blocks of a sequence, P plans
whose tokens may be on their way to the host.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import torch
from torch import Tensor

_MARK_WORDS = 2
RECORD_WORDS = 8
BEGAN, INPUT_WAIT, OUTPUT_WAIT = 2, 3, 5
"""Words of a plan's record that a step writes itself; the hand-off writes others."""


class PlanWords(NamedTuple):
    """One plan, as the host writes it."""

    words: Tensor
    """int32 on the host, pinned for a GPU: a quadruple (slot, start, number of tokens, 1 if the
    last token samples) for each row, decodes first; then a triple (slot, column, block id) for
    each new block; then the token ids of all chunks. Not to be changed until the step is done."""
    num_rows: int
    num_decodes: int
    """Rows of one token that all sample, and whose token is the last one drawn for the slot."""
    decode_offset: int
    """Added to the starts of the decodes."""
    num_new_blocks: int
    num_tokens: int
    padded_tokens: int
    """Tokens up to here are padding."""
    turn: int
    """Row of ``StepState.results`` for the tokens that the step draws; in ``[0, P)``."""
    mark: int
    """Written there once they are; not 0."""

    @property
    def num_words(self) -> int:
        """Of ``words``, those that are read."""
        num_ids = self.num_tokens - self.num_decodes
        return 4 * self.num_rows + 3 * self.num_new_blocks + num_ids


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepState:
    """Tensors of a stage's steps; on its device but for ``results``."""

    block_size: int
    block_table: Tensor
    """[M, W] int32 block ids of each slot."""
    last_tokens: Tensor | None
    """[M] int64 token drawn last for each slot, on the first stage. ``end_step`` writes it where
    that is the last one as well; else feedback does."""
    token_ids: Tensor
    """[T] int64."""
    positions: Tensor
    """[T] int64; padding 0."""
    slot_mapping: Tensor
    """[T] int64; padding -1."""
    slots: Tensor
    """[R] int32; padding 0."""
    context_lens: Tensor
    """[R] int32; padding 0."""
    decode_lens: Tensor
    """[R] int32, ``context_lens`` of the rows with one token; others and padding 0."""
    cu_seqlens_q: Tensor
    """[R + 1] int32; padding as the last of the step."""
    sample_rows: Tensor
    """[R] int64 index into the tokens of those whose successor is drawn; padding 0."""
    sample_slots: Tensor
    """[R] int32; padding -1."""
    sample_positions: Tensor
    """[R] int64 index in its sequence of the token to be drawn; padding 0."""
    turn_and_mark: Tensor
    """[2] int64 of the step."""
    feedback: Tensor
    """[R, 2] int32 pairs (slot, token) that ``end_step`` drew: negative tokens as 0."""
    records: Tensor
    """[P, 8] int64 on the host, pinned for a GPU: when the device did what of a plan, in ns of its
    own clock; ``PlanTimes`` in ``stage/timing.py`` names the words."""
    results: Tensor
    """[P, 2 + R] int32 on the host, pinned for a GPU: the mark of a plan as int64, then the
    tokens that it drew. One word more where R is odd, so that every mark is aligned."""

    @classmethod
    def allocate(
        cls,
        *,
        max_tokens: int,
        max_rows: int,
        max_slots: int,
        max_blocks_per_sequence: int,
        block_size: int,
        max_pending: int,
        last_tokens: Tensor | None,
        device: torch.device,
    ) -> StepState:
        """Everything as of a step without rows."""

        def full(number: int, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.full(shape, number, dtype=dtype, device=device)

        long = torch.int64
        return cls(
            block_size=block_size,
            block_table=full(0, max_slots, max_blocks_per_sequence),
            last_tokens=last_tokens,
            token_ids=full(0, max_tokens, dtype=long),
            positions=full(0, max_tokens, dtype=long),
            slot_mapping=full(-1, max_tokens, dtype=long),
            slots=full(0, max_rows),
            context_lens=full(0, max_rows),
            decode_lens=full(0, max_rows),
            cu_seqlens_q=full(0, max_rows + 1),
            sample_rows=full(0, max_rows, dtype=long),
            sample_slots=full(-1, max_rows),
            sample_positions=full(0, max_rows, dtype=long),
            turn_and_mark=full(0, 2, dtype=long),
            feedback=full(0, max_rows, 2),
            records=torch.zeros(
                (max_pending, RECORD_WORDS), dtype=long, pin_memory=device.type == "cuda"
            ),
            results=torch.zeros(
                (max_pending, _MARK_WORDS + max_rows + max_rows % 2),
                dtype=torch.int32,
                pin_memory=device.type == "cuda",
            ),
        )

    @functools.cached_property
    def pointers(self) -> tuple[int, ...]:
        """Addresses of ``block_table``, ``last_tokens`` (0: none), ``expanded``, ``records``."""
        last_tokens = 0 if self.last_tokens is None else self.last_tokens.data_ptr()
        tensors = (tensor.data_ptr() for tensor in (*self.expanded, self.records))
        return self.block_table.data_ptr(), last_tokens, *tensors

    # Asked for at every plan, and each answer of a tensor costs a microsecond or so.

    @functools.cached_property
    def max_rows(self) -> int:
        """R."""
        return len(self.slots)

    @functools.cached_property
    def max_tokens(self) -> int:
        """T."""
        return len(self.token_ids)

    @functools.cached_property
    def max_pending(self) -> int:
        """P."""
        return len(self.results)

    @functools.cached_property
    def max_blocks_per_sequence(self) -> int:
        """W."""
        return self.block_table.shape[1]

    @property
    def expanded(self) -> tuple[Tensor, ...]:
        """What a plan is expanded to, in the order of the structure in ``step.cuh``."""
        return (
            self.token_ids,
            self.positions,
            self.slot_mapping,
            self.slots,
            self.context_lens,
            self.decode_lens,
            self.cu_seqlens_q,
            self.sample_rows,
            self.sample_slots,
            self.sample_positions,
            self.turn_and_mark,
        )
