"""From one ``Execute`` message to the tensors of a forward pass.

``SlotTable`` is a stage's memory of what plans do not repeat: the block table and the number
of computed tokens of every slot, and the roster of every micro-batch. ``apply`` takes in what
changed and gives the inputs of the plan. Everything is computed on the host in a few
vectorised steps, then goes to the device in one copy from one pinned buffer.

Shape letters: T tokens of the plan, R rows (a row is one slot's run of tokens; the roster
first, then the chunks), N rows that sample, S block size.
"""

from __future__ import annotations

import array
import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ember_pp.errors import ProtocolError
from ember_pp.protocol import Execute, OpenSlot, unpack_i32, unpack_u32

_NOT_OPEN = -2
_NO_TOKENS_YET = -1
_MAX_SLOT_TOKENS = 2**31 - 1
_ALIGNMENT = 8
_NO_BLOCKS = torch.empty((0, 3), dtype=torch.int32)


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
    slots: Tensor
    """[R] int32 slot of each row."""
    new_blocks: Tensor
    """[U, 3] int32 slot, column of its block table, and block id that the plan puts there."""
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


@dataclasses.dataclass(slots=True)
class _Roster:
    """The decoding slots of a micro-batch, with the tensors that follow from them alone."""

    slots: list[int]
    index: Tensor  # [R] int64, the slots
    index_i32: Tensor  # [R] int32
    cu_seqlens: Tensor  # [R + 1] int32, 0 .. R
    rows: Tensor  # [R] int64, 0 .. R - 1
    step: _Step | None = None
    """Of its last plan, if that had no chunks."""

    @classmethod
    def of(cls, slots: list[int]) -> _Roster:
        count = len(slots)
        index = torch.tensor(slots, dtype=torch.int64)
        return cls(
            slots=slots,
            index=index,
            index_i32=index.to(torch.int32),
            cu_seqlens=torch.arange(count + 1, dtype=torch.int32),
            rows=torch.arange(count, dtype=torch.int64),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class _Chunks:
    """The prefill rows of a plan, column by column."""

    slots: list[int]
    starts: list[int]
    lens: list[int]
    samples: list[bool]


class SlotTable:
    """Block tables, context lengths and rosters of a stage; epoch by epoch a new one.

    Args:
        max_slots: slots are ``0 .. max_slots - 1``.
        max_blocks_per_sequence: longest block table.
        block_size: tokens per block.
        num_blocks: block ids are below this; None leaves them unchecked.
        vocab_size: token ids are below this; None leaves them unchecked.
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
        self._max_slots = max_slots
        self._max_blocks = max_blocks_per_sequence
        self._block_size = block_size
        self._block_id_end = _MAX_SLOT_TOKENS if num_blocks is None else num_blocks
        self._token_id_end = _MAX_SLOT_TOKENS if vocab_size is None else vocab_size
        self._device = torch.device(device)
        self._block_table = torch.full((max_slots, max_blocks_per_sequence), -1, dtype=torch.int32)
        self._context_lens = torch.full((max_slots,), _NOT_OPEN, dtype=torch.int64)
        self._num_blocks = [0] * max_slots
        self._new_blocks = _NO_BLOCKS
        self._roster_of: list[int | None] = [None] * max_slots
        self._rosters: dict[int, _Roster] = {}

    def apply(self, execute: Execute) -> BatchInputs:
        """Take in what ``execute`` changes and build the inputs of its rows.

        Raises:
            ProtocolError: the plan contradicts itself or the plans before it: a slot out of
                range, not open or named twice, a leave or join that does not fit the roster, a
                position that does not follow, a token without a block, arrays of other lengths
                than the rows need. The table is then unusable: the epoch ends.
        """
        try:
            roster = self._apply_changes(execute)
            chunks = self._read_chunks(execute)
            if not chunks.slots:
                return self._decode_inputs(execute, roster)
            return self._mixed_inputs(execute, roster, chunks)
        except ProtocolError as error:
            raise ProtocolError(
                f"plan {execute.plan}, micro-batch {execute.microbatch}: {error}"
            ) from None

    # ---------------------------------------------------------------- what changed

    def _apply_changes(self, execute: Execute) -> _Roster:
        roster = self._rosters.get(execute.microbatch)
        if roster is None:
            roster = self._rosters[execute.microbatch] = _Roster.of([])
        slots = roster.slots
        if execute.leave:
            slots = self._leave(slots, self._read_slots("leave", execute.leave))
        for opened in execute.open:
            self._open(opened)
        self._new_blocks = _NO_BLOCKS
        if execute.blocks:
            self._append_blocks(unpack_u32(execute.blocks))
            roster.step = None
        if execute.join:
            slots = self._join(slots, self._read_slots("join", execute.join), execute.microbatch)
        if slots is not roster.slots:
            roster = self._rosters[execute.microbatch] = _Roster.of(slots)
        return roster

    def _leave(self, slots: list[int], leaving: list[int]) -> list[int]:
        gone = set(leaving)
        remaining = [slot for slot in slots if slot not in gone]
        if len(slots) - len(remaining) != len(leaving):
            strangers = sorted(gone - set(slots)) or "a slot twice"
            raise ProtocolError(f"leave: not in the roster: {strangers}")
        for slot in leaving:
            self._roster_of[slot] = None
        return remaining

    def _join(self, slots: list[int], joining: list[int], microbatch: int) -> list[int]:
        for slot in joining:
            if self._roster_of[slot] is not None:
                raise ProtocolError(
                    f"join: slot {slot} is already in the roster of micro-batch "
                    f"{self._roster_of[slot]}"
                )
            self._roster_of[slot] = microbatch
        return slots + joining

    def _open(self, opened: OpenSlot) -> None:
        slot = opened.slot
        self._check_slot("open", slot)
        if self._roster_of[slot] is not None:
            raise ProtocolError(
                f"open: slot {slot} is still in the roster of micro-batch {self._roster_of[slot]}"
            )
        self._block_table[slot].fill_(-1)
        self._context_lens[slot] = _NO_TOKENS_YET
        self._num_blocks[slot] = 0

    def _append_blocks(self, pairs: array.array[int]) -> None:
        if len(pairs) % 2:
            raise ProtocolError(f"blocks: expected pairs (slot, block), got {len(pairs)} numbers")
        slots, block_ids = pairs[0::2].tolist(), pairs[1::2].tolist()
        columns = []
        for slot, block_id in zip(slots, block_ids, strict=True):
            self._check_slot("blocks", slot)
            column = self._num_blocks[slot]
            if column >= self._max_blocks:
                raise ProtocolError(
                    f"blocks: slot {slot} would have more than {self._max_blocks} blocks"
                )
            if block_id >= self._block_id_end:
                raise ProtocolError(
                    f"blocks: slot {slot} gets block {block_id} of {self._block_id_end}"
                )
            columns.append(column)
            self._num_blocks[slot] = column + 1
        added = torch.tensor([slots, columns, block_ids], dtype=torch.int32)
        self._block_table[added[0].long(), added[1].long()] = added[2]
        self._new_blocks = added.T

    # ---------------------------------------------------------------- the rows

    def _read_chunks(self, execute: Execute) -> _Chunks:
        values = unpack_u32(execute.chunks).tolist()
        if len(values) % 4:
            raise ProtocolError(f"chunks: expected quadruples, got {len(values)} numbers")
        slots, starts, lens = values[0::4], values[1::4], values[2::4]
        if len(set(slots)) != len(slots):
            raise ProtocolError("chunks: a slot is named twice")
        for slot, start, num_tokens in zip(slots, starts, lens, strict=True):
            self._check_chunk(slot, start, num_tokens)
        return _Chunks(slots, starts, lens, [flag != 0 for flag in values[3::4]])

    def _check_chunk(self, slot: int, start: int, num_tokens: int) -> None:
        self._check_slot("chunks", slot)
        if self._roster_of[slot] is not None:
            raise ProtocolError(
                f"chunks: slot {slot} is in the roster of micro-batch {self._roster_of[slot]}"
            )
        computed = int(self._context_lens[slot])
        if computed == _NOT_OPEN:
            raise ProtocolError(f"chunks: slot {slot} was never opened")
        # After an open the start is free: what lies before it came from the prefix cache.
        if computed not in (_NO_TOKENS_YET, start):
            raise ProtocolError(
                f"chunks: slot {slot} starts at {start}, but {computed} tokens are computed"
            )
        if num_tokens == 0:
            raise ProtocolError(f"chunks: slot {slot} has no tokens")

    def _decode_inputs(self, execute: Execute, roster: _Roster) -> BatchInputs:
        """A plan of roster rows alone: one token each, nothing to expand."""
        if not roster.slots:
            raise ProtocolError("the plan has no rows")
        if execute.chunk_ids:
            raise ProtocolError("chunk_ids: the plan has no chunks")
        before = roster.step
        step = before.next() if before is not None and before.room else self._first_step(roster)
        positions = before.context_lens if before is not None else step.context_lens - 1
        roster.step = step
        self._context_lens[roster.index] = step.context_lens
        return self._to_device(
            BatchInputs(
                token_ids=torch.zeros(len(roster.slots), dtype=torch.int64),
                positions=positions,
                slot_mapping=step.slot_mapping,
                cu_seqlens_q=roster.cu_seqlens,
                context_lens=step.context_lens_i32,
                block_tables=step.block_tables,
                table_rows=None,
                decode_lens=None,
                slots=roster.index_i32,
                new_blocks=self._new_blocks,
                decode_slots=roster.index,
                num_decode_rows=len(roster.slots),
                max_query_len=1,
                sample_rows=roster.rows,
                sample_slots=roster.slots,
                sample_positions=step.context_lens.tolist(),
            )
        )

    def _first_step(self, roster: _Roster) -> _Step:
        """From the tables; the steps up to the next block of a row follow from it."""
        positions = self._decode_positions(roster)
        context_lens = positions + 1
        block_tables = self._rows_of_block_table(roster.index, context_lens)
        return _Step(
            context_lens=context_lens,
            context_lens_i32=context_lens.to(torch.int32),
            slot_mapping=self._slot_mapping(block_tables, roster.rows, positions),
            block_tables=block_tables,
            room=self._block_size - 1 - int(torch.remainder(positions, self._block_size).max()),
        )

    def _mixed_inputs(self, execute: Execute, roster: _Roster, chunks: _Chunks) -> BatchInputs:
        num_decode_rows, num_rows = len(roster.slots), len(roster.slots) + len(chunks.slots)
        token_ids = torch.cat(
            (
                torch.zeros(num_decode_rows, dtype=torch.int64),
                self._read_token_ids("chunk_ids", execute.chunk_ids, sum(chunks.lens)),
            )
        )
        index = torch.cat((roster.index, torch.tensor(chunks.slots)))  # [R]
        starts = torch.cat((self._decode_positions(roster), torch.tensor(chunks.starts)))  # [R]
        lens = torch.tensor([1] * num_decode_rows + chunks.lens)  # [R]
        context_lens = starts + lens  # [R]
        ends = torch.cumsum(lens, 0)  # [R]
        row_of_token = torch.repeat_interleave(torch.arange(num_rows), lens)  # [T]
        positions = torch.arange(len(token_ids)) + (starts - ends + lens)[row_of_token]  # [T]
        block_tables = self._rows_of_block_table(index, context_lens)
        slot_mapping = self._slot_mapping(block_tables, row_of_token, positions)
        self._context_lens[index] = context_lens
        roster.step = None
        sampling = [*range(num_decode_rows)] + [
            num_decode_rows + i for i, is_sampling in enumerate(chunks.samples) if is_sampling
        ]
        slots = roster.slots + chunks.slots
        context_list = context_lens.tolist()
        return self._to_device(
            BatchInputs(
                token_ids=token_ids,
                positions=positions,
                slot_mapping=slot_mapping,
                cu_seqlens_q=torch.cat((torch.zeros(1, dtype=torch.int64), ends)).to(torch.int32),
                context_lens=context_lens.to(torch.int32),
                block_tables=block_tables,
                table_rows=None,
                decode_lens=torch.where(lens == 1, context_lens, 0).to(torch.int32),
                slots=index.to(torch.int32),
                new_blocks=self._new_blocks,
                decode_slots=roster.index,
                num_decode_rows=num_decode_rows,
                max_query_len=max(chunks.lens),
                sample_rows=(ends - 1)[sampling],
                sample_slots=[slots[row] for row in sampling],
                sample_positions=[context_list[row] for row in sampling],
            )
        )

    def _decode_positions(self, roster: _Roster) -> Tensor:
        positions = self._context_lens[roster.index]  # [R] int64
        if roster.slots and int(positions.min()) < 1:
            empty = [slot for slot in roster.slots if int(self._context_lens[slot]) < 1]
            raise ProtocolError(f"join: nothing is computed yet in slots {empty}")
        return positions

    def _rows_of_block_table(self, index: Tensor, context_lens: Tensor) -> Tensor:
        width = -(-int(context_lens.max()) // self._block_size)
        if width > self._max_blocks:
            raise ProtocolError(
                f"a row of {int(context_lens.max())} tokens; block tables hold "
                f"{self._max_blocks} blocks of {self._block_size}"
            )
        return self._block_table[:, :width].index_select(0, index)

    def _slot_mapping(self, block_tables: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
        blocks = torch.div(positions, self._block_size, rounding_mode="floor")
        block_ids = block_tables[rows, blocks].to(torch.int64)
        if int(block_ids.min()) < 0:
            token = int(block_ids.argmin())
            raise ProtocolError(
                f"row {int(rows[token])} has no block for position {int(positions[token])}"
            )
        return block_ids * self._block_size + positions - blocks * self._block_size

    # ---------------------------------------------------------------- reading and moving

    def _check_slot(self, field: str, slot: int) -> None:
        if not 0 <= slot < self._max_slots:
            raise ProtocolError(f"{field}: slot {slot} of {self._max_slots}")

    def _read_slots(self, field: str, packed: bytes) -> list[int]:
        slots: list[int] = unpack_u32(packed).tolist()
        for slot in slots:
            self._check_slot(field, slot)
        return slots

    def _read_token_ids(self, field: str, packed: bytes, count: int) -> Tensor:
        values = unpack_i32(packed)
        if len(values) != count:
            raise ProtocolError(f"{field}: expected {count} token ids, got {len(values)}")
        if not count:
            return torch.empty(0, dtype=torch.int64)
        token_ids = torch.frombuffer(values, dtype=torch.int32).to(torch.int64)
        lowest, highest = torch.aminmax(token_ids)
        if int(lowest) < 0 or int(highest) >= self._token_id_end:
            raise ProtocolError(f"{field}: token ids {int(lowest)} .. {int(highest)} are outside")
        return token_ids

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
