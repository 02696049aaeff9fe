"""The simulator against cases that can be worked out by hand. Times are whole, so all is exact."""

import random

import pytest

from ember_pp.coordinator.policy import POLICIES
from ember_pp.coordinator.scheduler import Scheduler
from ember_pp.coordinator.simulator import Arrival, Report, Simulation, Timing, percentiles
from ember_pp.errors import InvalidRequestError

AT_ONCE = Timing(hop_s=0, latency_s=0, host_s=0)


def constant(time_s):
    return lambda *size: time_s


def make_scheduler(num_stages, **settings):
    run_ahead = settings.pop("run_ahead", 1)
    max_in_flight = settings.pop("max_in_flight", num_stages + 1)
    return Scheduler(
        **{
            "num_blocks": 4096,
            "block_size": 16,
            "max_in_flight": max_in_flight,
            "num_microbatches": min(num_stages, max_in_flight) if run_ahead else max_in_flight,
            "run_ahead": run_ahead,
            "max_sequences": 64,
            "max_tokens_per_plan": 64,
            "max_model_len": 4096,
            "prefix_caching": False,
            "policy": POLICIES["fixed"],
        }
        | settings
    )


def simulate(arrivals, stage_times_s, timing=AT_ONCE, **settings) -> Report:
    scheduler = make_scheduler(len(stage_times_s), **settings)
    return Simulation(scheduler, stage_times_s, timing).run(arrivals)


def times(report):
    """(busy, waiting for input, host gap) of each stage."""
    return [(stage.busy_s, stage.wait_input_s, stage.host_gap_s) for stage in report.stages]


# ------------------------------------------------------------------------ one stage


def test_one_stage_takes_a_plan_for_each_token_and_one_past_the_stop():
    report = simulate([Arrival(0, 5, 10)], [constant(3)])
    # The prompt's plan draws the first token; the plan after the last was made ahead.
    assert (report.num_plans, report.num_sequence_steps) == (11, 11)
    assert (report.num_requests, report.num_prompt_tokens, report.num_output_tokens) == (1, 5, 10)
    assert report.makespan_s == 30
    assert report.ttft_s[50] == report.tpot_s[50] == report.max_gap_s[50] == 3
    assert times(report) == [(33, 0, 0)]
    assert report.bubbles == [0]
    assert report.output_tokens_per_s == 10 / 30


def test_a_stage_takes_what_its_cost_says():
    sizes = []

    def plan_time_s(num_decodes, num_prefill_tokens, num_context_tokens):
        sizes.append((num_decodes, num_prefill_tokens, num_context_tokens))
        return 10 * num_decodes + num_prefill_tokens + num_context_tokens / 1000

    report = simulate(
        [Arrival(0, 40, 2), Arrival(0, 30, 2)],
        [plan_time_s],
        max_in_flight=1,
        run_ahead=0,
    )
    # 64 tokens fit a plan: the first prompt and 24 of the second; then its row, and the rest.
    assert sizes == [(0, 64, 64), (1, 6, 41 + 30), (1, 0, 31)]
    first_s, second_s, third_s = 64.064, 16.071, 10.031
    assert report.ttft_s == pytest.approx(
        {50: first_s, 90: first_s + second_s, 99: first_s + second_s}
    )
    # The first answer has its two tokens one plan apart, the second as well.
    assert report.tpot_s == pytest.approx({50: third_s, 90: second_s, 99: second_s})
    assert report.makespan_s == pytest.approx(first_s + second_s + third_s)


@pytest.mark.parametrize(("run_ahead", "per_token_s"), [(0, 5 + 2 * 2 + 1), (1, 5)])
def test_run_ahead_takes_the_host_off_the_path_of_a_token(run_ahead, per_token_s):
    """Without it each token waits for messages there and back, and for the next plan."""
    timing = Timing(hop_s=0, latency_s=2, host_s=1)
    report = simulate(
        [Arrival(0, 1, 50)], [constant(5)], timing, run_ahead=run_ahead, max_in_flight=1 + run_ahead
    )
    assert report.ttft_s[50] == 1 + 2 + 5 + 2
    assert report.tpot_s[50] == per_token_s
    [(_, wait_input_s, host_gap_s)] = times(report)
    assert wait_input_s == 0
    num_plans = report.num_plans
    first_gap_s = 1 + 2
    assert host_gap_s == first_gap_s + (num_plans - 1) * (per_token_s - 5)


