"""From one ``Execute`` message to the tensors of a forward pass.

``SlotTable.apply`` takes in what changed (``slots.py``) and gives the inputs of the plan, computed
on the host in a few vectorised steps; they then go to the device in one copy from one pinned
buffer. For steps whose inputs are expanded on the device itself see ``captured.py``.

Shape letters: T tokens of the plan, R rows (a row is one slot's run of tokens; the roster
first, then the chunks), N rows that sample, S block size.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ember_pp.protocol import Execute
from ember_pp.stage.slots import PlanRows, Roster, Slots

_ALIGNMENT = 8


@dataclasses.dataclass(frozen=True, slots=True)
class BatchInputs:
    """Inputs of one forward pass; tensors are on the stage's device."""

    token_ids: Tensor
    """[T] int64. Decode rows come first, and are 0 until stage 0 writes their tokens there (see
    ``LastTokens``); other stages do not read it."""
    positions: Tensor
    """[T] int64 index of each token in its sequence."""
    slot_mapping: Tensor
    """[T] int64 KV slot of each token: ``block_id * S + offset``."""
    cu_seqlens_q: Tensor
    """[R + 1] int32 cumulative tokens per row, first 0."""
    context_lens: Tensor
    """[R] int32 tokens attended by each row, this step's included."""
    block_tables: Tensor
    """[R, max_blocks] int32 block ids in order, pad -1; as wide as the longest row needs."""
    table_rows: Tensor | None
    """[R] int32 row of ``block_tables`` of each row; None: they are in order."""
    decode_lens: Tensor | None
    """[R] int32 as ``context_lens`` of the rows with one token, 0 elsewhere; None: all have one, or
    it is worked out where it is needed."""
    decode_slots: Tensor
    """[num_decode_rows] int64 slot of each decode row."""
    num_decode_rows: int
    """The first rows have one token each."""
    max_query_len: int
    """Most tokens of a row."""
    sample_rows: Tensor
    """[N] int64 index into T of the tokens whose successor is drawn."""
    sample_slots: list[int]
    """Slot of each row that samples."""
    sample_positions: list[int]
    """Index in the sequence of the token to be drawn: the row's context length."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Step:
    """Inputs of a plan of roster rows alone, from which those of the next one follow."""

    context_lens: Tensor  # [R] int64
    context_lens_i32: Tensor  # [R] int32
    slot_mapping: Tensor  # [R] int64
    block_tables: Tensor  # [R, max_blocks] int32
    room: int  # plans until a row needs its next block

    def next(self) -> _Step:
        """One token further: every row stays in its block."""
        return _Step(
            context_lens=self.context_lens + 1,
            context_lens_i32=self.context_lens_i32 + 1,
            slot_mapping=self.slot_mapping + 1,
            block_tables=self.block_tables,
            room=self.room - 1,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class _RosterTensors:
    """What follows from a roster alone."""

    index: Tensor  # [R] int64, the slots
    cu_seqlens: Tensor  # [R + 1] int32, 0 .. R
    rows: Tensor  # [R] int64, 0 .. R - 1

    @classmethod
    def of(cls, roster: Roster) -> _RosterTensors:
        count = len(roster.slots)
        return cls(
            index=torch.tensor(roster.slots, dtype=torch.int64),
            cu_seqlens=torch.arange(count + 1, dtype=torch.int32),
            rows=torch.arange(count, dtype=torch.int64),
        )


@dataclasses.dataclass(slots=True)
class _Memory:
    """Of a micro-batch: its roster's tensors, and the last plan's if that had no chunks."""

    roster: Roster
    tensors: _RosterTensors
    step: _Step | None = None


class SlotTable:
    """``Slots``, and the tensors of each plan.

    Args:
        max_slots, max_blocks_per_sequence, block_size, num_blocks, vocab_size: of ``Slots``.
        device: where the tensors of ``BatchInputs`` go.
    """

    def __init__(
        self,
        max_slots: int,
        max_blocks_per_sequence: int,
        block_size: int,
        *,
        num_blocks: int | None = None,
        vocab_size: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._slots = Slots(
            max_slots,
            max_blocks_per_sequence,
            block_size,
            num_blocks=num_blocks,
            vocab_size=vocab_size,
        )
        self._block_size = block_size
        self._device = torch.device(device)
        self._block_table = torch.full((max_slots, max_blocks_per_sequence), -1, dtype=torch.int32)
        self._memories: dict[int, _Memory] = {}

    def apply(self, execute: Execute) -> BatchInputs:
        """Take in what ``execute`` changes and build the inputs of its rows.

        Raises:
            ProtocolError: as ``Slots.apply``. The table is then unusable: the epoch ends.
        """
        rows = self._slots.apply(execute)
        memory = self._memories.get(execute.microbatch)
        if memory is None or memory.roster is not rows.roster:
            memory = _Memory(rows.roster, _RosterTensors.of(rows.roster))
            self._memories[execute.microbatch] = memory
        for opened in execute.open:
            self._block_table[opened.slot].fill_(-1)
        if rows.new_blocks:
            added = torch.frombuffer(rows.new_blocks, dtype=torch.int32).view(-1, 3).long()
            self._block_table[added[:, 0], added[:, 1]] = added[:, 2].to(torch.int32)
            memory.step = None
        if rows.chunk_slots:
            memory.step = None
            return self._mixed_inputs(rows, memory.tensors)
        return self._decode_inputs(rows, memory)

    def _decode_inputs(self, rows: PlanRows, memory: _Memory) -> BatchInputs:
        """A plan of roster rows alone: one token each, nothing to expand."""
        before, tensors = memory.step, memory.tensors
        step = before.next() if before is not None and before.room else self._first_step(rows)
        positions = before.context_lens if before is not None else step.context_lens - 1
        memory.step = step
        return self._to_device(
            BatchInputs(
                token_ids=torch.zeros(rows.num_decodes, dtype=torch.int64),
                positions=positions,
                slot_mapping=step.slot_mapping,
                cu_seqlens_q=tensors.cu_seqlens,
                context_lens=step.context_lens_i32,
                block_tables=step.block_tables,
                table_rows=None,
                decode_lens=None,
                decode_slots=tensors.index,
                num_decode_rows=rows.num_decodes,
                max_query_len=1,
                sample_rows=tensors.rows,
                sample_slots=rows.sample_slots,
                sample_positions=step.context_lens.tolist(),
            )
        )

    def _first_step(self, rows: PlanRows) -> _Step:
        """From the tables; the steps up to the next block of a row follow from it."""
        positions = torch.tensor(rows.decode_positions)
        context_lens = positions + 1
        index = torch.tensor(rows.roster.slots)
        block_tables = self._rows_of_block_table(index, context_lens)
        return _Step(
            context_lens=context_lens,
            context_lens_i32=context_lens.to(torch.int32),
            slot_mapping=self._slot_mapping(block_tables, torch.arange(len(index)), positions),
            block_tables=block_tables,
            room=self._block_size - 1 - int(torch.remainder(positions, self._block_size).max()),
        )

    def _mixed_inputs(self, rows: PlanRows, roster: _RosterTensors) -> BatchInputs:
        num_decodes = rows.num_decodes
        chunk_ids = torch.frombuffer(bytearray(rows.chunk_ids), dtype=torch.int32)
        token_ids = torch.cat((torch.zeros(num_decodes, dtype=torch.int64), chunk_ids.long()))
        index = torch.cat((roster.index, torch.tensor(rows.chunk_slots)))  # [R]
        starts = torch.tensor(rows.decode_positions + rows.chunk_starts)  # [R]
        lens = torch.tensor([1] * num_decodes + rows.chunk_lens)  # [R]
        context_lens = starts + lens  # [R]
        ends = torch.cumsum(lens, 0)  # [R]
        row_of_token = torch.repeat_interleave(torch.arange(rows.num_rows), lens)  # [T]
        positions = torch.arange(len(token_ids)) + (starts - ends + lens)[row_of_token]  # [T]
        block_tables = self._rows_of_block_table(index, context_lens)
        sampling = [*range(num_decodes)] + [
            num_decodes + i for i, is_sampling in enumerate(rows.chunk_samples) if is_sampling
        ]
        return self._to_device(
            BatchInputs(
                token_ids=token_ids,
                positions=positions,
                slot_mapping=self._slot_mapping(block_tables, row_of_token, positions),
                cu_seqlens_q=torch.cat((torch.zeros(1, dtype=torch.int64), ends)).to(torch.int32),
                context_lens=context_lens.to(torch.int32),
                block_tables=block_tables,
                table_rows=None,
                decode_lens=torch.where(lens == 1, context_lens, 0).to(torch.int32),
                decode_slots=roster.index,
                num_decode_rows=num_decodes,
                max_query_len=max(rows.chunk_lens),
                sample_rows=(ends - 1)[sampling],
                sample_slots=rows.sample_slots,
                sample_positions=rows.sample_positions,
            )
        )

    def _rows_of_block_table(self, index: Tensor, context_lens: Tensor) -> Tensor:
        width = -(-int(context_lens.max()) // self._block_size)
        return self._block_table[:, :width].index_select(0, index)

    def _slot_mapping(self, block_tables: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        blocks = torch.div(positions, self._block_size, rounding_mode="floor")
        block_ids = block_tables[rows, blocks].to(torch.int64)
        return block_ids * self._block_size + positions - blocks * self._block_size

    def _to_device(self, inputs: BatchInputs) -> BatchInputs:
        if self._device.type == "cpu":
            return inputs
        names = [
            field.name
            for field in dataclasses.fields(inputs)
            if isinstance(getattr(inputs, field.name), Tensor)
        ]
        moved = _copy_in_one([getattr(inputs, name) for name in names], self._device, pin=True)
        tensors: dict[str, Any] = dict(zip(names, moved, strict=True))
        return dataclasses.replace(inputs, **tensors)


def _copy_in_one(tensors: Sequence[Tensor], device: torch.device, *, pin: bool) -> Iterable[Tensor]:
    """The same tensors on ``device``, moved by one copy of one packed host buffer."""
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    padded = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
    offsets = list(itertools.accumulate(padded, initial=0))
    packed = torch.empty(offsets[-1], dtype=torch.uint8, pin_memory=pin)
    for tensor, offset, size in zip(tensors, offsets, sizes, strict=False):
        packed[offset : offset + size].copy_(tensor.reshape(-1).view(torch.uint8))
    # The pinned buffer goes back to torch's host allocator, which waits for the copy to end.
    moved = packed.to(device, non_blocking=True)
    return [
        moved[offset : offset + size].view(tensor.dtype).view(tensor.shape)
        for tensor, offset, size in zip(tensors, offsets, sizes, strict=False)
    ]
