"""Scheduler, blocks and in-flight book over generated histories, against a model stage.

A history is a set of limits, a list of requests (many with equal beginnings), and a seed for
the order of events: arrivals, plans, returns, cancels, stops, and stages that are lost (a new
epoch: the scheduler forgets what ran, and replays it). The model stage computes
tokens that depend on every key the row attends to, so a block that is shared wrongly, reused
too early or written by two owners changes a token; the oracle computes each request alone.

Nobody starves, under any policy. With ``F`` plans in flight and ``M`` micro-batches:

1. The oldest running sequence has a token planned in every ``W = 2 * (F + M)`` plans: within
   ``F`` of them its micro-batch has a plan back and may be planned, before that come at most
   ``M`` others that are due; and twice that if it pauses for a block, or if its prompt has to
   end in a micro-batch that has a place.
2. It is never preempted, so it ends within ``W * L`` plans, ``L`` being the longest request.
3. Who comes later is not admitted while someone waits. So whoever has become the oldest of all
   that are alive, and waits, waits for sequences that run already: at most ``max_sequences - 1``,
   which by 2 end one after the other, the oldest first.
4. So one with ``k`` requests before it ends within ``(k + 1) * max_sequences * W * L`` plans.

1, 2 and 3 are asserted after every event, 4 when a request ends.
"""

from __future__ import annotations

import collections
import dataclasses
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_stage import ModelStage, generate_alone

from ember_pp.coordinator.plan import Plan
from ember_pp.coordinator.policy import POLICIES
from ember_pp.coordinator.scheduler import Scheduler, plan_to_execute
from ember_pp.coordinator.sequence import Sequence, SequenceStatus
from ember_pp.errors import InvalidRequestError
from ember_pp.sampling_params import SamplingParams

MAX_EVENTS = 20_000


@dataclasses.dataclass(frozen=True)
class Limits:
    block_size: int
    num_blocks: int
    max_in_flight: int
    max_sequences: int
    max_tokens_per_plan: int
    prefix_caching: bool
    num_microbatches: int | None = None
    run_ahead: int = 0
    max_model_len: int = 64
    policy: str = "balanced"

    @property
    def longest_wait(self) -> int:
        """Plans in which the oldest running sequence must move on: ``W`` above."""
        return 2 * (self.max_in_flight + (self.num_microbatches or self.max_in_flight))


@dataclasses.dataclass(frozen=True)
class Arrival:
    prompt: tuple[int, ...]
    max_tokens: int
    stop_after: int
    """Output tokens at which the text side ends it, if that is less."""
    counts_tokens: bool


limits = st.builds(
    Limits,
    block_size=st.sampled_from([1, 2, 3, 4, 7]),
    num_blocks=st.integers(4, 40),
    max_in_flight=st.integers(1, 5),
    max_sequences=st.integers(1, 8),
    max_tokens_per_plan=st.sampled_from([1, 2, 5, 16, 64]),
    prefix_caching=st.booleans(),
    num_microbatches=st.sampled_from([None, 1, 2, 4]),
    run_ahead=st.sampled_from([0, 1, 1, 2, 4]),
    policy=st.sampled_from(sorted(POLICIES)),
)
# Few distinct tokens and a few shared beginnings: prefixes meet often.
beginnings = st.sampled_from([(), (1, 2, 3, 4, 5, 6, 7, 8), (1, 2, 3, 4, 9), (5,) * 20])
prompts = st.builds(
    lambda beginning, rest: beginning + tuple(rest),
    beginnings,
    st.lists(st.integers(0, 3), min_size=1, max_size=12),
)
arrivals = st.lists(
    st.builds(
        Arrival,
        prompt=prompts,
        max_tokens=st.integers(1, 20),
        stop_after=st.integers(1, 30),
        counts_tokens=st.booleans(),
    ),
    min_size=1,
    max_size=14,
)


