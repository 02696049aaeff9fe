"""What plans do not repeat: blocks and computed tokens of every slot, rosters of micro-batches.

``Slots.apply`` takes in what an ``Execute`` changes, checks that it fits what came before, and says
which rows the plan has. Plain Python, and a plan of decodes alone whose roster is as it was costs
the same however many rows it has: positions are kept as where the roster began and how many plans
ago that was.
"""

from __future__ import annotations

import array
import dataclasses
import functools

from ember_pp.errors import ProtocolError
from ember_pp.protocol import Execute, OpenSlot, unpack_i32, unpack_u32

_NOT_OPEN = -2
_NO_TOKENS_YET = -1
_MAX_SLOT_TOKENS = 2**31 - 1


class Roster:
    """The decoding slots of a micro-batch, since it last changed.

    Args:
        slots: of its rows, in order.
        starts: position of each row's token in the first plan.
    """

    def __init__(self, slots: list[int], starts: list[int]) -> None:
        self.slots = slots
        self.starts = starts
        self.num_plans = 0
        """Plans since the first: row ``i`` of the next one is at ``starts[i] + num_plans``."""
        self.room = 0
        """Plans until a row may need its next block."""

    @functools.cached_property
    def packed_rows(self) -> bytes:
        """i32 quadruples (slot, start, 1, 1), as ``Ops.begin_step`` takes rows."""
        ones = [1] * len(self.slots)
        columns = zip(self.slots, self.starts, ones, ones, strict=True)
        return array.array("i", [n for row in columns for n in row]).tobytes()


@dataclasses.dataclass(frozen=True, slots=True)
class PlanRows:
    """The rows of a plan: the roster's, a token each, all of which sample, then the chunks."""

    roster: Roster
    num_plans: int
    """Of the roster before this plan."""
    chunk_slots: list[int]
    chunk_starts: list[int]
    chunk_lens: list[int]
    chunk_samples: list[bool]
    chunk_ids: bytes
    """i32 token ids of all chunks, in order."""
    new_blocks: array.array[int]
    """i32 triples (slot, column of its block table, block id) that the plan puts there."""

    @property
    def num_decodes(self) -> int:
        """Rows of the roster."""
        return len(self.roster.slots)

    @property
    def num_rows(self) -> int:
        """R."""
        return len(self.roster.slots) + len(self.chunk_slots)

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.roster.slots) + sum(self.chunk_lens)

    @property
    def packed_chunks(self) -> bytes:
        """i32 quadruples of the chunks, as ``Roster.packed_rows``."""
        columns = (self.chunk_slots, self.chunk_starts, self.chunk_lens, self.chunk_samples)
        return array.array("i", [n for row in zip(*columns, strict=True) for n in row]).tobytes()

    @property
    def decode_positions(self) -> list[int]:
        """Position of the token of each roster row."""
        return [start + self.num_plans for start in self.roster.starts]

    @property
    def sample_slots(self) -> list[int]:
        """Slot of each of the N rows that sample."""
        if not self.chunk_slots:
            return self.roster.slots
        chunks = zip(self.chunk_slots, self.chunk_samples, strict=True)
        return self.roster.slots + [slot for slot, is_sampling in chunks if is_sampling]

    @property
    def sample_positions(self) -> list[int]:
        """Index in the sequence of the token to be drawn, of each row that samples."""
        chunks = zip(self.chunk_starts, self.chunk_lens, self.chunk_samples, strict=True)
        return [position + 1 for position in self.decode_positions] + [
            start + length for start, length, is_sampling in chunks if is_sampling
        ]


