"""Scheduler with run-ahead: histories of requests against a model of the stages.

The stage executes a plan the moment it is sent, or only when its tokens are asked for (a last
stage that is late); the tokens come back when the history says so.
"""

import dataclasses
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_stage import ModelStage, generate_alone

from ember_pp.coordinator.scheduler import Scheduler, plan_to_execute
from ember_pp.coordinator.sequence import Sequence
from ember_pp.sampling_params import SamplingParams

BLOCK_SIZE, MAX_MODEL_LEN = 4, 48


@dataclasses.dataclass
class Client:
    """What one request asks for, and what it got."""

    sequence: Sequence
    stop_after: int
    """Output tokens after which the host sees a stop; it cannot be known before."""
    received: list[int] = dataclasses.field(default_factory=list)
    is_cancelled: bool = False


class Engine:
    """A scheduler and its stage; every message goes through here, and is checked."""

    def __init__(
        self, *, num_stages, run_ahead, num_blocks, max_sequences, max_tokens=16, **options
    ):
        self.run_ahead = run_ahead
        self.max_in_flight = num_stages + 1
        self.num_blocks = num_blocks
        self.max_sequences = max_sequences
        self.scheduler = Scheduler(
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            max_in_flight=self.max_in_flight,
            num_microbatches=num_stages if run_ahead else self.max_in_flight,
            run_ahead=run_ahead,
            max_sequences=max_sequences,
            max_tokens_per_plan=max_tokens,
            max_model_len=MAX_MODEL_LEN,
            **options,
        )
        self.stage = ModelStage(
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            max_slots=max_sequences,
            max_tokens=max_tokens,
        )
        self.clients = {}
        self.in_flight = []
        self.num_rows_planned = {}
        self.num_plans = 0

    def submit(self, client):
        self.scheduler.add(client.sequence)
        self.clients[client.sequence] = client

    def issue(self):
        """Send all plans that there are; how many."""
        num_before = self.num_plans
        while (plan := self.scheduler.next_plan()) is not None:
            self._check(plan)
            self.in_flight.append((plan, self.stage.execute(plan_to_execute(plan, 0))))
            self.num_plans += 1
        return self.num_plans - num_before

    def _check(self, plan):
        assert len(self.in_flight) < self.max_in_flight
        for sequence in plan.rows:
            ahead = [p for p, _ in self.in_flight if sequence in p.rows]
            assert len(ahead) <= self.run_ahead, "too far ahead"
            assert not sequence.is_finished, "an ended sequence is planned"
            assert sequence.num_tokens + len(ahead) < sequence.max_total_tokens, "past its end"
            if sequence.needs_host:
                assert not ahead
            self.num_rows_planned[sequence] = self.num_rows_planned.get(sequence, 0) + 1

    def complete(self):
        plan, token_ids = self.in_flight.pop(0)
        for sequence, token in self.scheduler.complete(plan.number, token_ids):
            client = self.clients[sequence]
            assert not client.is_cancelled
            client.received.append(token)
            is_at_end = sequence.num_tokens == sequence.max_total_tokens
            if is_at_end or len(client.received) == client.stop_after:
                self.scheduler.finish(sequence)

    def cancel(self, client):
        client.is_cancelled = True
        self.scheduler.abort(client.sequence)

    def run_to_the_end(self):
        while self.scheduler.has_work:
            assert self.issue() or self.in_flight, "stuck"
            self.complete()
            # Bounded wait: with all sequences known, each plan takes at least one row on.
            assert self.num_plans < 20_000

    def check_answers(self):
        for sequence, client in self.clients.items():
            num_tokens = len(client.received)
            assert client.received == generate_alone(sequence, num_tokens)
            if not client.is_cancelled:
                room = sequence.max_total_tokens - sequence.num_prompt_tokens
                assert num_tokens == min(client.stop_after, room)

    def check_nothing_is_left(self):
        stats = self.scheduler.stats()
        assert stats["num_free_blocks"] == stats["num_blocks"] == self.num_blocks
        assert (stats["num_running"], stats["num_waiting"], stats["num_in_flight"]) == (0, 0, 0)
        # Every slot can be had again: fill them all, with rosters still to be cleared.
        for index in range(self.max_sequences):
            self.submit(make_client(1000 + index, [index + 1], max_tokens=2))
        self.run_to_the_end()
        self.check_answers()


