"""PlanWatch: when a plan is overdue, by hand; who_is_late: never one that waits."""

import pytest

from ember_pp import protocol
from ember_pp.coordinator.plan import Plan
from ember_pp.coordinator.plan_watch import PlanWatch, who_is_late
from ember_pp.coordinator.stage_state import StageState

EPOCH = 4
STAGE_TIME_S = 0.5


def make_watch(plan_time_s=lambda *sizes: STAGE_TIME_S, min_s=5.0, num_stages=2):
    return PlanWatch(min_s=min_s, factor=20.0, num_stages=num_stages, plan_time_s=plan_time_s)


def settle(watch, took_s=1.0, num_plans=40):
    """Plans that come back in time, so that the prediction is known to hold; the time then."""
    now_s = 0.0
    for number in range(num_plans):
        watch.issue(Plan(number, 0, []), now_s)
        now_s += took_s
        watch.complete(now_s)
    return now_s


def test_with_nothing_in_flight_nothing_is_overdue():
    watch = make_watch()
    assert (watch.overdue_at_s, watch.oldest) == (None, None)
    now_s = settle(watch)
    assert (watch.overdue_at_s, watch.waited_s(now_s)) == (None, 0.0)


def test_the_limit_is_a_multiple_of_what_is_predicted():
    watch = make_watch()
    now_s = settle(watch)
    watch.issue(Plan(40, 0, []), now_s + 3.0)
    assert watch.oldest == 40
    assert watch.overdue_at_s == pytest.approx(now_s + 3.0 + 20 * 2 * STAGE_TIME_S)


def test_short_plans_have_the_least_time_there_is():
    watch = make_watch(lambda *sizes: 1e-3)
    now_s = settle(watch, took_s=2e-3)
    watch.issue(Plan(40, 0, []), now_s)
    assert watch.overdue_at_s == pytest.approx(now_s + 5.0)


def test_a_plan_that_waits_behind_others_begins_when_they_are_back():
    watch = make_watch()
    now_s = settle(watch)
    for number in range(3):
        watch.issue(Plan(number, 0, []), now_s)
    watch.complete(now_s + 8.0)
    assert watch.overdue_at_s >= now_s + 8.0 + 20.0
    assert watch.waited_s(now_s + 9.0) == pytest.approx(1.0)


def test_the_first_plan_may_take_ten_times_as_long():
    watch = make_watch()
    watch.issue(Plan(0, 0, []), 0.0)
    assert watch.overdue_at_s == pytest.approx(10 * 20 * 2 * STAGE_TIME_S)
    settle_at_s = settle(make_watch())
    watch = make_watch()
    assert settle(watch) == settle_at_s
    watch.forget()  # a new process builds kernels and captures graphs anew
    watch.issue(Plan(0, 0, []), settle_at_s)
    assert watch.overdue_at_s == pytest.approx(settle_at_s + 10 * 20 * 2 * STAGE_TIME_S)


def test_a_machine_that_is_slower_than_predicted_is_given_more():
    watch = make_watch()
    now_s = settle(watch, took_s=7.0)
    watch.issue(Plan(40, 0, []), now_s)
    assert watch.overdue_at_s == pytest.approx(now_s + 7.0 * 20)


def test_a_healthy_plan_of_30_s_is_left_alone_where_it_is_predicted():
    watch = make_watch(lambda *sizes: 0.75)
    now_s = settle(watch, took_s=1.5)
    watch.issue(Plan(40, 0, []), now_s)
    assert watch.overdue_at_s >= now_s + 30.0 - 1e-6


def test_without_a_prediction_tokens_count():
    watch = make_watch(plan_time_s=None, num_stages=1)
    rows = [None] * 100
    watch.issue(Plan(0, 0, [], decodes=rows), 0.0)
    watch.complete(50.0)  # half a second a token: a slow machine
    watch.issue(Plan(1, 0, [], decodes=rows[:10]), 50.0)
    assert watch.overdue_at_s >= 50.0 + 20 * 10 * 0.5


def stage(index, finished, waiting_for="", epoch=EPOCH):
    state = StageState(index, 0, 1, "cpu", "", None, 0.0)
    times = dict.fromkeys(("busy", "wait_input", "wait_output", "host_gap", "idle"), 0)
    state.stats = protocol.StageStats(
        epoch=epoch,
        stage_index=index,
        plan=finished,
        **{f"{name}_ns": value for name, value in times.items()},
        waiting_for=waiting_for,
        peak_bytes=0,
    )
    return state


def test_the_first_that_has_not_finished_is_to_blame():
    stages = [stage(0, 7), stage(1, 6), stage(2, 6, "plan 7: stage 1 to write slot 1")]
    assert who_is_late(stages, EPOCH, 7) is stages[1]


def test_one_that_waits_is_never_to_blame():
    stages = [stage(0, 7), stage(1, 6, "plan 7: stage 0 to write slot 1"), stage(2, 6)]
    assert who_is_late(stages, EPOCH, 7) is None


def test_when_all_have_finished_nobody_is_to_blame():
    assert who_is_late([stage(0, 9), stage(1, 7)], EPOCH, 7) is None


def test_what_was_told_in_another_epoch_does_not_count():
    stages = [stage(0, 99, epoch=EPOCH - 1), stage(1, 3)]
    assert who_is_late(stages, EPOCH, 0) is stages[0]
    stages = [stage(0, 0, "plan 0: stage 1", epoch=EPOCH - 1), stage(1, 3)]
    assert who_is_late(stages, EPOCH, 1) is stages[0]


def test_a_stage_that_has_told_nothing_has_finished_nothing():
    silent = StageState(0, 0, 1, "cpu", "", None, 0.0)
    assert who_is_late([silent, stage(1, 3)], EPOCH, 0) is silent
