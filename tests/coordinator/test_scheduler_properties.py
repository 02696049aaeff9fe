"""Generated histories: whatever arrives, stops, is cancelled or comes back late, the tokens of
each request are those that it has alone, and what ``driver.check`` lists holds at every step."""

import contextlib

import hypothesis
import hypothesis.strategies as st
from driver import Driver
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from ember_pp.coordinator.policy import POLICIES
from ember_pp.errors import InvalidRequestError

# Two token ids and short blocks: equal beginnings are the rule.
PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=14)


class Histories(RuleBasedStateMachine):
    """Hypothesis chooses the limits, then what happens in which order."""

    @initialize(
        num_blocks=st.integers(3, 24),
        block_size=st.integers(1, 5),
        max_in_flight=st.integers(1, 4),
        max_sequences=st.integers(1, 9),
        max_tokens_per_plan=st.integers(1, 20),
        max_model_len=st.integers(8, 40),
        prefix_caching=st.booleans(),
        policy=st.sampled_from(sorted(POLICIES)),
    )
    def start(self, **limits):
        self.driver = Driver(**limits)

    @rule(
        prompt_ids=PROMPTS,
        max_tokens=st.one_of(st.none(), st.integers(1, 20)),
        stop_after=st.integers(1, 20),
        presence_penalty=st.sampled_from([0.0, 1.0]),
        copies=st.integers(1, 4),
    )
    def submit(self, copies, **request):
        for _ in range(copies):
            with contextlib.suppress(InvalidRequestError):  # does not fit these limits
                self.driver.submit(**request)

    @rule()
    def plan(self):
        self.driver.plan()

    @rule()
    def plan_all(self):
        self.driver.plan_all()

    @precondition(lambda self: self.driver.num_in_flight)
    @rule()
    def complete(self):
        self.driver.complete()

    @precondition(lambda self: self.driver.num_in_flight)
    @rule(num_rounds=st.integers(1, 12))
    def run_on(self, num_rounds):
        """A full pipeline for a while."""
        for _ in range(num_rounds):
            self.driver.plan_all()
            if self.driver.num_in_flight:
                self.driver.complete()

    @precondition(lambda self: self.driver.sequences)
    @rule(index=st.integers(0, 1000))
    def abort(self, index):
        self.driver.abort(self.driver.sequences[index % len(self.driver.sequences)])

    @precondition(lambda self: self.driver.num_in_flight)
    @rule()
    def restart_stages(self):
        self.driver.restart_stages()

    def teardown(self):
        if hasattr(self, "driver"):
            self.driver.drain()


TestHistories = Histories.TestCase
TestHistories.settings = hypothesis.settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)


@hypothesis.settings(max_examples=150, deadline=None)
@hypothesis.given(
    prompts=st.lists(PROMPTS, min_size=2, max_size=8),
    max_in_flight=st.integers(1, 4),
    block_size=st.integers(1, 3),
    num_spare_blocks=st.integers(0, 6),
    num_late=st.integers(0, 3),
    prefix_caching=st.booleans(),
    policy=st.sampled_from(sorted(POLICIES)),
)
def test_requests_that_fit_alone_finish_in_a_cache_for_hardly_more_than_one(
    prompts, max_in_flight, block_size, num_spare_blocks, num_late, prefix_caching, policy
):
    """No livelock of sequences that preempt each other, however late plans come back."""
    num_tokens = max(len(prompt) for prompt in prompts) + 12
    driver = Driver(
        num_blocks=-(-num_tokens // block_size) + num_spare_blocks,
        block_size=block_size,
        max_in_flight=max_in_flight,
        prefix_caching=prefix_caching,
        policy=policy,
    )
    sequences = [driver.submit(prompt, max_tokens=12) for prompt in prompts]
    while driver.scheduler.has_work:
        driver.plan_all()
        while driver.num_in_flight > num_late:
            driver.complete()
        if driver.num_in_flight and driver.plan() is None:
            driver.complete()
    driver.drain()
    assert [sequence.num_output_tokens for sequence in sequences] == [12] * len(prompts)
