"""Which sequence computes what, when: continuous batching over sticky micro-batches.

Pure policy: no I/O, no clock, no randomness, so the same calls always make the same plans.

*Micro-batches.* Sequences live in ``max_in_flight`` micro-batches, each with at most one plan
in flight; so a sequence is in at most one. A sequence stays where it was admitted until it
ends, is preempted, or is moved because its micro-batch has at least two more than another.

*Balance.* A micro-batch admits up to its share of all that could run, and a plan takes its
share of the prompt tokens that wait: a burst is spread over the plans in flight, and fewer
sequences than micro-batches get a plan each.

*Order.* Admission is strictly first come first served: nobody passes a request that waits for
blocks. Blocks for all known tokens are given on admission, for output one by one.

*Progress.* When blocks run out, the youngest sequence that is not in flight gives up its own
and waits again, at its place in the order of arrival. The oldest running sequence is never
the one: if all others are in flight, nothing is planned until one of them is back. So the
oldest always goes on until it ends, then the next is the oldest: no two can preempt each
other for ever, and any request that fits alone (``check_fits``) finishes.

*Slots.* See ``Microbatch``: a slot is opened again only in or after the plan that takes it out
of the roster it was in, and only when all plans with a row of it have come back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Ordered

from ember_pp.coordinator.block_manager import BlockManager
from ember_pp.coordinator.in_flight import InFlight
from ember_pp.coordinator.limits import LengthLimits
from ember_pp.coordinator.microbatch import Microbatch
from ember_pp.coordinator.plan import Chunk, Plan, open_slot, plan_to_execute
from ember_pp.coordinator.sequence import Sequence, SequenceStatus
from ember_pp.coordinator.waiting_queue import WaitingQueue

__all__ = ["Scheduler", "plan_to_execute"]


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival


def _load(microbatch: Microbatch) -> tuple[int, int]:
    """Sort key: fewest sequences first; among equals, the one to be planned soonest."""
    return microbatch.num_sequences, microbatch.plan.number if microbatch.plan else -1


class Scheduler:
    """Makes plans, and follows what becomes of their sequences.

    Args:
        num_blocks: KV blocks that every stage has.
        block_size: tokens per block.
        max_in_flight: plans in the pipeline at once; also the number of micro-batches.
        max_sequences: sequences that run at once; slots are ``0 .. max_sequences - 1``.
        max_tokens_per_plan: tokens of one plan, decode rows and chunks together.
        max_model_len: longest sequence, prompt and output, in tokens.
        max_prompt_tokens: longest prompt; None: what ``max_model_len`` allows.
        prefix_caching: share the blocks of equal beginnings.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_in_flight: int,
        max_sequences: int,
        max_tokens_per_plan: int,
        max_model_len: int,
        max_prompt_tokens: int | None = None,
        prefix_caching: bool = True,
    ) -> None:
        self.max_in_flight = max_in_flight
        self.max_sequences = max_sequences
        self.max_tokens_per_plan = max_tokens_per_plan
        self.limits = LengthLimits(
            num_blocks=num_blocks,
            block_size=block_size,
            max_model_len=max_model_len,
            max_prompt_tokens=max_prompt_tokens,
        )
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._prefix_caching = prefix_caching
        self._waiting = WaitingQueue()
        self._num_arrivals = 0
        self._num_preemptions = 0
        self._num_prompt_tokens = 0
        self._num_prefix_hit_tokens = 0
        self._start_pipeline()

    def _start_pipeline(self) -> None:
        """The state that mirrors the stages, as it is when they have just started."""
        self.in_flight = InFlight()
        self._blocks = BlockManager(
            self._num_blocks, self._block_size, prefix_caching=self._prefix_caching
        )
        self._microbatches = [Microbatch(index) for index in range(self.max_in_flight)]
        self._idle = deque(self._microbatches)  # not in flight, longest idle first
        self._running: dict[int, Sequence] = {}  # by arrival
        self._free_slots = list(range(self.max_sequences - 1, -1, -1))
        self._num_dropped = 0  # ended, but still in flight
        self._is_unbalanced = False
        self._prefill_share = 0
        self._is_share_stale = True

    # ---------------------------------------------------------------- requests

    def check_fits(self, num_prompt_tokens: int, max_tokens: int | None) -> None:
        """Refuse a request that could not be served even alone.

        Raises:
            InvalidRequestError: the text names the setting to change.
        """
        self.limits.check_fits(num_prompt_tokens, max_tokens)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence.

        Raises:
            InvalidRequestError: as ``check_fits``; nothing is queued.
        """
        max_tokens = sequence.params.max_tokens
        num_prompt_tokens = sequence.num_prompt_tokens
        self.limits.check_fits(num_prompt_tokens, max_tokens)
        sequence.max_total_tokens = self.limits.max_total_tokens(num_prompt_tokens, max_tokens)
        sequence.arrival = self._num_arrivals
        self._num_arrivals += 1
        self._is_share_stale = True
        self._waiting.add_new(sequence)

    def finish(self, sequence: Sequence) -> None:
        """The sequence has its last token: give back all that it holds.

        At once if it is not in flight, else when its plan comes back, whose token is then
        thrown away. Does nothing for a sequence that ended before.
        """
        if sequence.is_finished:
            return
        if sequence.status is SequenceStatus.WAITING:
            self._waiting.remove(sequence)
            sequence.end()
        elif self._is_in_flight(sequence):
            sequence.is_dropped = True
            self._num_dropped += 1
        else:
            self._release(sequence)
            sequence.end()

    def abort(self, sequence: Sequence) -> None:
        """End a sequence at any moment, wherever it is; as ``finish``."""
        self.finish(sequence)

    @property
    def has_work(self) -> bool:
        """True while any sequence waits, runs or is in flight."""
        return bool(self._running) or len(self._waiting) > 0

    @property
    def num_open_tokens(self) -> int:
        """Known tokens of all sequences that wait or run: what a router calls load."""
        return self._waiting.num_tokens + sum(
            sequence.num_tokens for sequence in self._running.values()
        )

    def stats(self) -> dict[str, int]:
        """Counts for ``status``; those of preemptions and tokens are totals since the start."""
        return {
            "num_running": len(self._running),
            "num_waiting": len(self._waiting),
            "num_in_flight": len(self.in_flight),
            "num_blocks": self._blocks.num_blocks,
            "num_free_blocks": self._blocks.num_free,
            "num_cached_blocks": self._blocks.num_cached,
            "num_preemptions": self._num_preemptions,
            "num_prompt_tokens": self._num_prompt_tokens,
            "num_prefix_hit_tokens": self._num_prefix_hit_tokens,
        }

    def forget(self) -> None:
        """A new epoch: the stages have no blocks, slots, rosters or plans any more.

        Everything that ran waits again in the order of arrival, to be recomputed; what ended
        in flight is gone. Plan numbers start at 0 again.
        """
        running = sorted(self._running.values(), key=_arrival)
        self._start_pipeline()
        for sequence in running:
            sequence.leave_engine()
            if sequence.is_dropped:
                sequence.end()
            else:
                self._waiting.add_preempted(sequence)

    # ---------------------------------------------------------------- plans

    def next_plan(self) -> Plan | None:
        """The next plan to be sent, or None when nothing can be planned now.

        After None, only ``add``, ``complete``, ``finish`` or ``abort`` can change that.
        """
        for _ in range(len(self._idle)):
            microbatch = self._idle[0]
            if microbatch.num_sequences or self._can_admit(microbatch):
                num_preemptions = self._num_preemptions
                blocks = self._secure_blocks(microbatch)
                if blocks is None:
                    return None  # the micro-batch stays first in line
                may_admit = num_preemptions == self._num_preemptions
                if microbatch.num_sequences or may_admit:
                    self._idle.popleft()
                    return self._make_plan(microbatch, blocks, may_admit=may_admit)
            self._idle.rotate(-1)
        return None

    def complete(self, plan_number: int, token_ids: Ordered[int]) -> list[tuple[Sequence, int]]:
        """Take the tokens of a plan that came back; those of live sequences, in row order.

        ``token_ids`` are those of ``Sampled``, one per row of ``in_flight.oldest.rows``. The
        caller decides which sequences end, and calls ``finish`` for each before it asks for
        the next plan: always for one that has grown to its ``max_total_tokens``.

        Raises:
            ProtocolError: not the plan that is due, or not its number of token ids; nothing
                has changed then.
        """
        plan = self.in_flight.complete(plan_number, len(token_ids))
        microbatch = self._microbatches[plan.microbatch_id]
        microbatch.retire(plan, token_ids)
        self._idle.append(microbatch)
        return self._deliver(plan, token_ids)

    def _make_plan(self, microbatch: Microbatch, blocks: list[int], *, may_admit: bool) -> Plan:
        """A plan of all decode rows and of as many chunks as balance and budget allow."""
        if self._is_unbalanced:
            self._balance(microbatch)
        plan = Plan(self.in_flight.next_number, microbatch.index, blocks)
        joined = microbatch.joining
        self._free_slots += microbatch.update_roster(plan)
        for sequence in joined:
            self._set_due(microbatch, sequence)
        self._fill_chunks(microbatch, plan, may_admit=may_admit)
        # Only now: a plan must not read blocks that the same plan writes.
        for chunk in plan.chunks:
            self._blocks.publish(chunk.sequence, chunk.sequence.num_prefilled_tokens)
        microbatch.advance()
        microbatch.plan = plan
        self.in_flight.add(plan)
        return plan

    def _deliver(self, plan: Plan, token_ids: Ordered[int]) -> list[tuple[Sequence, int]]:
        """Append the tokens to their sequences; drop those that ended in flight."""
        sampled = list(zip(plan.rows, token_ids, strict=True))
        if self._num_dropped:
            sampled = [(sequence, token) for sequence, token in sampled if not sequence.is_dropped]
            self._release_dropped(plan)
        for sequence, token in sampled:
            sequence.output_ids.append(token)
        return sampled

    def _release_dropped(self, plan: Plan) -> None:
        for sequence in (*plan.decodes, *(chunk.sequence for chunk in plan.chunks)):
            if sequence.is_dropped:
                self._num_dropped -= 1
                self._release(sequence)
                sequence.end()

    # ---------------------------------------------------------------- blocks of decode rows

    def _secure_blocks(self, microbatch: Microbatch) -> list[int] | None:
        """Give a block to each row whose next token needs one, preempting for it if need be.

        Flat pairs (slot, block id), or None if the oldest running sequence needs a block and
        all others are in flight: then nothing may be planned before one of them is back.
        """
        due = microbatch.due_now()
        if not due and not microbatch.joining:
            return []
        given: list[int] = []
        # Oldest first: who gets a block here is older than any victim that comes after it.
        for sequence in sorted((*due, *microbatch.joining), key=_arrival):
            if not self._needs_block(sequence, microbatch):
                continue
            self._blocks.publish(sequence, sequence.num_computed_tokens)
            block = self._append_or_preempt(sequence)
            if block is not None:
                given += (sequence.slot, block)
                if sequence.roster_id == microbatch.index:
                    self._set_due(microbatch, sequence)
            elif sequence.status is not SequenceStatus.WAITING:
                assert not given, "the oldest sequence comes first"
                return None
        return given

    def _needs_block(self, sequence: Sequence, microbatch: Microbatch) -> bool:
        """True if the sequence decodes here and its next row has no block to be stored in."""
        is_here = sequence.microbatch_id == microbatch.index
        if not is_here or sequence.status is not SequenceStatus.DECODING:
            return False  # it was set due here, and left
        assert sequence.num_tokens < sequence.max_total_tokens, f"{sequence} was not finished"
        num_held = len(sequence.block_table) * self._block_size
        return sequence.num_computed_tokens == num_held

    def _append_or_preempt(self, sequence: Sequence) -> int | None:
        """A block for ``sequence``; None if it was preempted itself, or has to wait."""
        while (block := self._blocks.append(sequence)) is None:
            idle = [other for other in self._running.values() if not self._is_in_flight(other)]
            victim = max(idle, key=_arrival)
            if victim is sequence and self._is_oldest(sequence):
                assert len(self.in_flight), "a sequence that fits alone has no block"
                return None
            self._preempt(victim)
            if victim is sequence:
                return None
        return block

    def _is_oldest(self, sequence: Sequence) -> bool:
        return not any(
            other.arrival < sequence.arrival and not other.is_dropped
            for other in self._running.values()
        )

    def _set_due(self, microbatch: Microbatch, sequence: Sequence) -> None:
        """Look at a roster row again when it needs a block, or should have been finished."""
        num_held = len(sequence.block_table) * self._block_size
        last = min(num_held, sequence.max_total_tokens - 1)
        microbatch.set_due(sequence, last - sequence.num_computed_tokens)

    def _is_in_flight(self, sequence: Sequence) -> bool:
        if sequence.has_chunk_in_flight:
            return True
        roster_id = sequence.roster_id
        return roster_id >= 0 and self._microbatches[roster_id].plan is not None

    # ---------------------------------------------------------------- chunks and admission

    def _fill_chunks(self, microbatch: Microbatch, plan: Plan, *, may_admit: bool) -> None:
        """Chunks of what is being prefilled here, then of what can be admitted."""
        if not microbatch.prefilling and not (may_admit and self._can_admit(microbatch)):
            return
        room = min(self._prefill_tokens_per_plan(), self.max_tokens_per_plan - len(plan.decodes))
        for sequence in microbatch.prefilling:
            room -= self._add_chunk(plan, sequence, room)
        while room and may_admit and self._can_admit(microbatch):
            room -= self._add_chunk(plan, self._admit(microbatch, plan), room)

    def _prefill_tokens_per_plan(self) -> int:
        """The backlog's share of one plan, if as many plans as can work on it do.

        It is set when something arrives, and kept while the backlog shrinks: the last plans
        of a burst are as large as the first.
        """
        backlog = [
            sequence.num_tokens - sequence.num_prefilled_tokens
            for microbatch in self._microbatches
            for sequence in microbatch.prefilling
            if sequence.num_tokens > sequence.num_prefilled_tokens
        ]
        num_sequences = len(backlog) + len(self._waiting)
        if self._is_share_stale or num_sequences < self.max_in_flight:
            num_tokens = sum(backlog) + self._waiting.num_tokens
            self._prefill_share = -(-num_tokens // min(num_sequences, self.max_in_flight))
            self._is_share_stale = False
        return self._prefill_share

    def _add_chunk(self, plan: Plan, sequence: Sequence, room: int) -> int:
        """Plan the next tokens of a prefill, at most ``room``; how many they are."""
        start = sequence.num_prefilled_tokens
        end = min(sequence.num_tokens, start + room)
        if end > start:
            token_ids = sequence.token_ids(start, end)
            samples = end == sequence.num_tokens
            plan.chunks.append(Chunk(sequence, sequence.slot, start, token_ids, samples))
            sequence.num_prefilled_tokens = end
            sequence.has_chunk_in_flight = True
        return end - start

    def _can_admit(self, microbatch: Microbatch) -> bool:
        """True if the head of the queue may start in this micro-batch now."""
        head = self._waiting.head
        if head is None or not (self._free_slots or microbatch.released):
            return False
        num_wanted = min(len(self._running) + len(self._waiting), self.max_sequences)
        share = -(-num_wanted // self.max_in_flight)
        # No more rows than tokens, or a chunk could be left without room for ever.
        if microbatch.num_sequences >= min(share, self.max_tokens_per_plan):
            return False
        # A block for each one that runs, or the next ones to need one would preempt this one.
        return self._blocks.can_allocate(head, headroom=len(self._running))

    def _admit(self, microbatch: Microbatch, plan: Plan) -> Sequence:
        """Give the head of the queue a slot and its blocks."""
        sequence = self._waiting.head
        assert sequence is not None
        self._waiting.remove(sequence)
        sequence.slot = self._free_slots.pop()
        sequence.status = SequenceStatus.PREFILLING
        sequence.microbatch_id = microbatch.index
        sequence.num_prefilled_tokens = self._blocks.allocate(sequence)
        if sequence.num_admissions == 0:
            sequence.num_cached_tokens = sequence.num_prefilled_tokens
            self._num_prompt_tokens += sequence.num_prompt_tokens
            self._num_prefix_hit_tokens += sequence.num_cached_tokens
        sequence.num_admissions += 1
        microbatch.prefilling.append(sequence)
        microbatch.num_sequences += 1
        self._running[sequence.arrival] = sequence
        self._is_unbalanced = True
        plan.open.append(open_slot(sequence))
        for block in sequence.block_table:
            plan.blocks += (sequence.slot, block)
        return sequence

    # ---------------------------------------------------------------- leaving and moving

    def _release(self, sequence: Sequence) -> None:
        """Take back slot and blocks of a running sequence that is not in flight."""
        microbatch = self._microbatches[sequence.microbatch_id]
        is_in_roster = sequence.roster_id >= 0
        (microbatch.released if is_in_roster else self._free_slots).append(sequence.slot)
        microbatch.take_out(sequence)
        self._blocks.publish(sequence, sequence.num_computed_tokens)
        self._blocks.free(sequence)
        del self._running[sequence.arrival]
        self._is_unbalanced = True
        sequence.leave_engine()

    def _preempt(self, sequence: Sequence) -> None:
        """Take everything from a sequence but its tokens; it waits to be recomputed."""
        self._release(sequence)
        self._waiting.add_preempted(sequence)
        self._num_preemptions += 1
        self._is_share_stale = True

    def _balance(self, microbatch: Microbatch) -> None:
        """Hand sequences to micro-batches that have at least two less.

        The plan being made tells the stages that they leave; the other's next plan, which
        has a higher number, that they join.
        """
        while True:
            smallest = min(self._microbatches, key=_load)
            if microbatch.num_sequences - smallest.num_sequences < 2:
                break
            sequence = max(microbatch.live_sequences(), key=_arrival)
            microbatch.take_out(sequence)
            smallest.take_in(sequence)
        largest = max(other.num_sequences for other in self._microbatches)
        self._is_unbalanced = largest - smallest.num_sequences >= 2