def make_client(index, prompt, *, max_tokens=8, stop_after=10**6, **params):
    sampling = SamplingParams(max_tokens=max_tokens, **params)
    return Client(Sequence(f"request-{index}", prompt, sampling, seed=index), stop_after)


def random_client(rng, index):
    shared = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
    prompt = shared[: rng.choice((0, 0, 4, 8, 12))] + [
        rng.randrange(900) for _ in range(rng.randrange(1, 16))
    ]
    params = rng.choice(({}, {}, {"presence_penalty": 0.5}))
    client = make_client(
        index,
        prompt,
        max_tokens=rng.randrange(1, 20),
        stop_after=rng.choice((10**6, rng.randrange(1, 12))),
        **params,
    )
    client.sequence.needs_host = rng.random() < 0.1
    return client


def random_history(seed, num_stages, run_ahead, num_blocks, max_sequences, prefix_caching):
    """Submit, cancel, send and return in any order; then to the end."""
    rng = random.Random(seed)
    engine = Engine(
        num_stages=num_stages,
        run_ahead=run_ahead,
        num_blocks=num_blocks,
        max_sequences=max_sequences,
        max_tokens=max(rng.choice((5, 16)), max_sequences),
        prefix_caching=prefix_caching,
    )
    lateness = rng.choice((0.1, 0.5, 0.9))
    for index in range(rng.randrange(5, 25)):
        for _ in range(rng.randrange(3)):
            engine.submit(random_client(rng, 10 * index + rng.randrange(10)))
        if rng.random() < 0.8:
            engine.issue()
        while engine.in_flight and rng.random() > lateness:
            engine.complete()
        open_clients = [c for s, c in engine.clients.items() if not s.is_finished]
        if open_clients and rng.random() < 0.2:
            engine.cancel(rng.choice(open_clients))
    engine.run_to_the_end()
    engine.check_answers()
    engine.check_nothing_is_left()
    return engine


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 2**32),
    num_stages=st.sampled_from((1, 2, 3, 8)),
    run_ahead=st.sampled_from((0, 1, 1, 2, 5)),
    num_blocks=st.sampled_from((12, 13, 20, 200)),
    max_sequences=st.sampled_from((1, 3, 8)),
    prefix_caching=st.booleans(),
)
def test_any_history_gives_the_tokens_of_one_at_a_time(
    seed, num_stages, run_ahead, num_blocks, max_sequences, prefix_caching
):
    random_history(seed, num_stages, run_ahead, num_blocks, max_sequences, prefix_caching)


def test_the_histories_have_everything():
    """They would prove little if nothing were ever preempted, shared or thrown away."""
    engines = [random_history(seed, 2, 1, 13, 8, True) for seed in range(20)]
    stats = [engine.scheduler.stats() for engine in engines]
    assert sum(part["num_preemptions"] for part in stats) > 10
    assert sum(part["num_prefix_hit_tokens"] for part in stats) > 100
    wasted = sum(
        engine.num_rows_planned.get(sequence, 0) - len(client.received)
        for engine in engines
        for sequence, client in engine.clients.items()
    )
    assert wasted > 20


@pytest.mark.parametrize("run_ahead", [0, 1, 2, 3])
def test_a_stop_costs_at_most_run_ahead_steps_and_a_known_end_none(run_ahead):
    engine = Engine(num_stages=4, run_ahead=run_ahead, num_blocks=100, max_sequences=8)
    stops = [make_client(i, [i + 1], max_tokens=30, stop_after=5) for i in range(4)]
    ends = [make_client(i, [i + 1], max_tokens=5) for i in range(4, 8)]
    for client in stops + ends:
        engine.submit(client)
    engine.run_to_the_end()
    engine.check_answers()
    wasted = [engine.num_rows_planned[c.sequence] - 5 for c in stops]
    assert max(wasted) <= run_ahead
    assert not run_ahead or max(wasted) > 0
    assert [engine.num_rows_planned[c.sequence] for c in ends] == [5] * 4


