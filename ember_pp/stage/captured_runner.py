"""Runs plans as captured steps: enqueued whole, the host free before the device is done.

The order of a plan is that of ``runner.py``. With a single stage nothing waits for the device:
what a plan draws is where the next plan reads it, and the tokens for the coordinator come to the
host behind them. Between stages the host still waits where the hand-off does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ember_pp.protocol import Execute, Sampled
from ember_pp.stage.captured import CapturedSteps, Step
from ember_pp.stage.last_tokens import LastTokens
from ember_pp.stage.plan_memory import TokenReader
from ember_pp.stage.runner import HiddenStatesSink, HiddenStatesSource, StartedPlan
from ember_pp.stage.sampler import SampledTokens, Sampler
from ember_pp.stage.slots import Slots
from ember_pp.stage.tap import Tap


class CapturedRunner:
    """Runs plans on one stage, in order.

    Args:
        stage_index: names the files of a tap.
        steps: the stage's layers, head and sampling.
        slots: blocks and rosters.
        source, sink, sampler, last_tokens, feedback: as in ``runner.StageRunner``.
    """

    def __init__(
        self,
        stage_index: int,
        steps: CapturedSteps,
        slots: Slots,
        *,
        source: HiddenStatesSource | None,
        sink: HiddenStatesSink | None,
        sampler: Sampler | None,
        last_tokens: LastTokens | None,
        feedback: HiddenStatesSink | None,
    ) -> None:
        assert (sink is None) != (sampler is None), "the last stage samples, the others hand on"
        assert (source is None) != (last_tokens is None), "the first stage embeds tokens"
        assert (feedback is None) == (sampler is None or source is None), "last to first"
        self._stage_index = stage_index
        self._steps = steps
        self._slots = slots
        self._source = source
        self._sink = sink
        self._sampler = sampler
        self._last_tokens = last_tokens
        self._feedback = feedback
        self._reader = None if sampler is None else TokenReader(steps.state)

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
        rows = self._slots.apply(execute)
        if self._sampler is not None:
            for opened in execute.open:
                self._sampler.open(opened)
        if self._last_tokens is not None:
            self._last_tokens.await_feedback(execute, rows.num_decodes)
            if self._sampler is None:
                self._last_tokens.expect(
                    execute.plan, torch.tensor(rows.sample_slots, dtype=torch.int64)
                )
        step = self._steps.begin(execute.plan, rows)
        tap = Tap.of(execute, self._stage_index)
        self._receive(execute.plan, step, tap)
        if self._sampler is not None:
            return self._draw(execute, step, tap)
        hidden_states = self._steps.hidden_states(step, None if tap is None else tap.keep_layer)
        assert self._sink is not None, "a stage that is not the last hands on"
        self._sink.send(execute.plan, hidden_states)
        if tap is not None:
            tap.write()
        return StartedPlan(lambda: True, lambda: None)

    def _receive(self, plan: int, step: Step, tap: Tap | None) -> None:
        if self._source is None:
            return
        received = self._source.receive(plan, step.rows.num_tokens)
        if tap is not None:
            tap.keep("input", received)
        self._steps.receive(received)
        self._source.release(plan)

    def _draw(self, execute: Execute, step: Step, tap: Tap | None) -> StartedPlan:
        token_ids, sampled = self._steps.draw(
            step,
            None if tap is None else tap.keep_layer,
            None if tap is None else lambda logits: tap.keep("logits", logits.float()),
        )
        self._feed_back(execute.plan, token_ids)
        if tap is not None:
            if len(token_ids):
                tap.keep("token_ids", token_ids.long())
            tap.write()
        assert self._reader is not None, "the last stage reads tokens"
        pending = self._reader.pending(execute.plan, len(token_ids))

        def finish() -> Sampled:
            return _answer(execute, pending.read(), sampled)

        return StartedPlan(pending.poll, finish)

    def _feed_back(self, plan: int, token_ids: Tensor) -> None:
        """With several stages: a single one has put them where the next plan reads them."""
        if self._feedback is not None:
            self._feedback.send(plan, token_ids.clamp(min=0)[:, None])


def _answer(execute: Execute, token_ids: bytes, sampled: SampledTokens | None) -> Sampled:
    logprobs = [] if sampled is None else sampled.logprobs
    return Sampled(execute.epoch, execute.plan, token_ids, logprobs)