class Slots:
    """The slots of a stage; epoch by epoch new ones.

    Args:
        max_slots: slots are ``0 .. max_slots - 1``.
        max_blocks_per_sequence: longest block table.
        block_size: tokens per block.
        num_blocks: block ids are below this; None leaves them unchecked.
        vocab_size: token ids are below this; None leaves them unchecked.
    """

    def __init__(
        self,
        max_slots: int,
        max_blocks_per_sequence: int,
        block_size: int,
        *,
        num_blocks: int | None = None,
        vocab_size: int | None = None,
    ) -> None:
        self._max_slots = max_slots
        self._max_blocks = max_blocks_per_sequence
        self._block_size = block_size
        self._block_id_end = _MAX_SLOT_TOKENS if num_blocks is None else num_blocks
        self._token_id_end = _MAX_SLOT_TOKENS if vocab_size is None else vocab_size
        self._computed = [_NOT_OPEN] * max_slots  # of a roster's slots, when it began
        self._num_blocks = [0] * max_slots
        self._roster_of: list[int | None] = [None] * max_slots
        self._rosters: dict[int, Roster] = {}

    def apply(self, execute: Execute) -> PlanRows:
        """Take in what ``execute`` changes.

        Raises:
            ProtocolError: the plan contradicts itself or the plans before it: a slot out of
                range, not open or named twice, a leave or join that does not fit the roster, a
                position that does not follow, a token without a block, arrays of other lengths
                than the rows need. The slots are then unusable: the epoch ends.
        """
        try:
            return self._apply(execute)
        except ProtocolError as error:
            raise ProtocolError(
                f"plan {execute.plan}, micro-batch {execute.microbatch}: {error}"
            ) from None

    def _apply(self, execute: Execute) -> PlanRows:
        roster = self._rosters.get(execute.microbatch)
        if roster is None:
            roster = self._rosters[execute.microbatch] = Roster([], [])
        if execute.leave or execute.join:
            self._settle(roster)
        slots = roster.slots
        if execute.leave:
            slots = self._leave(slots, self._read_slots("leave", execute.leave))
        for opened in execute.open:
            self._open(opened)
        new_blocks = array.array("i")
        if execute.blocks:
            new_blocks = self._append_blocks(unpack_u32(execute.blocks))
        if execute.join:
            slots = self._join(slots, self._read_slots("join", execute.join), execute.microbatch)
        if slots is not roster.slots:
            roster = Roster(slots, [self._computed[slot] for slot in slots])
            self._rosters[execute.microbatch] = roster
        chunks = self._read_chunks(execute) if execute.chunks else _NO_CHUNKS
        if not chunks[0]:
            if not slots:
                raise ProtocolError("the plan has no rows")
            if execute.chunk_ids:
                raise ProtocolError("chunk_ids: the plan has no chunks")
        self._check_token_ids(execute.chunk_ids, sum(chunks[2]))
        if slots:
            self._check_room(roster)
        rows = PlanRows(roster, roster.num_plans, *chunks, execute.chunk_ids, new_blocks)
        roster.num_plans += 1
        roster.room -= 1
        for slot, start, num_tokens in zip(*chunks[:3], strict=True):
            self._computed[slot] = start + num_tokens
        return rows

    # ---------------------------------------------------------------- what changed

    def _settle(self, roster: Roster) -> None:
        """Write down how far a roster's slots are: it is about to change."""
        for slot, start in zip(roster.slots, roster.starts, strict=True):
            self._computed[slot] = start + roster.num_plans

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
        empty = [slot for slot in joining if self._computed[slot] < 1]
        if empty:
            raise ProtocolError(f"join: nothing is computed yet in slots {empty}")
        return slots + joining

    def _open(self, opened: OpenSlot) -> None:
        slot = opened.slot
        self._check_slot("open", slot)
        if self._roster_of[slot] is not None:
            raise ProtocolError(
                f"open: slot {slot} is still in the roster of micro-batch {self._roster_of[slot]}"
            )
        self._computed[slot] = _NO_TOKENS_YET
        self._num_blocks[slot] = 0

    def _append_blocks(self, pairs: array.array[int]) -> array.array[int]:
        if len(pairs) % 2:
            raise ProtocolError(f"blocks: expected pairs (slot, block), got {len(pairs)} numbers")
        new_blocks = array.array("i")
        for slot, block_id in zip(pairs[0::2], pairs[1::2], strict=True):
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
            self._num_blocks[slot] = column + 1
            new_blocks.extend((slot, column, block_id))
        return new_blocks

    # ---------------------------------------------------------------- the rows

    def _read_chunks(self, execute: Execute) -> tuple[list[int], list[int], list[int], list[bool]]:
        values = unpack_u32(execute.chunks).tolist()
        if len(values) % 4:
            raise ProtocolError(f"chunks: expected quadruples, got {len(values)} numbers")
        slots, starts, lens = values[0::4], values[1::4], values[2::4]
        if len(set(slots)) != len(slots):
            raise ProtocolError("chunks: a slot is named twice")
        for slot, start, num_tokens in zip(slots, starts, lens, strict=True):
            self._check_chunk(slot, start, num_tokens)
        return slots, starts, lens, [flag != 0 for flag in values[3::4]]

    def _check_chunk(self, slot: int, start: int, num_tokens: int) -> None:
        self._check_slot("chunks", slot)
        if self._roster_of[slot] is not None:
            raise ProtocolError(
                f"chunks: slot {slot} is in the roster of micro-batch {self._roster_of[slot]}"
            )
        computed = self._computed[slot]
        if computed == _NOT_OPEN:
            raise ProtocolError(f"chunks: slot {slot} was never opened")
        # After an open the start is free: what lies before it came from the prefix cache.
        if computed not in (_NO_TOKENS_YET, start):
            raise ProtocolError(
                f"chunks: slot {slot} starts at {start}, but {computed} tokens are computed"
            )
        if num_tokens == 0:
            raise ProtocolError(f"chunks: slot {slot} has no tokens")
        self._check_blocks(slot, start + num_tokens - 1)

    def _check_room(self, roster: Roster) -> None:
        """Every row has a block for its token. Looks at the rows only when one may have none."""
        if roster.room > 0:
            return
        room = _MAX_SLOT_TOKENS
        for slot, start in zip(roster.slots, roster.starts, strict=True):
            position = start + roster.num_plans
            self._check_blocks(slot, position)
            room = min(room, self._num_blocks[slot] * self._block_size - position)
        roster.room = room

    def _check_blocks(self, slot: int, position: int) -> None:
        if position >= self._max_blocks * self._block_size:
            raise ProtocolError(
                f"a row of {position + 1} tokens; block tables hold {self._max_blocks} blocks of "
                f"{self._block_size}"
            )
        if position >= self._num_blocks[slot] * self._block_size:
            raise ProtocolError(f"slot {slot} has no block for position {position}")

    def _check_token_ids(self, packed: bytes, count: int) -> None:
        if not packed and not count:
            return
        values = unpack_i32(packed)
        if len(values) != count:
            raise ProtocolError(f"chunk_ids: expected {count} token ids, got {len(values)}")
        lowest, highest = min(values), max(values)
        if lowest < 0 or highest >= self._token_id_end:
            raise ProtocolError(f"chunk_ids: token ids {lowest} .. {highest} are outside")

    def _check_slot(self, field: str, slot: int) -> None:
        if not 0 <= slot < self._max_slots:
            raise ProtocolError(f"{field}: slot {slot} of {self._max_slots}")

    def _read_slots(self, field: str, packed: bytes) -> list[int]:
        slots: list[int] = unpack_u32(packed).tolist()
        for slot in slots:
            self._check_slot(field, slot)
        return slots


_NO_CHUNKS: tuple[list[int], list[int], list[int], list[bool]] = ([], [], [], [])
