"""Which sequence computes what, when: continuous batching over sticky micro-batches.

Pure policy: no I/O, no clock, no randomness, so the same calls always make the same plans.

*Prompts.* All prompts are in one line, first come first served, and every plan takes chunks
from its head: so one prompt may be in all plans in flight, and a long one flows through the
stages like a stream of micro-batches.

*Micro-batches.* Decoding sequences live in micro-batches, each with at most ``1 + run_ahead``
plans in flight; so a sequence decodes in at most that many. It joins the micro-batch whose
plan has the last chunk of its prompt, and stays there until it ends, is preempted, or is moved
because its micro-batch has more than another. It joins the other once its plans are back.

*Run-ahead.* A row is planned before the host has seen the token that it starts from: stage 0
has it. So lengths are counted by what is planned, and a row that has planned all that its
``max_total_tokens`` allows leaves (``DRAINING``). A stop is known only when its token is back:
the rows planned since, at most ``run_ahead``, are computed for nothing and their tokens dropped.
Slot and blocks of a sequence that ended get a new owner only when the last plan that names it
has come back, and only blocks whose tokens have all come back enter the prefix cache.

*Balance.* How many prompt tokens a plan takes, and how many sequences a micro-batch, is for the
``policy`` to say.

*Order.* Admission is strictly first come first served: nobody passes a request that waits for
blocks. Blocks for all known tokens are given on admission, for output one by one.

*Progress.* When blocks run out, the youngest sequence that is not in flight gives up its own
and waits again, at its place in the order of arrival. A row in flight that finds no block and
no one younger to take it from pauses until its own plans are back. The oldest running sequence
never gives up: if all others are in flight, nothing is planned until one of them is back. So
the oldest always goes on until it ends, then the next is the oldest: no two can preempt each
other for ever, and any request that fits alone (``check_fits``) finishes.

*Slots.* See ``Microbatch``: a slot is opened again only in or after the plan that takes it out
of the roster it was in, and only when all plans with a row of it have come back.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Ordered

from ember_pp.coordinator.block_manager import BlockManager
from ember_pp.coordinator.in_flight import InFlight
from ember_pp.coordinator.limits import LengthLimits
from ember_pp.coordinator.microbatch import Microbatch
from ember_pp.coordinator.plan import Chunk, Plan, open_slot, plan_to_execute
from ember_pp.coordinator.policy import POLICIES, Load, PlanTime, Policy
from ember_pp.coordinator.sequence import Sequence, SequenceStatus
from ember_pp.coordinator.waiting_queue import WaitingQueue

__all__ = ["Scheduler", "plan_to_execute"]


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival


def _load(microbatch: Microbatch) -> tuple[int, int]:
    """Sort key: fewest sequences first; among equals, the one to be planned soonest."""
    return microbatch.num_sequences, microbatch.last_plan


class Scheduler:
    """Makes plans, and follows what becomes of their sequences.

    Args:
        num_blocks: KV blocks that every stage has.
        block_size: tokens per block.
        max_in_flight: plans in the pipeline at once.
        num_microbatches: sets of sequences that are planned together; None: ``max_in_flight``.
        run_ahead: plans of a micro-batch that may be in flight beyond the first.
        max_sequences: sequences that run at once; slots are ``0 .. max_sequences - 1``.
        max_tokens_per_plan: tokens of one plan, decode rows and chunks together.
        max_model_len: longest sequence, prompt and output, in tokens.
        max_prompt_tokens: longest prompt; None: what ``max_model_len`` allows.
        prefix_caching: share the blocks of equal beginnings.
        policy: how full micro-batches and plans get.
        plan_time_s: predicted time of a plan at the slowest stage, from (decode rows, prompt
            tokens, context tokens); None: the policy goes by tokens.
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
        num_microbatches: int | None = None,
        run_ahead: int = 0,
        policy: Policy = POLICIES["balanced"],
        plan_time_s: PlanTime | None = None,
    ) -> None:
        self.policy = policy
        self._plan_time_s = plan_time_s
        self.max_in_flight = max_in_flight
        self.num_microbatches = num_microbatches or max_in_flight
        self.run_ahead = run_ahead
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
        self._microbatches = [Microbatch(index) for index in range(self.num_microbatches)]
        self._turns = deque(self._microbatches)  # the one planned longest ago first
        self._prefilling: list[Sequence] = []  # admitted, with known tokens to plan; by arrival
        self._running: list[Sequence] = []  # by arrival
        self._free_slots = list(range(self.max_sequences - 1, -1, -1))
        self._retiring: dict[int, list[Sequence]] = {}  # ended in flight, by their last plan
        self._is_after_idle = True
        self._is_unbalanced = False

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
        self._is_after_idle = self._is_after_idle or not self.has_work
        self._waiting.add_new(sequence)

    def finish(self, sequence: Sequence) -> None:
        """The sequence has its last token: give back all that it holds.

        It is in no plan from now on. What it holds comes back at once if it is not in flight,
        else with the last plan that names it; the tokens of such plans are thrown away. Does
        nothing for a sequence that ended before.
        """
        if sequence.is_finished:
            return
        if sequence.status is SequenceStatus.WAITING:
            self._waiting.remove(sequence)
            sequence.end()
            return
        self._unplan(sequence)
        if self._is_in_flight(sequence):
            sequence.is_dropped = True
            self._retiring.setdefault(sequence.last_plan, []).append(sequence)
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
        return self._waiting.num_tokens + sum(sequence.num_tokens for sequence in self._running)

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
        running = self._running
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
        if len(self.in_flight) >= self.max_in_flight:
            return None
        for microbatch in self._turns:
            if microbatch.num_in_flight > self._run_ahead_of(microbatch):
                continue
            if not microbatch.num_sequences and not self._has_prompt_for(microbatch):
                continue
            num_preemptions = self._num_preemptions
            blocks = self._secure_blocks(microbatch)
            if blocks is None:
                self._give_turn(microbatch, is_next=True)
                return None
            may_admit = num_preemptions == self._num_preemptions
            has_rows = microbatch.has_rows(self.in_flight.num_returned)
            if has_rows or self._has_prompt_for(microbatch, may_admit=may_admit):
                self._give_turn(microbatch, is_next=False)
                return self._make_plan(microbatch, blocks, may_admit=may_admit)
        return None

    def _run_ahead_of(self, microbatch: Microbatch) -> int:
        return 0 if microbatch.num_needing_host else self.run_ahead

    def _give_turn(self, microbatch: Microbatch, *, is_next: bool) -> None:
        self._turns.remove(microbatch)
        if is_next:
            self._turns.appendleft(microbatch)
        else:
            self._turns.append(microbatch)

    def complete(self, plan_number: int, token_ids: Ordered[int]) -> Iterable[tuple[Sequence, int]]:
        """Take the tokens of a plan that came back; those of live sequences, in row order.

        ``token_ids`` are those of ``Sampled``, one per row of ``in_flight.oldest.rows``. The
        caller decides which sequences end, and calls ``finish`` for each before it asks for
        the next plan: always for one that has grown to its ``max_total_tokens``. The sequences
        have their tokens already; what is returned can be gone through once.

        Raises:
            ProtocolError: not the plan that is due, or not its number of token ids; nothing
                has changed then.
        """
        plan = self.in_flight.complete(plan_number, len(token_ids))
        self._microbatches[plan.microbatch_id].num_in_flight -= 1
        rows = plan.rows
        if self._retiring:
            alive = [pair for pair in zip(rows, token_ids, strict=True) if not pair[0].is_dropped]
            rows, token_ids = [row for row, _ in alive], [token for _, token in alive]
        # Pairs that are kept would cost as much again, and at thousands of rows more than that.
        for sequence, token in zip(rows, token_ids, strict=True):
            sequence.output_ids.append(token)
        for sequence in self._retiring.pop(plan_number, ()):
            self._release(sequence)
            sequence.end()
        return zip(rows, token_ids, strict=True)

    def _make_plan(self, microbatch: Microbatch, blocks: list[int], *, may_admit: bool) -> Plan:
        """A plan of all decode rows and of as many chunks as balance and budget allow."""
        if self._is_unbalanced:
            self._balance(microbatch)
        plan = Plan(self.in_flight.next_number, microbatch.index, blocks)
        freed, joined = microbatch.update_roster(plan, self.in_flight.num_returned)
        self._free_slots += freed
        for sequence in joined:
            self._set_due(microbatch, sequence)
        plan.num_context_tokens = microbatch.num_context_tokens
        self._fill_chunks(microbatch, plan, may_admit=may_admit)
        assert plan.decodes or plan.chunks, "a plan without rows"
        # Only now: a plan must not read blocks that the same plan writes.
        for chunk in plan.chunks:
            self._blocks.publish(chunk.sequence, chunk.sequence.num_prefilled_tokens)
        plan.after_idle, self._is_after_idle = self._is_after_idle, False
        microbatch.issue(plan)
        for chunk in plan.chunks:
            if chunk.samples:
                self._prefilling.remove(chunk.sequence)
                if self._is_planned_to_its_end(microbatch, chunk.sequence):
                    self._drain(chunk.sequence)
        self.in_flight.add(plan)
        return plan

    # ---------------------------------------------------------------- decode rows

    def _secure_blocks(self, microbatch: Microbatch) -> list[int] | None:
        """Give a block to each row whose next token needs one, preempting for it if need be.

        Flat pairs (slot, block id), or None if the oldest running sequence needs a block and
        all others are in flight: then nothing may be planned before one of them is back.
        """
        due = microbatch.due_now()
        joining = microbatch.joinable(self.in_flight.num_returned) if microbatch.joining else []
        if not due and not joining:
            return []
        given: list[int] = []
        victims = self._preemptible()
        # Oldest first: who gets a block here is older than any victim that comes after it.
        for sequence in sorted((*due, *joining), key=_arrival):
            if not self._needs_block(sequence, microbatch):
                continue
            num_known = min(sequence.num_tokens, microbatch.num_planned_tokens(sequence))
            self._blocks.publish(sequence, num_known)
            block = self._append_or_preempt(sequence, victims)
            if block is not None:
                given += (sequence.slot, block)
                if sequence.roster_id == microbatch.index:
                    self._set_due(microbatch, sequence)
            elif self._is_in_flight(sequence):
                microbatch.pause(sequence)
            elif not self._is_oldest(sequence):
                self._preempt(sequence)
            else:
                assert not given, "the oldest sequence comes first"
                assert len(self.in_flight), "a sequence that fits alone has no block"
                return None
        return given

    def _needs_block(self, sequence: Sequence, microbatch: Microbatch) -> bool:
        """True if the sequence is in the next plan and its row has no block to be stored in.

        A sequence of which all is planned leaves on this occasion.
        """
        is_here = sequence.microbatch_id == microbatch.index and not sequence.is_dropped
        if not is_here or sequence.status is not SequenceStatus.DECODING:
            return False  # it was set due here, and left
        if sequence.roster_id < 0 and sequence.joins_after >= self.in_flight.num_returned:
            return False  # it was set due here, and pauses
        if self._is_planned_to_its_end(microbatch, sequence):
            self._drain(sequence)
            return False
        num_held = len(sequence.block_table) * self._block_size
        return microbatch.num_planned_tokens(sequence) == num_held

    def _append_or_preempt(self, sequence: Sequence, victims: Iterator[Sequence]) -> int | None:
        """A block for ``sequence``; None if there is none, and no one younger to preempt.

        All rows of a plan share ``victims``: who could not be preempted for one cannot be for
        the next, which is younger.
        """
        while (block := self._blocks.append(sequence)) is None:
            victim = next(victims, None)
            if victim is None or victim.arrival <= sequence.arrival:
                return None
            self._preempt(victim)
        return block

    def _preemptible(self) -> Iterator[Sequence]:
        """Running sequences that can give up their blocks now, the youngest first."""
        for sequence in reversed(tuple(self._running)):
            if not (self._is_ending(sequence) or self._is_in_flight(sequence)):
                yield sequence

    def _is_oldest(self, sequence: Sequence) -> bool:
        oldest = next((other for other in self._running if not self._is_ending(other)), None)
        return oldest is sequence

    def _is_ending(self, sequence: Sequence) -> bool:
        """True if nothing is to be planned for a running sequence any more."""
        return sequence.is_dropped or sequence.status is SequenceStatus.DRAINING

    def _is_planned_to_its_end(self, microbatch: Microbatch, sequence: Sequence) -> bool:
        """True if the plans so far draw the last token that the sequence may have."""
        return microbatch.num_planned_tokens(sequence) + 1 >= sequence.max_total_tokens

    def _set_due(self, microbatch: Microbatch, sequence: Sequence) -> None:
        """Look at a roster row again when it needs a block, or is planned to its end."""
        num_held = len(sequence.block_table) * self._block_size
        last = min(num_held, sequence.max_total_tokens - 1)
        microbatch.set_due(sequence, last - microbatch.num_planned_tokens(sequence))

    def _is_in_flight(self, sequence: Sequence) -> bool:
        if sequence.status is SequenceStatus.PREFILLING:
            return sequence.last_plan >= self.in_flight.num_returned
        microbatch = self._microbatches[sequence.microbatch_id]
        return microbatch.last_plan_of(sequence) >= self.in_flight.num_returned

    # ---------------------------------------------------------------- chunks and admission

    def _fill_chunks(self, microbatch: Microbatch, plan: Plan, *, may_admit: bool) -> None:
        """Chunks of the prompts that were begun, then of what can be admitted."""
        num_places = self._num_places(microbatch)
        may_admit = may_admit and num_places > 0 and self._can_admit(microbatch)
        if not (self._prefilling or may_admit):
            return
        room = max(1, self.policy.prefill_tokens(self._load(microbatch, plan)))
        room = min(room, self.max_tokens_per_plan - microbatch.num_sequences)
        for sequence in self._prefilling:
            if room:
                room -= self._add_chunk(plan, sequence, room, may_end=num_places > 0)
                num_places -= sequence.num_prefilled_tokens == sequence.num_tokens
        while room and num_places > 0 and may_admit and self._can_admit(microbatch):
            sequence = self._admit(microbatch, plan)
            room -= self._add_chunk(plan, sequence, room, may_end=True)
            num_places -= sequence.num_prefilled_tokens == sequence.num_tokens

    def _has_prompt_for(self, microbatch: Microbatch, *, may_admit: bool = True) -> bool:
        """True if its next plan can take a prompt to its end."""
        if self._num_places(microbatch) < 1:
            return False
        return bool(self._prefilling) or (may_admit and self._can_admit(microbatch))

    def _num_places(self, microbatch: Microbatch) -> int:
        """Prompts that may end in its next plan, and decode there from then on.

        Never so many that a plan could not hold their rows.
        """
        num_wanted = min(len(self._running) + len(self._waiting), self.max_sequences)
        share = self.policy.sequence_share(num_wanted, self.num_microbatches)
        return min(share, self.max_tokens_per_plan) - microbatch.num_sequences

    def _load(self, microbatch: Microbatch, plan: Plan) -> Load:
        backlog_tokens = self._num_admissible_tokens()
        for sequence in self._prefilling:
            backlog_tokens += sequence.num_tokens - sequence.num_prefilled_tokens
        first = self._prefilling[0] if self._prefilling else None
        return Load(
            num_decodes=len(plan.decodes),
            num_context_tokens=plan.num_context_tokens,
            num_decoding=sum(other.num_sequences for other in self._microbatches),
            num_decoding_context_tokens=sum(o.num_context_tokens for o in self._microbatches),
            backlog_tokens=backlog_tokens,
            num_begun_tokens=first.num_prefilled_tokens if first is not None else 0,
            num_microbatches=self.num_microbatches,
            max_tokens_per_plan=self.max_tokens_per_plan,
            plan_time_s=self._plan_time_s,
        )

    def _num_admissible_tokens(self) -> int:
        """About how many of the waiting tokens have a slot and blocks to go to by now."""
        num_waiting, num_slots = len(self._waiting), self.max_sequences - len(self._running)
        if not num_waiting:
            return 0
        num_tokens = self._waiting.num_tokens * min(num_slots, num_waiting) // num_waiting
        return min(num_tokens, self._blocks.num_free * self._block_size)

    def _add_chunk(self, plan: Plan, sequence: Sequence, room: int, *, may_end: bool) -> int:
        """Plan the next tokens of a prompt, at most ``room``; how many they are.

        Where it may not end, its last token is left for a plan of another micro-batch.
        """
        start = sequence.num_prefilled_tokens
        end = min(sequence.num_tokens, start + room)
        samples = end == sequence.num_tokens
        if samples and not may_end:
            end, samples = end - 1, False
        if end > start:
            token_ids = sequence.token_ids(start, end)
            plan.chunks.append(Chunk(sequence, sequence.slot, start, token_ids, samples))
            plan.num_context_tokens += end
            sequence.num_prefilled_tokens = end
        return end - start

    def _can_admit(self, microbatch: Microbatch) -> bool:
        """True if the head of the queue can be given a slot, by a plan of ``microbatch``."""
        head = self._waiting.head
        if head is None or not (self._free_slots or microbatch.released):
            return False
        # No more rows than tokens, or a prompt could be left without room for ever.
        if len(self._running) >= self.num_microbatches * self.max_tokens_per_plan:
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
        sequence.num_prefilled_tokens = self._blocks.allocate(sequence)
        if sequence.num_admissions == 0:
            sequence.num_cached_tokens = sequence.num_prefilled_tokens
            self._num_prompt_tokens += sequence.num_prompt_tokens
            self._num_prefix_hit_tokens += sequence.num_cached_tokens
        sequence.num_admissions += 1
        bisect.insort(self._prefilling, sequence, key=_arrival)
        bisect.insort(self._running, sequence, key=_arrival)
        plan.open.append(open_slot(sequence))
        for block in sequence.block_table:
            plan.blocks += (sequence.slot, block)
        return sequence

    # ---------------------------------------------------------------- leaving and moving

    def _unplan(self, sequence: Sequence) -> None:
        """Have a running sequence in no plan any more; it keeps its slot and its blocks."""
        if sequence.status is SequenceStatus.PREFILLING:
            self._prefilling.remove(sequence)
        elif sequence.status is SequenceStatus.DECODING:
            self._microbatches[sequence.microbatch_id].take_out(sequence)
            self._is_unbalanced = True

    def _drain(self, sequence: Sequence) -> None:
        """All of the sequence is planned: it waits for its tokens, and then ``finish``."""
        self._unplan(sequence)
        sequence.status = SequenceStatus.DRAINING

    def _release(self, sequence: Sequence) -> None:
        """Take back slot and blocks of a sequence that is unplanned and not in flight."""
        microbatch = self._microbatches[sequence.microbatch_id]  # the last one if it had none
        has_left = sequence.slot not in microbatch.leaving
        (self._free_slots if has_left else microbatch.released).append(sequence.slot)
        # Past a stop more is stored than is known: of that, nothing is published.
        num_known = min(sequence.num_tokens, sequence.num_prefilled_tokens)
        self._blocks.publish(sequence, num_known)
        self._blocks.free(sequence)
        del self._running[bisect.bisect_left(self._running, sequence.arrival, key=_arrival)]
        sequence.leave_engine()

    def _preempt(self, sequence: Sequence) -> None:
        """Take everything from a sequence but its tokens; it waits to be recomputed."""
        self._unplan(sequence)
        self._release(sequence)
        self._waiting.add_preempted(sequence)
        self._num_preemptions += 1

    def _balance(self, microbatch: Microbatch) -> None:
        """Hand sequences to micro-batches that have ``policy.max_difference`` less.

        The plan being made tells the stages that they leave; the other's next plan, which
        has a higher number, that they join.
        """
        max_difference = self.policy.max_difference
        if max_difference is None:
            self._is_unbalanced = False
            return
        while True:
            smallest = min(self._microbatches, key=_load)
            if microbatch.num_sequences - smallest.num_sequences < max_difference:
                break
            sequence = self._choose_to_move(microbatch)
            microbatch.take_out(sequence)
            sequence.joins_after = sequence.last_plan
            smallest.add(sequence)
        largest = max(other.num_sequences for other in self._microbatches)
        self._is_unbalanced = largest - smallest.num_sequences >= max_difference

    def _choose_to_move(self, microbatch: Microbatch) -> Sequence:
        """The youngest; before it one that waits to join, so that who stays can be planned."""
        num_returned = self.in_flight.num_returned
        return max(
            microbatch.live_sequences(),
            key=lambda sequence: (
                sequence.roster_id < 0 and sequence.joins_after >= num_returned,
                sequence.arrival,
            ),
        )