@pytest.mark.parametrize(("run_ahead", "num_plans"), [(0, 1), (1, 2), (2, 2)])
def test_a_lone_request_is_planned_ahead(run_ahead, num_plans):
    """One stage and room for two plans: the second waits for nothing but the device."""
    engine = Engine(num_stages=1, run_ahead=run_ahead, num_blocks=20, max_sequences=2)
    engine.submit(make_client(0, [1, 2, 3], max_tokens=10))
    assert engine.issue() == num_plans
    engine.complete()
    assert engine.issue() == 1


def test_a_request_that_needs_the_host_is_not_planned_ahead():
    engine = Engine(num_stages=1, run_ahead=1, num_blocks=20, max_sequences=2)
    client = make_client(0, [1, 2, 3], max_tokens=10)
    client.sequence.needs_host = True
    engine.submit(client)
    assert engine.issue() == 1
    engine.complete()
    assert engine.issue() == 1
    engine.cancel(client)
    engine.complete()
    engine.submit(make_client(1, [1, 2, 3], max_tokens=10))
    assert engine.issue() == 2, "those after it are"


def test_blocks_and_slot_of_a_stopped_sequence_wait_for_its_last_plan():
    engine = Engine(num_stages=1, run_ahead=1, num_blocks=12, max_sequences=1, prefix_caching=False)
    stopped = make_client(0, list(range(1, 9)), max_tokens=30, stop_after=1)
    after = make_client(1, list(range(1, 45)), max_tokens=3)
    engine.submit(stopped)
    engine.submit(after)
    engine.issue()
    engine.complete()  # the stop; the second plan still writes to its blocks
    assert stopped.sequence.is_finished
    assert engine.issue() == 0
    assert engine.scheduler.stats()["num_free_blocks"] < 12
    engine.complete()
    assert engine.scheduler.stats()["num_free_blocks"] == 12
    assert engine.issue() > 0
    engine.run_to_the_end()
    engine.check_answers()


def test_only_tokens_that_came_back_enter_the_prefix_cache():
    """A block that was filled past a stop holds a token that no one asked for."""
    engine = Engine(num_stages=1, run_ahead=3, num_blocks=20, max_sequences=4)
    engine.max_in_flight = engine.scheduler.max_in_flight = 4
    client = make_client(0, [1, 2, 3], max_tokens=20, stop_after=3)
    engine.submit(client)
    engine.run_to_the_end()
    # 3 + 3 tokens are known; up to 8 were stored, which would be two full blocks.
    assert engine.scheduler.stats()["num_cached_blocks"] == 1


def test_steady_decode_is_a_constant_number_of_bytes():
    from ember_pp import protocol

    sizes = {}
    for num_sequences in (1, 60):
        engine = Engine(
            num_stages=2, run_ahead=1, num_blocks=1000, max_sequences=60, max_tokens=400
        )
        for index in range(num_sequences):
            engine.submit(make_client(index, [1] * 5, max_tokens=40))
        sizes[num_sequences] = []
        for _ in range(24):
            engine.issue()
            plan = engine.in_flight[-1][0]
            if not plan.blocks:
                sizes[num_sequences].append(len(protocol.encode(plan_to_execute(plan, 0))))
            engine.complete()
    assert min(sizes[60]) == min(sizes[1]) <= 32


def test_the_first_plan_after_a_time_without_work_says_so():
    engine = Engine(num_stages=2, run_ahead=1, num_blocks=50, max_sequences=4)
    for start in (0, 2):
        for index in (start, start + 1):
            engine.submit(make_client(index, [1, 2], max_tokens=4))
        flags = []
        while engine.scheduler.has_work:
            engine.issue()
            flags.append(engine.in_flight[0][0].after_idle)
            engine.complete()
        assert flags == [True] + [False] * (len(flags) - 1)


def test_a_new_epoch_replays_what_was_ahead():
    engine = Engine(num_stages=2, run_ahead=1, num_blocks=50, max_sequences=8)
    for index in range(6):
        engine.submit(make_client(index, [index + 1] * 6, max_tokens=9, stop_after=7))
    for _ in range(9):
        engine.issue()
        engine.complete()
    engine.cancel(next(iter(engine.clients.values())))
    engine.issue()
    engine.scheduler.forget()
    engine.in_flight = []
    engine.stage = ModelStage(num_blocks=50, block_size=BLOCK_SIZE, max_slots=8, max_tokens=16)
    engine.run_to_the_end()
    engine.check_answers()
    engine.check_nothing_is_left()
