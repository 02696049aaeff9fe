"""Runs plans as captured steps: enqueued whole, the host free before the device is done.

The order of a plan is that of ``runner.py``. With a single stage nothing waits for the device:
what a plan draws is where the next plan reads it, and the tokens for the coordinator come to the
host behind them. Between stages nothing does either, where the edges wait on the device: a plan is
done when the device says so, in its record. Where an edge waits on the host, so does this.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque

import torch
from torch import Tensor

from ember_pp.protocol import Execute, Sampled
from ember_pp.stage.captured import CapturedSteps, Step
from ember_pp.stage.last_tokens import LastTokens
from ember_pp.stage.plan_memory import PlanRecords, TokenReader
from ember_pp.stage.runner import (
    CountedPlan,
    DeviceWait,
    HiddenStatesSink,
    HiddenStatesSource,
    StartedPlan,
)
from ember_pp.stage.sampler import SampledTokens, Sampler
from ember_pp.stage.slots import Slots
from ember_pp.stage.tap import Tap

_POLL_S = 20e-6


class CapturedRunner:
    """Runs plans on one stage, in order.

    Args:
        stage_index: names the files of a tap.
        steps: the stage's layers, head and sampling.
        slots: blocks and rosters.
        sampler, last_tokens: as in ``runner.StageRunner``.
    """

    def __init__(
        self,
        stage_index: int,
        steps: CapturedSteps,
        slots: Slots,
        *,
        sampler: Sampler | None,
        last_tokens: LastTokens | None,
    ) -> None:
        self._stage_index = stage_index
        self._steps = steps
        self._slots = slots
        self._sampler = sampler
        self._last_tokens = last_tokens
        self._receiver: HiddenStatesSource | None = None
        self._sender: HiddenStatesSink | None = None
        self._reader = None if sampler is None else TokenReader(steps.state)
        self._records = PlanRecords(steps.state.records)
        self._pending: deque[_Pending] = deque()
        """Plans that the device times, in order, which have not been counted."""
        self._counted: list[CountedPlan] = []

    def connect(self, receiver: HiddenStatesSource | None, sender: HiddenStatesSink | None) -> None:
        """As ``runner.StageRunner.connect``."""
        self._receiver, self._sender = receiver, sender
        if self._last_tokens is not None:
            self._last_tokens.connect(receiver)
        self._pending.clear()
        self._counted.clear()
        self._steps.state.results.zero_()  # marks of plans that may come again

    @property
    def is_timed_by_device(self) -> bool:
        """Whether both ends wait on the device, so that it alone knows where the time goes."""
        ends = self._receiver, self._sender
        return all(end is not None and end.waits_on_device for end in ends)

    @property
    def is_capturing(self) -> bool:
        """True while a graph is made. Any thread."""
        return self._steps.is_capturing

    def warm_up(self) -> None:
        """Before the first plan: see ``CapturedSteps.warm_up``."""
        self._steps.warm_up()

    def run(self, execute: Execute) -> Sampled | None:
        """Execute one plan; on the last stage, the tokens that it drew.

        Raises: as ``start``.
        """
        return self.start(execute).finish()

    @torch.inference_mode()
    def start(self, execute: Execute) -> StartedPlan:
        """Enqueue one plan.

        Raises:
            ProtocolError: the plan does not fit the ones before it.
            HandoffError: an edge was closed.
        """
        self._open_record(execute.plan)
        rows = self._slots.apply(execute)
        if self._sampler is not None:
            for opened in execute.open:
                self._sampler.open(opened)
        due = []
        if self._last_tokens is not None:
            due = self._last_tokens.due(execute, rows.num_decodes)
            self._last_tokens.expect(execute.plan, len(rows.sample_slots))
        pending = _Pending(execute.plan, execute.after_idle, due[-1][0] if due else -1)
        if self._sender is not None and self._sender.waits_on_device:
            self._pending.append(pending)
        if self._last_tokens is not None:
            ready_at, at = self._addresses(execute.plan, "feedback_wait", "feedback_there")
            self._last_tokens.take(due, ready_at=ready_at, at=at)
        step = self._steps.begin(execute.plan, rows)
        tap = Tap.of(execute, self._stage_index)
        if self._last_tokens is None:
            self._receive(execute.plan, step, tap)
        if self._sampler is not None:
            return self._draw(execute, step, tap)
        hidden_states = self._steps.hidden_states(step, None if tap is None else tap.keep_layer)
        self._send(execute.plan, hidden_states)
        if tap is not None:
            tap.write()
        if pending not in self._pending:
            return StartedPlan(lambda: True, lambda: None)  # sent by the host, which has waited
        return StartedPlan(lambda: self._has_ended(pending), lambda: None)

    def _open_record(self, plan: int) -> None:
        """Take the row of an earlier plan, which is done, or about to be."""
        while self._pending and self._pending[0].plan <= plan - self._records.max_pending:
            self._count_done()
            time.sleep(_POLL_S)
        self._records.open(plan)

    def _addresses(self, plan: int, *words: str) -> list[int]:
        return [self._records.address(plan, word) for word in words]

    def _receive(self, plan: int, step: Step, tap: Tap | None) -> None:
        assert self._receiver is not None, "not connected"
        received = self._steps.received(step.rows.num_tokens)
        [at] = self._addresses(plan, "input_there")
        self._receiver.receive_into(plan, received, at=at)
        if tap is not None:
            tap.keep("input", received)

    def _send(self, plan: int, message: Tensor) -> None:
        assert self._sender is not None, "not connected"
        [at] = self._addresses(plan, "output_there")
        self._sender.send(plan, message, at=at)

    def _draw(self, execute: Execute, step: Step, tap: Tap | None) -> StartedPlan:
        token_ids, sampled = self._steps.draw(
            step,
            None if tap is None else tap.keep_layer,
            None if tap is None else lambda logits: tap.keep("logits", logits.float()),
        )
        if self._sender is not None:  # a single stage has put them where the next plan reads them
            self._send(execute.plan, self._steps.state.feedback[: len(token_ids)])
        if tap is not None:
            if len(token_ids):
                tap.keep("token_ids", token_ids.long())
            tap.write()
        assert self._reader is not None, "the last stage reads tokens"
        pending = self._reader.pending(execute.plan, len(token_ids))

        def finish() -> Sampled:
            return _answer(execute, pending.read(), sampled)

        return StartedPlan(pending.poll, finish)

    @property
    def is_timing(self) -> bool:
        """Whether ``take_times`` will return more."""
        return bool(self._pending)

    def take_times(self) -> list[CountedPlan]:
        """Plans that the device has timed and is done with, since the last call, in order.

        Raises:
            RuntimeError: the device has failed.
        """
        self._count_done()
        counted, self._counted = self._counted, []
        return counted

    def _count_done(self) -> None:
        while self._pending and self._records.is_done(self._pending[0].plan):
            pending = self._pending.popleft()
            pending.has_ended = True
            if self.is_timed_by_device:
                times = self._records.read(pending.plan)
                self._counted.append(CountedPlan(pending.plan, pending.after_idle, times))

    def _has_ended(self, pending: _Pending) -> bool:
        self._count_done()
        return pending.has_ended

    @property
    def wait(self) -> DeviceWait | None:
        """The wait that the device is at, if any. Any thread."""
        try:
            pending = self._pending[0]
        except IndexError:
            return None
        awaited, is_for_input = pending.plan, True
        times = self._records.read(pending.plan)
        if times.output_wait:
            since_ns, until_ns, is_for_input = times.output_wait, times.output_there, False
        elif self._last_tokens is None:
            since_ns, until_ns = times.input_wait, times.input_there
        else:
            since_ns, until_ns = times.feedback_wait, times.feedback_there
            awaited = pending.feedback_plan
        if until_ns or not since_ns:
            return None
        return DeviceWait(awaited, is_for_input, since_ns)


@dataclasses.dataclass(slots=True, eq=False)
class _Pending:
    """A plan that is enqueued to its end."""

    plan: int
    after_idle: bool
    feedback_plan: int
    """The last whose feedback it takes; -1: none."""
    has_ended: bool = False


def _answer(execute: Execute, token_ids: bytes, sampled: SampledTokens | None) -> Sampled:
    logprobs = [] if sampled is None else sampled.logprobs
    return Sampled(execute.epoch, execute.plan, token_ids, logprobs)
