"""Computes one micro-batch: inputs, forward, hand-off or sampling. Knows no sockets.

The order of a plan on a stage: take in the slot changes and prepare all that does not depend on
the input; wait for the hidden states of the previous stage (on the first: for the tokens of the
decode rows); run the layers; then hand the result to the next stage, or draw tokens on the last
one, which sends them to the first. What comes after that (giving the ring slot back, telling the
coordinator) delays nobody. The ends of the edges count their waits themselves (``timing.py``).

``StageRunner`` computes tensor by tensor, as torch does: on CPUs, and where a model has no
kernels. ``captured_runner.py`` enqueues whole steps without waiting for the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ember_pp.protocol import Execute, Sampled, pack_i32
from ember_pp.stage.input_batch import BatchInputs, SlotTable
from ember_pp.stage.kv_cache import KVCache
from ember_pp.stage.last_tokens import LastTokens
from ember_pp.stage.model import PreparedStep, StageModel
from ember_pp.stage.sampler import Sampler
from ember_pp.stage.tap import Tap
from ember_pp.stage.timing import PlanTimes


class HiddenStatesSource(Protocol):
    """What a runner needs of ``handoff.Receiver``; see there."""

    @property
    def waits_on_device(self) -> bool:
        """Whether its waits are enqueued."""

    def receive(self, plan: int, num_tokens: int) -> Tensor:
        """[num_tokens, D], valid until ``release``."""

    def release(self, plan: int) -> None:
        """The hidden states of ``plan`` have been read."""

    def receive_into(self, plan: int, output: Tensor, *, at: int = 0) -> None:
        """Copy them to [num_tokens, D], and give them back."""

    def receive_pairs(
        self, plan: int, num_pairs: int, target: Tensor, *, ready_at: int = 0, at: int = 0
    ) -> None:
        """``target[index] = value`` for all pairs of ``plan``."""


class HiddenStatesSink(Protocol):
    """What a runner needs of ``handoff.Sender``; see there."""

    @property
    def waits_on_device(self) -> bool:
        """Whether its waits are enqueued."""

    def send(self, plan: int, hidden_states: Tensor, *, at: int = 0) -> None:
        """Hand on [T, D]."""


@dataclasses.dataclass(frozen=True, slots=True)
class StartedPlan:
    """A plan that is enqueued; the device may still be at it."""

    is_done: Callable[[], bool]
    """Whether ``finish`` would not wait. Raises what a failed device says."""
    finish: Callable[[], Sampled | None]
    """On the last stage, the tokens that it drew; None on the others."""


class CountedPlan(NamedTuple):
    """A plan that the device is done with, and when it did what."""

    plan: int
    after_idle: bool
    times: PlanTimes


class DeviceWait(NamedTuple):
    """A wait that is going on, on the device."""

    plan: int
    """Whose message, or whose slot, is waited for."""
    is_for_input: bool
    since_ns: int
    """By the card's clock."""