def test_a_slow_host_is_a_gap_at_every_stage():
    timing = Timing(hop_s=0, latency_s=0, host_s=7)
    report = simulate([Arrival(0, 1, 100)] * 4, [constant(2)] * 2, timing)
    plans = report.num_plans
    # A plan comes every 7 seconds, and goes through both stages. When it comes, the second one
    # has been free for 3 seconds, and waits for 2 more until its input is there.
    assert times(report)[0] == (2 * plans, 0, 7 + 5 * (plans - 1))
    assert times(report)[1] == (2 * plans, 2 * plans, 7 + 3 * (plans - 1))


# ------------------------------------------------------------------------ several stages


@pytest.mark.parametrize("num_stages", [2, 4, 8, 64])
def test_equal_stages_are_all_busy_but_for_filling_and_draining(num_stages):
    arrivals = [Arrival(0, 1, 100)] * num_stages
    report = simulate(arrivals, [constant(3)] * num_stages)
    plans = report.num_plans
    assert report.num_sequence_steps == plans  # a row each
    for index, stage in enumerate(times(report)):
        assert stage == (3 * plans, 3 * index, 0)
    # Plans leave one after the other; those past the stop come after the last token.
    assert report.makespan_s == 3 * (100 * num_stages + num_stages - 1)
    assert report.tpot_s[50] == 3 * num_stages


@pytest.mark.parametrize("num_stages", [2, 4, 8])
def test_one_plan_in_flight_is_one_stage_at_a_time(num_stages):
    arrivals = [Arrival(0, 1, 100)] * num_stages
    one = simulate(arrivals, [constant(3)] * num_stages, max_in_flight=1, run_ahead=0)
    assert one.num_plans == 100
    assert one.makespan_s == 100 * num_stages * 3
    assert one.bubbles == pytest.approx([1 - 1 / num_stages] * num_stages, abs=0.01)

    # As many plans in flight as stages do as many plans in that time, each with fewer rows.
    many = simulate(arrivals, [constant(3)] * num_stages)
    speedup = (many.num_plans / many.makespan_s) / (one.num_plans / one.makespan_s)
    assert speedup == pytest.approx(num_stages, rel=0.02)


@pytest.mark.parametrize("slowest", [0, 1, 2, 3])
def test_the_slowest_stage_sets_the_pace(slowest):
    stage_times_s = [2, 2, 2, 2]
    stage_times_s[slowest] = 5
    report = simulate([Arrival(0, 1, 100)] * 4, [constant(time_s) for time_s in stage_times_s])
    assert report.makespan_s == 5 * 400 + 3 * 2
    assert report.stages[slowest].bubble < 0.01
    for index, stage in enumerate(report.stages):
        if index != slowest:
            assert stage.bubble == pytest.approx(1 - 2 / 5, abs=0.01)


