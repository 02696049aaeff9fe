"""A micro-batch: the sequences that are planned together, and what the stages know of them."""

from __future__ import annotations

from collections.abc import Iterator

from ember_pp.coordinator.plan import Plan
from ember_pp.coordinator.sequence import Sequence, SequenceStatus


class Microbatch:
    """Sequences that share plans, of which several may be in flight.

    ``roster`` mirrors, row by row, what the stages remember. It changes only together with
    the plan that tells them (``update_roster``); until then the slot of a sequence that goes
    is in ``leaving`` and a sequence that comes in ``joining``.

    The slot of a sequence that was released before its ``leave`` was sent is in ``released``.
    It goes back to the free slots with the plan that carries its ``leave`` and not before, so
    no plan, of any micro-batch, can open a slot that some roster still has.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.num_sequences = 0
        """Sequences that decode here, in the roster or ``joining``."""
        self.num_needing_host = 0
        """Of these, those that cannot be planned ahead of the host."""
        self.num_in_flight = 0
        """Plans that have not come back."""
        self.last_plan = -1
        """Number of the newest plan."""
        self.roster: list[Sequence] = []
        """Decode rows. Plans in flight share this list: replaced when it changes."""
        self.joining: list[Sequence] = []
        """Sequences that decode, but are not in the roster yet, or for a while."""
        self.leaving: dict[int, None] = {}
        """Slots, in order."""
        self.released: list[int] = []
        self.step = 0
        """Plans made so far: each one moves every roster row on by one token."""
        self._sum_of_offsets = 0
        """``step_offset`` of all that are in the roster, together."""
        self._due: dict[int, list[Sequence]] = {}

    # ---------------------------------------------------------------- who is here

    def live_sequences(self) -> Iterator[Sequence]:
        """All ``num_sequences`` sequences of this micro-batch."""
        yield from (row for row in self.roster if row.roster_id == self.index)
        yield from self.joining

    def joinable(self, num_returned: int) -> list[Sequence]:
        """Those of ``joining`` that may be in the next plan, ``num_returned`` plans being back."""
        return [sequence for sequence in self.joining if sequence.joins_after < num_returned]

    def has_rows(self, num_returned: int) -> bool:
        """True if the next plan has a decode row."""
        if len(self.roster) > len(self.leaving):
            return True
        return bool(self.joining and self.joinable(num_returned))

    def add(self, sequence: Sequence) -> None:
        """A sequence whose prompt is planned to its end, or that comes from another micro-batch."""
        self.num_sequences += 1
        self.num_needing_host += sequence.needs_host
        sequence.microbatch_id = self.index
        self.joining.append(sequence)

    def take_out(self, sequence: Sequence) -> None:
        """Plan a sequence here no more; it keeps its slot, and plans in flight keep its rows."""
        self.num_sequences -= 1
        self.num_needing_host -= sequence.needs_host
        if sequence.roster_id == self.index:
            self._leave_roster(sequence)
        else:
            self.joining.remove(sequence)
        if self.num_sequences == 0:  # `leaving` tells the stages; keep no one alive till then
            self.roster = []
            self._due.clear()

    def pause(self, sequence: Sequence) -> None:
        """Keep a decoding sequence out of the roster until its last plan is back."""
        if sequence.roster_id == self.index:
            self._leave_roster(sequence)
            self.joining.append(sequence)
        sequence.joins_after = sequence.last_plan

    def _leave_roster(self, sequence: Sequence) -> None:
        sequence.num_prefilled_tokens = self.num_planned_tokens(sequence)
        self._sum_of_offsets -= sequence.step_offset
        sequence.last_plan = self.last_plan
        sequence.roster_id = -1
        self.leaving[sequence.slot] = None

    # ---------------------------------------------------------------- plans

    def num_planned_tokens(self, sequence: Sequence) -> int:
        """Leading tokens of one of its sequences whose keys and values issued plans store."""
        if sequence.roster_id == self.index:
            return self.step + sequence.step_offset
        return sequence.num_prefilled_tokens

    @property
    def num_context_tokens(self) -> int:
        """Tokens that the roster rows of the plan being made attend to, their own included."""
        return len(self.roster) * (self.step + 1) + self._sum_of_offsets

    def last_plan_of(self, sequence: Sequence) -> int:
        """Number of the newest plan that has a row of the sequence; -1 if none has."""
        return self.last_plan if sequence.roster_id == self.index else sequence.last_plan

    def update_roster(self, plan: Plan, num_returned: int) -> tuple[list[int], list[Sequence]]:
        """Carry out what is pending and write it into ``plan``.

        Costs nothing when nothing is pending.

        Returns:
            The slots that became free, and the sequences that joined.
        """
        freed: list[int] = []
        joined = self.joinable(num_returned) if self.joining else []
        plan.feedback = self.last_plan
        if self.leaving or joined:
            freed, self.released = self.released, []
            kept = [row for row in self.roster if row.roster_id == self.index]
            plan.leave, self.leaving = list(self.leaving), {}
            plan.join = [sequence.slot for sequence in joined]
            plan.feedback = self._newest_draw(kept, joined)
            self._enter(joined, num_returned)
            self.roster = kept + joined
        elif not self.roster:
            plan.feedback = -1
        plan.decodes = self.roster
        return freed, joined

    def _newest_draw(self, kept: list[Sequence], joined: list[Sequence]) -> int:
        """Newest plan that drew a token of these rows: every plan draws one for each row."""
        newest = [sequence.last_plan for sequence in joined]
        return max([self.last_plan, *newest] if kept else newest, default=-1)

    def _enter(self, joined: list[Sequence], num_returned: int) -> None:
        self.joining = [row for row in self.joining if row.joins_after >= num_returned]
        for sequence in joined:
            sequence.step_offset = sequence.num_prefilled_tokens - self.step
            self._sum_of_offsets += sequence.step_offset
            sequence.roster_id = self.index

    def issue(self, plan: Plan) -> None:
        """The plan is made: on to the next step."""
        self._due.pop(self.step, None)
        self.step += 1
        self.last_plan = plan.number
        self.num_in_flight += 1
        for chunk in plan.chunks:
            sequence = chunk.sequence
            sequence.last_plan = plan.number
            if chunk.samples:
                sequence.status = SequenceStatus.DECODING
                self.add(sequence)

    # Rows are looked at only in the step in which something is due for them, so that a plan
    # of an unchanged roster costs the same at 1 and at 512 rows. An entry whose sequence has
    # left meanwhile stays and is skipped: who takes it must look whether it still holds.

    def set_due(self, sequence: Sequence, num_steps: int) -> None:
        """Ask to be given ``sequence`` again in ``num_steps`` plans from now."""
        self._due.setdefault(self.step + num_steps, []).append(sequence)

    def due_now(self) -> list[Sequence]:
        """What was set due for the plan that is being made, without taking it out."""
        return self._due.get(self.step, [])