class History:
    """One run: the scheduler, the model stage, and what must hold after every event."""

    def __init__(
        self,
        limits: Limits,
        arrivals: list[Arrival],
        seed: int,
        cancel_rate: float = 0.0,
        loss_rate: float = 0.0,
    ):
        self.limits = limits
        self.rng = random.Random(seed)
        self.cancel_rate = cancel_rate
        self.loss_rate = loss_rate
        self.scheduler = Scheduler(
            num_blocks=limits.num_blocks,
            block_size=limits.block_size,
            max_in_flight=limits.max_in_flight,
            max_sequences=limits.max_sequences,
            max_tokens_per_plan=limits.max_tokens_per_plan,
            max_model_len=limits.max_model_len,
            prefix_caching=limits.prefix_caching,
            num_microbatches=limits.num_microbatches,
            run_ahead=limits.run_ahead,
            policy=POLICIES[limits.policy],
        )
        self.to_arrive = collections.deque(arrivals)
        self.open: dict[str, tuple[Sequence, Arrival]] = {}
        self.outputs: dict[str, list[int]] = collections.defaultdict(list)
        self.ended: list[tuple[Sequence, Arrival, str]] = []
        self.first_opened: list[int] = []
        self.num_events = 0
        self.num_epochs = 0
        self.longest_wait = 0
        self._start_stage()

    def _start_stage(self) -> None:
        self.stage = ModelStage(
            num_blocks=self.limits.num_blocks,
            block_size=self.limits.block_size,
            max_slots=self.limits.max_sequences,
            max_tokens=self.limits.max_tokens_per_plan,
        )
        self.flying: collections.deque[tuple[int, list[int]]] = collections.deque()
        self.oldest: Sequence | None = None
        self.oldest_moved_at = 0
        """Plans that had been made when the oldest running sequence had a token planned."""
        self.num_ahead: dict[str, tuple[int, int]] = {}
        """Requests before each one, and plans that had been made when it began to wait."""
        for name in getattr(self, "open", ()):
            self._begin_to_wait(name)

    def _begin_to_wait(self, name: str) -> None:
        arrival = self.open[name][0].arrival
        ahead = sum(other.arrival < arrival for other, _ in self.open.values())
        # Those that ended in flight hold what they have until their last plan is back.
        ahead += sum(other.is_dropped for other in self.scheduler._running)
        self.num_ahead[name] = ahead, self.stage.next_plan

    def run(self) -> History:
        while self.to_arrive or self.open or self.flying:
            self.num_events += 1
            assert self.num_events < MAX_EVENTS, f"no end in sight: {self.scheduler.stats()}"
            event = self.rng.choice(self._possible_events())
            if not event() and not self.flying and not self.to_arrive:
                assert self._plan(), f"work, nothing in flight, and no plan: {self.open}"
            self._check()
        return self

    def _possible_events(self):
        events = [self._plan, self._plan]
        if self.to_arrive:
            events.append(self._arrive)
        if self.flying:
            events.append(self._return)
        if self.open and self.rng.random() < self.cancel_rate:
            events.append(self._cancel)
        if self.open and self.rng.random() < self.loss_rate:
            events.append(self._lose_stages)
        return events

    def _arrive(self) -> bool:
        arrival = self.to_arrive.popleft()
        params = SamplingParams(
            max_tokens=arrival.max_tokens,
            presence_penalty=0.5 if arrival.counts_tokens else 0.0,
        )
        name = f"r{len(self.open) + len(self.ended)}-{self.num_events}"
        sequence = Sequence(name, list(arrival.prompt), params, seed=hash(arrival) & 0xFFFF)
        try:
            self.scheduler.add(sequence)
        except InvalidRequestError:
            total = len(arrival.prompt) + arrival.max_tokens
            assert total > self.limits.num_blocks * self.limits.block_size + 1 or (
                len(arrival.prompt) >= self.limits.max_model_len
            )
            return True
        self.open[name] = (sequence, arrival)
        self._begin_to_wait(name)
        return True

    def _lose_stages(self) -> bool:
        """What is in flight is gone, and the stages know nothing any more."""
        self.num_epochs += 1
        self.scheduler.forget()
        self._start_stage()
        return True

    def _plan(self) -> bool:
        running, flying = list(self.scheduler._running), self._in_flight()
        plan = self.scheduler.next_plan()
        self._assert_the_youngest_were_preempted(running, flying)
        if plan is None:
            return False
        self._assert_the_oldest_moves_on(plan, running)
        assert plan.num_tokens <= self.limits.max_tokens_per_plan
        assert len(self.flying) < self.limits.max_in_flight
        execute = plan_to_execute(plan, epoch=0)
        if execute.open:
            slots = {opened.slot for opened in execute.open}
            opened = [chunk.sequence for chunk in plan.chunks if chunk.slot in slots]
            opened += self._new_without_chunk(plan)
            for sequence in opened:
                if sequence.num_admissions == 1 and sequence.arrival not in self.first_opened:
                    self.first_opened.append(sequence.arrival)
                self._assert_nobody_was_passed(sequence)
        self.flying.append((plan.number, self.stage.execute(execute)))
        return True

    def _assert_nobody_was_passed(self, opened: Sequence) -> None:
        """Nobody who came earlier, preempted or new, waits while ``opened`` is let in."""
        for sequence, _ in self.open.values():
            if sequence.status is SequenceStatus.WAITING:
                assert sequence.arrival > opened.arrival, f"{opened} passed {sequence}"

    def _in_flight(self) -> set[Sequence]:
        plans = self.scheduler.in_flight._plans
        rows = {row for plan in plans for row in plan.rows}
        return rows | {chunk.sequence for plan in plans for chunk in plan.chunks}

    def _assert_the_youngest_were_preempted(
        self, running: list[Sequence], flying: set[Sequence]
    ) -> None:
        """Nobody who is younger, and could have been preempted as well, goes on."""
        preempted = [s.arrival for s in running if s.status is SequenceStatus.WAITING]
        for other in running:
            if preempted and other.arrival > min(preempted):
                is_spared = other in flying or other.status is SequenceStatus.DRAINING
                assert is_spared or other.status is SequenceStatus.WAITING, other

    def _assert_the_oldest_moves_on(self, plan: Plan, running: list[Sequence]) -> None:
        alive = [s for s in running if not (s.is_dropped or s.status is SequenceStatus.DRAINING)]
        oldest = min(alive, key=lambda sequence: sequence.arrival, default=None)
        if oldest is None or oldest is not self.oldest:
            self.oldest, self.oldest_moved_at = oldest, plan.number
        if oldest is None:
            return
        assert oldest.slot >= 0, f"{oldest} was preempted, and is the oldest"
        if oldest in plan.decodes or any(chunk.sequence is oldest for chunk in plan.chunks):
            self.oldest_moved_at = plan.number
        wait = plan.number - self.oldest_moved_at
        self.longest_wait = max(self.longest_wait, wait)
        assert wait <= self.limits.longest_wait, f"{oldest} has waited for {wait} plans"

    def _assert_it_did_not_wait_too_long(self, name: str) -> None:
        limits = self.limits
        num_ahead, start = self.num_ahead[name]
        longest = limits.longest_wait * limits.max_model_len
        bound = (num_ahead + 1) * limits.max_sequences * longest
        assert self.stage.next_plan - start <= bound, f"{name} took too long"

    def _new_without_chunk(self, plan) -> list[Sequence]:
        slots = {opened.slot for opened in plan.open} - {chunk.slot for chunk in plan.chunks}
        return [sequence for sequence, _ in self.open.values() if sequence.slot in slots]

    def _return(self) -> bool:
        number, token_ids = self.flying.popleft()
        for sequence, token_id in self.scheduler.complete(number, token_ids):
            output = self.outputs[sequence.request_id]
            output.append(token_id)
            assert list(sequence.output_ids) == output
            _, arrival = self.open[sequence.request_id]
            is_at_end = sequence.num_tokens >= sequence.max_total_tokens
            if is_at_end or len(output) >= arrival.stop_after:
                self.scheduler.finish(sequence)
                self._end(sequence, "finished")
        return True

    def _cancel(self) -> bool:
        sequence, _ = self.rng.choice(list(self.open.values()))
        self.scheduler.abort(sequence)
        self.scheduler.abort(sequence)  # a second time does nothing
        self._end(sequence, "cancelled")
        return True

    def _end(self, sequence: Sequence, how: str) -> None:
        _, arrival = self.open.pop(sequence.request_id)
        self._assert_it_did_not_wait_too_long(sequence.request_id)
        self.ended.append((sequence, arrival, how))

    def _check(self) -> None:
        """Every block is free, evictable, or held as often as block tables name it."""
        blocks = self.scheduler._blocks
        named = collections.Counter(
            block for sequence in self.scheduler._running for block in sequence.block_table
        )
        for block, count in enumerate(blocks._ref_counts):
            assert named[block] == count, f"block {block} is named {named[block]} times"
        idle = [*blocks._free, *blocks._evictable]
        assert len(set(idle)) == len(idle), "a block was freed twice"
        assert sorted(idle) == [b for b in range(blocks.num_blocks) if not named[b]]
        slots = [sequence.slot for sequence in self.scheduler._running]
        assert len(set(slots)) == len(slots) <= self.limits.max_sequences


