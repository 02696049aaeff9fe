"""Drives a scheduler against the model stage, and checks after each step what must always hold."""

from __future__ import annotations

from collections import Counter, deque

from model_stage import ModelStage, generate_alone

from ember_pp import protocol
from ember_pp.coordinator.plan import Plan
from ember_pp.coordinator.policy import POLICIES
from ember_pp.coordinator.scheduler import Scheduler, plan_to_execute
from ember_pp.coordinator.sequence import Sequence, SequenceStatus
from ember_pp.sampling_params import SamplingParams


class Driver:
    """The coordinator's side of a pipeline: submits, sends plans, takes tokens back, stops."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
        max_in_flight: int = 2,
        max_sequences: int = 8,
        max_tokens_per_plan: int = 32,
        max_model_len: int = 64,
        prefix_caching: bool = True,
        policy: str = "balanced",
    ) -> None:
        self.scheduler = Scheduler(
            num_blocks=num_blocks,
            block_size=block_size,
            max_in_flight=max_in_flight,
            max_sequences=max_sequences,
            max_tokens_per_plan=max_tokens_per_plan,
            max_model_len=max_model_len,
            prefix_caching=prefix_caching,
            policy=POLICIES[policy],
        )
        self.sequences: list[Sequence] = []
        self.plans: list[Plan] = []
        self._stop_after: dict[Sequence, int] = {}
        self._start_stage()

    def _start_stage(self) -> None:
        limits = self.scheduler.limits
        self.stage = ModelStage(
            num_blocks=limits.num_blocks,
            block_size=limits.block_size,
            max_slots=self.scheduler.max_sequences,
            max_tokens=self.scheduler.max_tokens_per_plan,
        )
        self._returning: deque[tuple[Plan, list[int]]] = deque()
        self._oldest: Sequence | None = None
        self._num_plans_of_oldest = 0

    # what happens

    def submit(
        self,
        prompt_ids: list[int],
        *,
        max_tokens: int | None = 4,
        stop_after: int = 1000,
        presence_penalty: float = 0.0,
    ) -> Sequence:
        """Queue a request that the text layer would stop after ``stop_after`` tokens."""
        params = SamplingParams(max_tokens=max_tokens, presence_penalty=presence_penalty)
        number = len(self.sequences)
        sequence = Sequence(f"r{number}", prompt_ids, params, number % 3)
        self.scheduler.add(sequence)
        self.sequences.append(sequence)
        self._stop_after[sequence] = stop_after
        return sequence

    def plan(self) -> Plan | None:
        """Ask for a plan, and let the stage execute it."""
        running = self.running
        plan = self.scheduler.next_plan()
        self._check_preempted(running)
        self.check()
        if plan is None:
            assert self._returning or not self.scheduler.has_work, "nothing goes on any more"
            return None
        self._check_admission(plan)
        packed = protocol.encode(plan_to_execute(plan, epoch=1))
        token_ids = self.stage.execute(protocol.decode(packed))
        self._returning.append((plan, token_ids))
        self.plans.append(plan)
        self._check_rosters()
        self._check_progress()
        return plan

    def plan_all(self) -> list[Plan]:
        """Plans until there are none to be had now."""
        plans = []
        while (plan := self.plan()) is not None:
            plans.append(plan)
        return plans

    def complete(self) -> list[tuple[Sequence, int]]:
        """The oldest plan comes back; sequences that are at their end are finished."""
        plan, token_ids = self._returning.popleft()
        alive = list(self.scheduler.complete(plan.number, token_ids))
        for sequence, token in alive:
            assert sequence.output_ids[-1] == token
            is_full = sequence.num_tokens >= sequence.max_total_tokens
            if is_full or sequence.num_output_tokens >= self._stop_after[sequence]:
                self.scheduler.finish(sequence)
        self.check()
        return alive

    def abort(self, sequence: Sequence) -> None:
        self.scheduler.abort(sequence)
        self.check()

    def restart_stages(self) -> None:
        """A new epoch: plans in flight are lost."""
        self.scheduler.forget()
        self._start_stage()
        self.check()

    @property
    def num_in_flight(self) -> int:
        return len(self._returning)

    @property
    def running(self) -> list[Sequence]:
        return [sequence for sequence in self.sequences if sequence.slot >= 0]

    def drain(self) -> None:
        """Run until everything has ended; then nothing may be left behind."""
        while self.scheduler.has_work:
            self.plan_all()
            if self._returning:
                self.complete()
        assert self.plan() is None
        assert not self._returning
        stats = self.scheduler.stats()
        assert stats["num_free_blocks"] == stats["num_blocks"]
        assert stats["num_running"] == stats["num_waiting"] == stats["num_in_flight"] == 0
        for sequence in self.sequences:
            assert sequence.is_finished
            self.check_tokens(sequence)

    # what must hold

    def check_tokens(self, sequence: Sequence) -> None:
        """Its tokens are those that it would have had alone."""
        expected = generate_alone(sequence, sequence.num_output_tokens)
        assert list(sequence.output_ids) == expected, sequence

    def check(self) -> None:
        self._check_blocks()
        self._check_slots()
        self._check_in_flight()
        for sequence in self.running:
            assert sequence.num_tokens <= sequence.max_total_tokens
            if sequence.num_admissions:
                assert sequence.num_cached_tokens < sequence.num_prompt_tokens

    def _check_blocks(self) -> None:
        """Each block is free, held as often as it is in block tables, or evictable."""
        manager = self.scheduler._blocks
        held = Counter(block for sequence in self.running for block in sequence.block_table)
        counts = {block: count for block, count in enumerate(manager._ref_counts) if count}
        assert held == counts
        everywhere = [*manager._free, *manager._evictable, *held]
        assert sorted(everywhere) == list(range(manager.num_blocks))
        for sequence in self.sequences:
            assert sequence.slot >= 0 or not sequence.block_table

    def _check_slots(self) -> None:
        taken = [sequence.slot for sequence in self.running]
        released = [slot for one in self.scheduler._microbatches for slot in one.released]
        everywhere = taken + released + self.scheduler._free_slots
        assert sorted(everywhere) == list(range(self.scheduler.max_sequences))

    def _check_in_flight(self) -> None:
        """No micro-batch is in two plans in flight, and no sequence draws in two.

        A prompt may be in several, of which only the newest may draw.
        """
        plans = [plan for plan, _ in self._returning]
        assert len(plans) <= self.scheduler.max_in_flight
        assert len({plan.microbatch_id for plan in plans}) == len(plans)
        drawing = [row for plan in plans for row in plan.rows]
        assert len(set(drawing)) == len(drawing)
        ends: dict[Sequence, int] = {}
        for chunk in (chunk for plan in plans for chunk in plan.chunks):
            start = ends.get(chunk.sequence, chunk.start)
            assert chunk.start == start, "chunks in flight follow each other"
            ends[chunk.sequence] = start + len(chunk.token_ids)

    def _check_admission(self, plan: Plan) -> None:
        """First come first served; no slot is opened that a plan in flight has a row of."""
        opened = [part.slot for part in plan.open]
        arrival_of = {sequence.slot: sequence.arrival for sequence in self.running}
        arrivals = [arrival_of[slot] for slot in opened]
        waiting = [
            sequence.arrival
            for sequence in self.sequences
            if sequence.status is SequenceStatus.WAITING
        ]
        assert arrivals + sorted(waiting) == sorted(arrivals + waiting), "not in order of arrival"
        for other, _ in self._returning:
            named = self._slots_of_rows[other.number]
            assert not named & set(opened), "a slot is opened before its last plan is back"

    def _check_preempted(self, before: list[Sequence]) -> None:
        """The oldest running sequence goes on; only planning preempts."""
        alive = [sequence for sequence in before if not sequence.is_dropped]
        if alive:
            oldest = min(alive, key=lambda sequence: sequence.arrival)
            assert oldest.slot >= 0, f"{oldest} was preempted, and is the oldest"

    def _check_rosters(self) -> None:
        """The stages' rosters are those of the micro-batches, but for who is told to leave next."""
        for microbatch in self.scheduler._microbatches:
            on_stages = self.stage.rosters.get(microbatch.index, [])
            rows = [row.slot for row in microbatch.roster if row.roster_id == microbatch.index]
            assert rows == [slot for slot in on_stages if slot not in microbatch.leaving]

    def _check_progress(self) -> None:
        """The oldest running sequence moves on by a token every ``2 * max_in_flight`` plans."""
        alive = [sequence for sequence in self.running if not sequence.is_dropped]
        oldest = min(alive, key=lambda sequence: sequence.arrival, default=None)
        if oldest is not self._oldest:
            self._oldest, self._num_plans_of_oldest = oldest, 0
        self._num_plans_of_oldest += 1
        if oldest is not None:
            bound = 2 * self.scheduler.max_in_flight * (oldest.max_total_tokens + 1)
            assert self._num_plans_of_oldest <= bound, f"{oldest} starves"

    @property
    def _slots_of_rows(self) -> dict[int, set[int]]:
        return {
            plan.number: {row.slot for row in plan.decodes} | {chunk.slot for chunk in plan.chunks}
            for plan, _ in self._returning
        }
