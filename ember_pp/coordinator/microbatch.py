"""A micro-batch: the sequences that are planned together, and what the stages know of them."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from collections.abc import Sequence as Ordered

from ember_pp import protocol
from ember_pp.coordinator.plan import Plan
from ember_pp.coordinator.sequence import Sequence, SequenceStatus


class Microbatch:
    """Sequences that share plans, one plan in flight at a time.

    ``roster`` mirrors, row by row, what the stages remember. It changes only together with
    the plan that tells them (``update_roster``); until then a sequence that goes is listed in
    ``leaving`` and one that comes in ``joining``.

    The slot of a sequence that ended while in the roster is in ``released``. It goes back to
    the free slots with the plan that carries its ``leave`` and not before, so no plan, of any
    micro-batch, can open a slot that some roster still has.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.num_sequences = 0
        """Sequences that are planned here, wherever they are in the lists below."""
        self.plan: Plan | None = None
        """The plan in flight."""
        self.roster: list[Sequence] = []
        """Decode rows. Plans in flight share this list: replaced when it changes."""
        self.decode_ids = b""
        """i32 newest token of each roster row."""
        self.prefilling: list[Sequence] = []
        """Sequences with known tokens to compute, in order of arrival."""
        self.joining: list[Sequence] = []
        self.leaving: list[int] = []
        self.released: list[int] = []
        self.step = 0
        """Plans made so far: each one moves every roster row on by one token."""
        self._due: dict[int, list[Sequence]] = {}

    def live_sequences(self) -> Iterator[Sequence]:
        """All ``num_sequences`` sequences of this micro-batch."""
        yield from (row for row in self.roster if row.roster_id == self.index)
        yield from self.joining
        yield from self.prefilling

    def take_out(self, sequence: Sequence) -> None:
        """Remove a sequence that is not in flight; it keeps its slot."""
        self.num_sequences -= 1
        if sequence.roster_id == self.index:
            sequence.roster_id = -1
            self.leaving.append(sequence.slot)
        elif sequence in self.joining:
            self.joining.remove(sequence)
        else:
            self.prefilling.remove(sequence)
        if self.num_sequences == 0:  # `leaving` tells the stages; keep no one alive till then
            self.roster = []
            self._due.clear()

    def take_in(self, sequence: Sequence) -> None:
        """Add a sequence that ``take_out`` has removed from another micro-batch."""
        self.num_sequences += 1
        sequence.microbatch_id = self.index
        if sequence.status is SequenceStatus.DECODING:
            self.joining.append(sequence)
        else:
            bisect.insort(self.prefilling, sequence, key=lambda other: other.arrival)

    def update_roster(self, plan: Plan) -> list[int]:
        """Carry out what is pending and write it into ``plan``; the slots that became free.

        Costs nothing when nothing is pending.
        """
        freed: list[int] = []
        if self.leaving or self.joining:
            freed, self.released = self.released, []
            roster = [row for row in self.roster if row.roster_id == self.index]
            plan.leave = self.leaving
            plan.join = [sequence.slot for sequence in self.joining]
            for sequence in self.joining:
                sequence.roster_id = self.index
            self.roster = roster + self.joining
            self.decode_ids = protocol.pack_i32(row.output_ids[-1] for row in self.roster)
            self.leaving, self.joining = [], []
        plan.decodes = self.roster
        plan.decode_ids = self.decode_ids
        return freed

    def retire(self, plan: Plan, token_ids: Ordered[int]) -> None:
        """The plan in flight came back with ``token_ids``; no work per decode row."""
        self.plan = None
        num_decodes = len(plan.decodes)
        self.decode_ids = protocol.pack_i32(token_ids[:num_decodes] if plan.chunks else token_ids)
        for chunk in plan.chunks:
            chunk.sequence.has_chunk_in_flight = False
            if chunk.samples:
                chunk.sequence.status = SequenceStatus.DECODING
                self.prefilling.remove(chunk.sequence)
                self.joining.append(chunk.sequence)

    # Rows are looked at only in the step in which something is due for them, so that a plan
    # of an unchanged roster costs the same at 1 and at 512 rows. An entry whose sequence has
    # left meanwhile stays and is skipped: who takes it must look whether it still holds.

    def set_due(self, sequence: Sequence, num_steps: int) -> None:
        """Ask to be given ``sequence`` again in ``num_steps`` plans from now."""
        self._due.setdefault(self.step + num_steps, []).append(sequence)

    def due_now(self) -> list[Sequence]:
        """What was set due for the plan that is being made, without taking it out."""
        return self._due.get(self.step, [])

    def advance(self) -> None:
        """The plan is made: on to the next step."""
        self._due.pop(self.step, None)
        self.step += 1
