"""CapturedRunner: what goes to whom, and when a plan is done. The steps are faked."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import pytest
import torch

from ember_pp.kernels import StepState
from ember_pp.kernels.sampling import NO_TOKEN
from ember_pp.protocol import Execute, OpenSlot, pack_i32, pack_u32, unpack_i32
from ember_pp.stage.captured import Step
from ember_pp.stage.captured_runner import CapturedRunner
from ember_pp.stage.last_tokens import LastTokens
from ember_pp.stage.sampler import Sampler
from ember_pp.stage.slots import PlanRows, Slots
from ember_pp.stage.step_shape import StepShape
from ember_pp.stage.timing import PlanTimes

CPU = torch.device("cpu")
MAX_SLOTS = 4


class FakeSteps:
    """Draws what the test says; the device is done when the test says so."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = torch.tensor(tokens, dtype=torch.int32)
        self.plan = -1
        self.state = StepState.allocate(
            max_tokens=8,
            max_rows=MAX_SLOTS,
            max_slots=MAX_SLOTS,
            max_blocks_per_sequence=4,
            block_size=16,
            max_pending=3,
            last_tokens=None,
            device=CPU,
        )

    def begin(self, plan: int, rows: PlanRows) -> Step:
        self.plan = plan
        return Step(rows, StepShape(True, 1, 1, 1))

    def received(self, num_tokens: int) -> torch.Tensor:
        """Nothing is computed."""
        return torch.zeros(num_tokens, 3)

    def draw(self, step: Step, on_layer: Any, on_logits: Any) -> tuple[torch.Tensor, None]:
        return self.tokens, None

    def hidden_states(self, step: Step, on_layer: Any) -> torch.Tensor:
        return torch.zeros(step.rows.num_tokens, 3)

    def finish(self) -> None:
        """The device writes tokens and mark."""
        row = self.state.results[self.plan % 3]
        row[2 : 2 + len(self.tokens)] = self.tokens
        self.state.records[self.plan % 3] = torch.arange(10, 18) + 100 * self.plan
        row[:2].view(torch.int64)[0] = self.plan + 1


@dataclasses.dataclass
class Edge:
    """Both ends of an edge: keeps what is sent, gives zeros."""

    waits_on_device: bool = False
    sent: list[tuple[int, list[Any]]] = dataclasses.field(default_factory=list)
    times: list[tuple[int, ...]] = dataclasses.field(default_factory=list)

    def send(self, plan: int, hidden_states: torch.Tensor, *, at: int = 0) -> None:
        self.sent.append((plan, hidden_states.tolist()))
        self.times.append((plan, at))

    def receive_into(self, plan: int, output: torch.Tensor, *, at: int = 0) -> None:
        output.zero_()
        self.times.append((plan, at))

    def receive_pairs(
        self, plan: int, num_pairs: int, target: torch.Tensor, *, ready_at: int = 0, at: int = 0
    ) -> None:
        self.times.append((plan, ready_at, at))


def make_runner(
    steps: FakeSteps, *, is_first: bool, is_last: bool, waits_on_device: bool = False
) -> tuple[CapturedRunner, Edge, Edge]:
    """A runner, its receiver and its sender; a single stage does not have them."""
    receiver, sender = Edge(waits_on_device), Edge(waits_on_device)
    runner = CapturedRunner(
        0,
        steps,
        Slots(MAX_SLOTS, 4, 16),
        sampler=Sampler(100, MAX_SLOTS, (), CPU) if is_last else None,
        last_tokens=LastTokens(MAX_SLOTS, CPU, max_in_flight=2) if is_first else None,
    )
    if not (is_first and is_last):
        runner.connect(receiver, sender)
    return runner, receiver, sender


def make_execute(plan: int) -> Execute:
    """A fresh chunk of slot ``plan % MAX_SLOTS``."""
    slot = plan % MAX_SLOTS
    return Execute(
        epoch=2,
        plan=plan,
        microbatch=0,
        leave=b"",
        open=[OpenSlot(slot, 0, {"temperature": 0.0}, 3, 0, b"", b"")],
        blocks=pack_u32([slot, 1]),
        join=b"",
        chunks=pack_u32([slot, 0, 3, 1]),
        chunk_ids=pack_i32([5, 6, 7]),
        feedback=-1,
        after_idle=False,
        tap=None,
    )


@pytest.mark.parametrize("is_first", [True, False], ids=["one-stage", "last-of-several"])
def test_a_plan_is_done_when_its_mark_is_there(is_first: bool) -> None:
    steps = FakeSteps([42])
    runner, _, _ = make_runner(steps, is_first=is_first, is_last=True)
    started = runner.start(make_execute(0))
    assert not started.is_done()
    steps.finish()
    assert started.is_done()
    sampled = started.finish()
    assert sampled is not None
    assert (sampled.epoch, sampled.plan, sampled.logprobs) == (2, 0, [])
    assert list(unpack_i32(sampled.token_ids)) == [42]


def test_a_row_without_a_token_is_told_to_the_host_alone() -> None:
    """Stage 0 gets some token in its place, which its embedding has."""
    steps = FakeSteps([NO_TOKEN])
    runner, _, feedback = make_runner(steps, is_first=False, is_last=True)
    started = runner.start(make_execute(0))
    steps.finish()
    sampled = started.finish()
    assert sampled is not None
    assert list(unpack_i32(sampled.token_ids)) == [NO_TOKEN]
    [(plan, [pair])] = feedback.sent
    assert plan == 0
    assert pair == [0, 0], "slot and token"