def test_a_lone_request_waits_for_its_token_to_go_around():
    report = simulate(
        [Arrival(0, 1, 50)], [constant(3)] * 4, Timing(hop_s=1, latency_s=5, host_s=0)
    )
    assert report.ttft_s[50] == 5 + 4 * 3 + 3 * 1 + 5
    assert report.tpot_s[50] == 4 * 3 + 4 * 1  # the fourth hop leads back to the first
    assert report.max_gap_s[99] == 16
    assert report.stages[0].bubble == pytest.approx(1 - 3 / 16, abs=0.01)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_the_times_of_a_stage_add_up(policy):
    """Busy, waiting and gap are all the time from the first arrival to its last plan's end."""
    rng = random.Random(0)
    arrivals = [Arrival(0, rng.randrange(1, 200), rng.randrange(1, 50)) for _ in range(60)]
    costs = [lambda d, p, c, k=k: 3 + d + p * k + c / 100 for k in (1, 2, 3)]
    scheduler = make_scheduler(3, policy=POLICIES[policy], plan_time_s=costs[2], num_blocks=300)
    simulation = Simulation(scheduler, costs, Timing(hop_s=0.5, latency_s=2, host_s=1))
    report = simulation.run(arrivals)
    for stage, part in zip(simulation._stages, report.stages, strict=True):
        total_s = part.busy_s + part.wait_input_s + part.host_gap_s
        assert total_s == pytest.approx(stage.free_s)
        assert part.bubble == pytest.approx(1 - part.busy_s / stage.free_s)
    assert report.num_output_tokens == sum(arrival.num_output_tokens for arrival in arrivals)
    assert report.num_prompt_tokens == sum(arrival.num_prompt_tokens for arrival in arrivals)


def test_idleness_is_no_bubble():
    one = simulate([Arrival(7, 4, 20)], [constant(3)] * 3)
    two = simulate([Arrival(7, 4, 20), Arrival(10_000, 4, 20)], [constant(3)] * 3)
    assert two.bubbles == one.bubbles
    assert times(two) == [tuple(2 * part for part in stage) for stage in times(one)]
    assert two.makespan_s == 10_000 - 7 + one.makespan_s
    assert two.ttft_s == one.ttft_s


# ------------------------------------------------------------------------ traces


def random_trace(num_requests, seed=1):
    rng = random.Random(seed)
    now_s, arrivals = 0.0, []
    for _ in range(num_requests):
        now_s += rng.expovariate(0.2)
        arrivals.append(Arrival(now_s, rng.randrange(1, 300), rng.randrange(1, 60)))
    return arrivals


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_the_same_trace_gives_the_same_report(policy):
    def run(num_requests):
        return simulate(
            random_trace(num_requests),
            [lambda d, p, c: 1 + d / 8 + p / 16] * 4,
            Timing(hop_s=0.01, latency_s=0.1, host_s=0.05),
            policy=POLICIES[policy],
            num_blocks=60,
        )

    assert run(80) == run(80)
    assert run(80) != run(79)
    assert run(80).num_preemptions > 0


@pytest.mark.parametrize(("run_ahead", "num_wasted"), [(0, 0), (1, 1), (2, 2)])
def test_rows_past_a_stop_are_steps_and_no_tokens(run_ahead, num_wasted):
    """The scheduler cannot know where an answer ends, and plans ahead as it would."""
    report = simulate([Arrival(0, 1, 20)], [constant(1)], run_ahead=run_ahead, max_in_flight=3)
    assert report.num_output_tokens == 20
    assert report.num_sequence_steps == 20 + num_wasted


def test_a_request_that_fills_the_cache_to_the_last_token_is_served():
    settings = {"num_blocks": 4, "block_size": 16}  # 64 tokens, and one that is never an input
    report = simulate([Arrival(0, 40, 25)], [constant(1)], **settings)
    assert (report.num_output_tokens, report.num_sequence_steps) == (25, 25)
    with pytest.raises(InvalidRequestError, match="66 tokens do not fit"):
        simulate([Arrival(0, 40, 26)], [constant(1)], **settings)


def test_an_answer_ends_where_the_context_does():
    report = simulate([Arrival(0, 40, 100)], [constant(1)], max_model_len=50)
    assert report.num_output_tokens == 10


def test_no_requests_are_a_report_of_nothing():
    report = simulate([], [constant(1)] * 2)
    assert (report.num_requests, report.makespan_s, report.output_tokens_per_s) == (0, 0, 0)
    assert report.bubbles == [0, 0]
    assert report.to_plain()["bubbles"] == [0, 0]


def test_percentiles_are_values_that_occurred():
    assert percentiles(range(1, 101)) == {50: 50, 90: 90, 99: 99}
    assert percentiles([3, 1, 2]) == {50: 2, 90: 3, 99: 3}
    assert percentiles([]) == {50: 0, 90: 0, 99: 0}
