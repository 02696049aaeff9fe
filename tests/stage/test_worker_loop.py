"""StageWorker's loop while a device is at work: what ends is posted, in order and at once."""

import threading
import time
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
import torch

from ember_pp import protocol
from ember_pp.errors import ProtocolError
from ember_pp.stage.runner import CountedPlan, DeviceWait, StartedPlan
from ember_pp.stage.timing import PlanTimes
from ember_pp.stage.worker import StageWorker

EPOCH, DEADLINE_S = 3, 60.0


def execute(plan):
    nothing = dict.fromkeys(("leave", "blocks", "join", "chunks", "chunk_ids"), b"")
    fields = {"microbatch": 0, "open": [], "feedback": plan - 1, "after_idle": False, "tap": None}
    return protocol.Execute(epoch=EPOCH, plan=plan, **fields, **nothing)


class Device:
    """A runner whose plans are at work until the test says that they are done."""

    is_timed_by_device = is_timing = False
    wait = None

    def __init__(self):
        self.num_started = 0
        self.num_done = 0
        self.counted = []
        self.has_failed = False

    def start(self, execute):
        self.num_started += 1

        def is_done():
            if self.has_failed:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return execute.plan < self.num_done

        return StartedPlan(is_done, lambda: protocol.Sampled(EPOCH, execute.plan, b"", []))

    def take_times(self):
        counted, self.counted = self.counted, []
        return counted


class Stage:
    """A worker that has loaded and started, beside its device."""

    def __init__(self):
        self.posted = []
        self.device = Device()
        self.worker = StageWorker(0, self.posted.append)
        self.worker._epoch = EPOCH
        self.worker._slice = SimpleNamespace(
            device=torch.device("cpu"), step_advice=lambda plan: ""
        )
        self.worker._runner = self.device
        self.wrong = None
        self.worker._edges = SimpleNamespace(
            waiting_for="",
            close=lambda: None,
            check=self.check,
            describe=lambda plan, since_ns, is_for_input: f"{plan} {since_ns} {is_for_input}",
        )

    def check(self):
        if self.wrong is not None:
            raise self.wrong

    def loop_over(self, *plans):
        """The loop in a thread, and its inbox, in which nothing follows ``plans``."""
        inbox = SimpleQueue()
        for plan in plans:
            inbox.put(execute(plan))
        thread = threading.Thread(target=self.worker.run, args=(inbox,), daemon=True)
        thread.start()
        wait_until(lambda: self.device.num_started == len(plans))
        return thread, inbox


def wait_until(condition):
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.001)


@pytest.fixture
def stage():
    return Stage()


def test_plans_are_started_before_those_ahead_of_them_are_done(stage):
    for plan in range(3):
        stage.worker.handle(execute(plan))
    assert (stage.device.num_started, stage.posted) == (3, [])
    stage.device.num_done = 2
    stage.worker.handle(execute(3))
    assert [sampled.plan for sampled in stage.posted] == [0, 1]
    assert stage.worker.stats().plan == 1, "the last that is done, not the last that was started"


def test_the_end_of_a_plan_needs_no_message_to_be_noticed(stage):
    thread, inbox = stage.loop_over(0, 1)
    assert stage.posted == []
    stage.device.num_done = 2
    wait_until(lambda: len(stage.posted) == 2)
    inbox.put(None)
    thread.join(DEADLINE_S)
    assert [sampled.plan for sampled in stage.posted] == [0, 1]


def test_a_stage_told_to_end_does_not_wait_for_its_device(stage):
    thread, inbox = stage.loop_over(0)
    inbox.put(None)
    thread.join(DEADLINE_S)
    assert not thread.is_alive()
    assert stage.posted == []


def test_a_failed_device_ends_the_stage_by_the_plan_that_it_was_at(stage):
    thread, _ = stage.loop_over(0, 1, 2)
    stage.device.num_done = 1
    wait_until(lambda: len(stage.posted) == 1)
    stage.device.has_failed = True
    thread.join(DEADLINE_S)
    _, failed = stage.posted
    assert (failed.plan, failed.remote_type) == (1, "RuntimeError")
    assert "illegal memory access" in failed.text


def test_looking_for_the_end_of_a_plan_takes_a_part_of_a_core(stage):
    thread, inbox = stage.loop_over(0)
    before_s = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before_s < 0.15
    inbox.put(None)
    thread.join(DEADLINE_S)


def test_with_nothing_at_work_the_loop_sleeps(stage):
    thread, inbox = stage.loop_over(0)
    stage.device.num_done = 1
    wait_until(lambda: len(stage.posted) == 1)
    time.sleep(0.02)
    before_s = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - before_s < 0.01
    inbox.put(None)
    thread.join(DEADLINE_S)


# ------------------------------------------------------------------------------------
# a device that times its plans


@pytest.fixture
def timed(stage):
    stage.device.is_timed_by_device = True
    offset = SimpleNamespace(ns=1_000_000_000_000_000_000)  # a card's clock is far from a host's
    stage.worker._card_clock = SimpleNamespace(sample=lambda: None, offset=offset)
    stage.worker._clock._since_ns = offset.ns
    return stage


def test_what_the_device_says_is_counted_in_place_of_what_the_host_sees(timed):
    times = PlanTimes(0, 0, 10_000, 20_000, 50_000, 150_000, 155_000, 160_000)
    timed.device.counted.append(CountedPlan(0, True, times))
    timed.device.num_done = 1
    timed.worker.handle(execute(0))
    stats = timed.worker.stats()
    assert (stats.idle_ns, stats.wait_input_ns, stats.wait_output_ns) == (10_000, 30_000, 5_000)
    assert (stats.busy_ns, stats.host_gap_ns) == (115_000, 0)


def test_the_loop_goes_on_until_the_last_plan_is_counted(timed):
    timed.device.is_timing = True
    thread, inbox = timed.loop_over(0)
    timed.device.num_done = 1
    wait_until(lambda: len(timed.posted) == 1)
    timed.device.counted.append(CountedPlan(0, True, PlanTimes(0, 0, 1, 0, 0, 0, 0, 7_000)))
    wait_until(lambda: timed.worker.stats().busy_ns == 6_999)
    timed.device.is_timing = False
    inbox.put(None)
    thread.join(DEADLINE_S)
    assert not thread.is_alive()


def test_what_the_device_waits_for_is_told_by_the_hosts_clock(timed):
    timed.device.wait = DeviceWait(7, True, 50)
    assert timed.worker.stats().waiting_for == f"7 {1_000_000_000_000_000_050} True"


def test_what_the_device_received_wrong_ends_the_stage_by_its_plan(stage):
    thread, _ = stage.loop_over(0, 1)
    stage.wrong = ProtocolError("edge 0->1: slot 1 holds plan 7")
    stage.device.num_done = 1
    thread.join(DEADLINE_S)
    [failed] = stage.posted
    assert (failed.plan, failed.text) == (0, "edge 0->1: slot 1 holds plan 7")