def assert_nothing_is_left(history: History) -> None:
    scheduler = history.scheduler
    stats = scheduler.stats()
    assert (stats["num_running"], stats["num_waiting"], stats["num_in_flight"]) == (0, 0, 0)
    assert stats["num_free_blocks"] == stats["num_blocks"]
    assert not scheduler.has_work
    assert scheduler.next_plan() is None


def assert_tokens_are_those_of_running_alone(history: History) -> None:
    for sequence, arrival, how in history.ended:
        output = history.outputs[sequence.request_id]
        assert output == generate_alone(sequence, len(output))
        if how == "finished":
            total = min(len(arrival.prompt) + arrival.max_tokens, history.limits.max_model_len)
            assert len(output) == min(arrival.stop_after, total - len(arrival.prompt))


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(limits=limits, arrivals=arrivals, seed=st.integers(0, 2**32 - 1))
def test_every_history_gives_the_tokens_of_running_alone(limits, arrivals, seed):
    history = History(limits, arrivals, seed).run()
    assert_tokens_are_those_of_running_alone(history)
    assert_nothing_is_left(history)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(limits=limits, arrivals=arrivals, seed=st.integers(0, 2**32 - 1))
def test_cancelled_work_leaves_nothing_behind(limits, arrivals, seed):
    history = History(limits, arrivals, seed, cancel_rate=0.3).run()
    assert_tokens_are_those_of_running_alone(history)
    assert_nothing_is_left(history)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(limits=limits, arrivals=arrivals, seed=st.integers(0, 2**32 - 1))
