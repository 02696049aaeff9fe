"""CapturedRunner: what goes to whom, and when a plan is done. The steps are faked."""

from __future__ import annotations

import dataclasses
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

    def receive(self, hidden_states: torch.Tensor) -> None:
        """Nothing is computed."""

    def draw(self, step: Step, on_layer: Any, on_logits: Any) -> tuple[torch.Tensor, None]:
        return self.tokens, None

    def hidden_states(self, step: Step, on_layer: Any) -> torch.Tensor:
        return torch.zeros(step.rows.num_tokens, 3)

    def finish(self) -> None:
        """The device writes tokens and mark."""
        row = self.state.results[self.plan % 3]
        row[2 : 2 + len(self.tokens)] = self.tokens
        row[:2].view(torch.int64)[0] = self.plan + 1


@dataclasses.dataclass
class Edge:
    """Both ends of an edge: keeps what is sent, gives zeros."""

    sent: list[tuple[int, list[Any]]] = dataclasses.field(default_factory=list)

    def send(self, plan: int, hidden_states: torch.Tensor) -> None:
        self.sent.append((plan, hidden_states.tolist()))

    def receive(self, plan: int, num_tokens: int) -> torch.Tensor:
        return torch.zeros(num_tokens, 1, dtype=torch.int32)

    def release(self, plan: int) -> None:
        """Nothing to give back."""


def make_runner(steps: FakeSteps, *, is_first: bool, is_last: bool) -> tuple[CapturedRunner, Edge]:
    feedback, several = Edge(), not (is_first and is_last)
    last_tokens = None
    if is_first:
        source = Edge() if several else None
        last_tokens = LastTokens(MAX_SLOTS, CPU, source=source, max_in_flight=2)
    runner = CapturedRunner(
        0,
        steps,
        Slots(MAX_SLOTS, 4, 16),
        source=None if is_first else Edge(),
        sink=None if is_last else Edge(),
        sampler=Sampler(100, MAX_SLOTS, (), CPU) if is_last else None,
        last_tokens=last_tokens,
        feedback=feedback if is_last and several else None,
    )
    return runner, feedback


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
    runner, _ = make_runner(steps, is_first=is_first, is_last=True)
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
    runner, feedback = make_runner(steps, is_first=False, is_last=True)
    started = runner.start(make_execute(0))
    steps.finish()
    sampled = started.finish()
    assert sampled is not None
    assert list(unpack_i32(sampled.token_ids)) == [NO_TOKEN]
    assert feedback.sent == [(0, [[0]])]


def test_a_single_stage_expects_no_feedback() -> None:
    """It puts its tokens where the next plan reads them: nothing adds up."""
    steps = FakeSteps([1])
    runner, feedback = make_runner(steps, is_first=True, is_last=True)
    for plan in range(6):
        started = runner.start(make_execute(plan))
        steps.finish()
        started.finish()
    assert runner._last_tokens is not None
    assert not runner._last_tokens._expected
    assert feedback.sent == []


def test_the_first_of_several_expects_what_the_last_will_draw() -> None:
    runner, _ = make_runner(FakeSteps([]), is_first=True, is_last=False)
    started = runner.start(make_execute(0))
    assert started.is_done()
    assert started.finish() is None
    assert runner._last_tokens is not None
    [(plan, slots)] = runner._last_tokens._expected
    assert (plan, slots.tolist()) == (0, [0])