class StageRunner:
    """Runs plans on one stage, in order.

    Args:
        stage_index: names the files of a tap.
        model: the stage's layers.
        kv_cache: of those layers.
        slots: block tables and rosters.
        sampler: on the last stage only.
        last_tokens: on the first stage only.
    """

    def __init__(
        self,
        stage_index: int,
        model: StageModel,
        kv_cache: KVCache,
        slots: SlotTable,
        *,
        sampler: Sampler | None,
        last_tokens: LastTokens | None,
    ) -> None:
        self._stage_index = stage_index
        self._model = model
        self._kv_cache = kv_cache
        self._slots = slots
        self._sampler = sampler
        self._last_tokens = last_tokens
        self._source: HiddenStatesSource | None = None
        """Hidden states from the previous stage; None on the first."""
        self._sink: HiddenStatesSink | None = None
        """The next stage; None on the last."""
        self._feedback: HiddenStatesSink | None = None
        """From the last stage to the first, [N, 2] int32 pairs (slot, token)."""

    def connect(self, receiver: HiddenStatesSource | None, sender: HiddenStatesSink | None) -> None:
        """Use these ends of edges from now on; None with a single stage.

        Nothing may be in flight; what was and never came is forgotten.

        Args:
            receiver: of hidden states; on the first stage, of feedback.
            sender: of hidden states; on the last stage, of feedback.
        """
        if self._last_tokens is not None:
            self._last_tokens.connect(receiver)
        else:
            self._source = receiver
        if self._sampler is not None:
            self._feedback = sender
        else:
            self._sink = sender

    @property
    def is_capturing(self) -> bool:
        """Never: there are no graphs."""
        return False

    def warm_up(self) -> None:
        """Nothing to do before the first plan."""

    def start(self, execute: Execute) -> StartedPlan:
        """As ``run``: on a CPU the plan is done when this returns."""
        sampled = self.run(execute)
        if self._sink is None or not self._sink.waits_on_device:
            return StartedPlan(lambda: True, lambda: sampled)
        done = torch.cuda.current_stream().record_event()
        return StartedPlan(lambda: bool(done.query()), lambda: sampled)

    @property
    def is_timed_by_device(self) -> bool:
        """No: plans are timed by the host."""
        return False

    @property
    def is_timing(self) -> bool:
        """Whether ``take_times`` will return more."""
        return False

    def take_times(self) -> list[CountedPlan]:
        """None."""
        return []

    @property
    def wait(self) -> DeviceWait | None:
        """None that the device alone knows of."""
        return None

    @torch.inference_mode()
    def run(self, execute: Execute) -> Sampled | None:
        """Execute one plan; on the last stage, the tokens that it drew.

        Raises:
            ProtocolError: the plan does not fit the ones before it.
            HandoffError: an edge was closed.
        """
        inputs = self._slots.apply(execute)
        if self._sampler is not None:
            for opened in execute.open:
                self._sampler.open(opened)
        prepared = self._model.prepare(inputs, self._kv_cache)
        if self._last_tokens is not None:
            self._last_tokens.fill(execute, inputs)
        tap = Tap.of(execute, self._stage_index)
        hidden_states = self._forward(execute, inputs, prepared, tap)
        sampled = None
        if self._sampler is not None:
            sampled = self._sample(self._sampler, execute, inputs, hidden_states, tap)
        if tap is not None:
            tap.write()
        return sampled

    def _forward(
        self,
        execute: Execute,
        inputs: BatchInputs,
        prepared: PreparedStep | None,
        tap: Tap | None,
    ) -> Tensor:
        """Layers of this stage, [T, D]; handed on to the next stage unless this is the last."""
        received = None
        if self._source is not None:
            received = self._source.receive(execute.plan, len(inputs.token_ids))
            if tap is not None:
                tap.keep("input", received)
        hidden_states = self._model.forward(
            inputs,
            received,
            self._kv_cache,
            on_layer=None if tap is None else tap.keep_layer,
            prepared=prepared,
        )
        if self._sink is not None:
            self._sink.send(execute.plan, hidden_states)
        # Only now: what was received may be the ring slot, and be the residual until the end.
        if self._source is not None:
            self._source.release(execute.plan)
        return hidden_states

    def _sample(
        self,
        sampler: Sampler,
        execute: Execute,
        inputs: BatchInputs,
        hidden_states: Tensor,
        tap: Tap | None,
    ) -> Sampled:
        if not inputs.sample_slots:
            self._feed_back(execute.plan, inputs, inputs.token_ids[:0])
            return Sampled(execute.epoch, execute.plan, b"", [])
        logits = self._model.logits(hidden_states.index_select(0, inputs.sample_rows))  # [N, V]
        if tap is not None:
            tap.keep("logits", logits)
        drawn = sampler.sample(logits, inputs.sample_slots, inputs.sample_positions)
        self._feed_back(execute.plan, inputs, drawn.token_ids)
        if tap is not None:
            tap.keep("token_ids", drawn.token_ids)
        return Sampled(execute.epoch, execute.plan, pack_i32(drawn.read()), drawn.logprobs)

    def _feed_back(self, plan: int, inputs: BatchInputs, token_ids: Tensor) -> None:
        """Give the first stage the inputs of its next decode rows, before the host reads them.

        A row without a token (``sampling.NO_TOKEN``) ends its request once the host sees it;
        until then the first stage may compute anything for it.
        """
        slots = torch.tensor(inputs.sample_slots, dtype=torch.int64)
        if token_ids.device.type == "cuda":
            slots = slots.pin_memory().to(token_ids.device, non_blocking=True)
        token_ids = token_ids.clamp(min=0).to(torch.int64)
        if self._feedback is not None:
            self._feedback.send(plan, torch.stack((slots, token_ids), dim=1).to(torch.int32))
        elif self._last_tokens is not None:
            self._last_tokens.put(slots, token_ids)