def test_a_single_stage_expects_no_feedback() -> None:
    """It puts its tokens where the next plan reads them: nothing adds up."""
    steps = FakeSteps([1])
    runner, _, feedback = make_runner(steps, is_first=True, is_last=True)
    for plan in range(6):
        started = runner.start(make_execute(plan))
        steps.finish()
        started.finish()
    assert runner._last_tokens is not None
    assert not runner._last_tokens._expected
    assert feedback.sent == []


def test_the_first_of_several_expects_what_the_last_will_draw() -> None:
    runner, _, _ = make_runner(FakeSteps([]), is_first=True, is_last=False)
    started = runner.start(make_execute(0))
    assert started.is_done(), "the host has sent"
    assert started.finish() is None
    assert runner._last_tokens is not None
    assert list(runner._last_tokens._expected) == [(0, 1)]


# ------------------------------------------------------------------------------------
# edges that wait on the device


def of_device(steps: FakeSteps, *, is_first: bool, is_last: bool) -> tuple[Any, Edge, Edge]:
    return make_runner(steps, is_first=is_first, is_last=is_last, waits_on_device=True)


def record_of(steps: FakeSteps, plan: int, **times: int) -> None:
    """The device writes words of a plan's record."""
    for name, value in times.items():
        steps.state.records[plan % 3, PlanTimes._fields.index(name)] = value


@pytest.mark.parametrize("is_first", [True, False], ids=["first", "middle"])
def test_a_plan_that_is_handed_on_by_the_device_is_done_when_it_says_so(is_first: bool) -> None:
    steps = FakeSteps([])
    runner, _, sender = of_device(steps, is_first=is_first, is_last=False)
    first, second = (runner.start(make_execute(plan)) for plan in range(2))
    assert [plan for plan, _ in sender.sent] == [0, 1], "enqueued both"
    assert not first.is_done()
    record_of(steps, 1, done=1)
    assert not second.is_done(), "plans end in their order"
    record_of(steps, 0, done=1)
    assert first.is_done()
    assert second.is_done()
    assert first.finish() is None


def test_times_go_into_the_record_of_their_plan_and_are_taken_once() -> None:
    steps = FakeSteps([])
    runner, receiver, sender = of_device(steps, is_first=False, is_last=False)
    assert runner.is_timed_by_device
    base = steps.state.records.data_ptr()
    for plan in range(3):
        runner.start(dataclasses.replace(make_execute(plan), after_idle=plan == 0))
        row = base + 64 * plan
        assert receiver.times[-1] == (plan, row + 8 * PlanTimes._fields.index("input_there"))
        assert sender.times[-1] == (plan, row + 8 * PlanTimes._fields.index("output_there"))
    assert runner.is_timing
    assert runner.take_times() == []
    for plan in range(2):
        steps.state.records[plan] = torch.arange(10, 18) + 100 * plan
    counted = runner.take_times()
    assert [(c.plan, c.after_idle) for c in counted] == [(0, True), (1, False)]
    assert counted[1].times == PlanTimes(*range(110, 118))
    assert runner.take_times() == []


def test_a_record_is_read_before_another_plan_has_it() -> None:
    steps = FakeSteps([])
    runner, _, _ = of_device(steps, is_first=False, is_last=False)
    for plan in range(3):
        runner.start(make_execute(plan))
    done = threading.Timer(0.05, lambda: record_of(steps, 0, began=7, done=9))
    done.start()
    runner.start(make_execute(3))
    done.join()
    [counted] = runner.take_times()
    assert (counted.plan, counted.times.began, counted.times.done) == (0, 7, 9)
    assert not steps.state.records[0].any(), "fresh for plan 3"


def test_new_edges_forget_what_was_in_flight() -> None:
    """The plans of another epoch have the same numbers."""
    steps = FakeSteps([42])
    runner, _, _ = of_device(steps, is_first=False, is_last=True)
    runner.start(make_execute(0))
    steps.finish()
    record_of(steps, 0, done=9)
    runner.connect(Edge(waits_on_device=True), Edge(waits_on_device=True))
    assert runner.take_times() == []
    assert not runner.is_timing
    assert not runner.start(make_execute(0)).is_done()


@pytest.mark.parametrize(
    ("is_first", "times", "expected"),
    [
        (False, {"began": 1}, None),
        (False, {"began": 1, "input_wait": 2}, (0, True, 2)),
        (False, {"input_wait": 2, "input_there": 3}, None),
        (False, {"input_wait": 2, "input_there": 3, "output_wait": 4}, (0, False, 4)),
        (False, {"output_wait": 4, "output_there": 5}, None),
        (True, {"began": 1, "input_wait": 2}, None),
    ],
)
def test_the_record_says_what_the_device_waits_for(
    is_first: bool, times: dict[str, int], expected: tuple[int, bool, int] | None
) -> None:
    steps = FakeSteps([])
    runner, _, _ = of_device(steps, is_first=is_first, is_last=False)
    assert runner.wait is None
    runner.start(make_execute(0))
    record_of(steps, 0, **times)
    assert runner.wait == expected


def test_a_wait_for_feedback_names_the_plan_that_is_to_draw_it() -> None:
    steps = FakeSteps([])
    runner, receiver, _ = of_device(steps, is_first=True, is_last=False)
    for plan in range(2):
        runner.start(make_execute(plan))
        record_of(steps, plan, began=1, done=1)
    runner.start(make_execute(2))  # takes the feedback of plan 0: two are in flight
    row = steps.state.records.data_ptr() + 2 * 64
    assert receiver.times == [(0, row, row + 8)]
    record_of(steps, 2, feedback_wait=6)
    runner.take_times()
    assert runner.wait == (0, True, 6)
    record_of(steps, 2, feedback_there=7)
    assert runner.wait is None