def test_what_stages_lost_is_replayed(limits, arrivals, seed):
    history = History(limits, arrivals, seed, cancel_rate=0.1, loss_rate=0.05).run()
    assert_tokens_are_those_of_running_alone(history)
    assert_nothing_is_left(history)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(limits=limits, arrivals=arrivals, seed=st.integers(0, 2**32 - 1))
def test_nobody_is_let_in_before_one_who_came_earlier(limits, arrivals, seed):
    history = History(limits, arrivals, seed).run()
    assert history.first_opened == sorted(history.first_opened)


def make_history(*, num_blocks, seed=0, max_in_flight=3, prefix_caching=False):
    limits = Limits(
        block_size=2,
        num_blocks=num_blocks,
        max_in_flight=max_in_flight,
        max_sequences=8,
        max_tokens_per_plan=16,
        prefix_caching=prefix_caching,
    )
    arrivals = [Arrival((7, 7, 7, 7, 7, index), 12, 30, True) for index in range(8)]
    return History(limits, arrivals, seed).run()


@pytest.mark.parametrize("seed", range(20))
def test_the_generated_histories_do_preempt(seed):
    """The properties above would be idle words if blocks never ran out."""
    history = make_history(num_blocks=14, seed=seed)
    assert history.scheduler.stats()["num_preemptions"] > 0
    assert_tokens_are_those_of_running_alone(history)


def test_the_generated_histories_do_share_prefixes():
    history = make_history(num_blocks=60, prefix_caching=True)
    assert history.scheduler.stats()["num_prefix_hit_tokens"] > 0
    assert_tokens_are_those_of_running_alone(history)


@pytest.mark.parametrize("num_sequences", [2, 5, 8])
def test_a_request_waits_no_longer_than_those_before_it_take(num_sequences):
    """One slot: request k starts within the plans that the k requests before it need."""
    limits = Limits(4, 16, 1, 1, 16, prefix_caching=False)
    arrivals = [Arrival((1, 2, index), 6, 30, False) for index in range(num_sequences)]
    history = History(limits, arrivals, seed=1).run()
    assert history.first_opened == list(range(num_sequences))
    assert history.stage.next_plan == 6 * num_sequences
