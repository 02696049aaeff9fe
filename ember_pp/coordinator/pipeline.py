"""One copy of the model: its stages, its scheduler, the plans between them.

A coordinator has one pipeline, or ``pipeline.replicas`` of them. A pipeline knows sequences
and plans; clients, text and requests stay with the coordinator.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator
from typing import Any, BinaryIO

from ember_pp import protocol
from ember_pp.config import Config
from ember_pp.coordinator.launcher import Launcher
from ember_pp.coordinator.plan_watch import PlanWatch, who_is_late
from ember_pp.coordinator.policy import POLICIES
from ember_pp.coordinator.preparation import Preparation
from ember_pp.coordinator.scheduler import Scheduler, plan_to_execute
from ember_pp.coordinator.sequence import Sequence
from ember_pp.coordinator.stage_state import StageState
from ember_pp.coordinator.supervisor import Supervisor
from ember_pp.coordinator.trace import TraceLog
from ember_pp.errors import ConfigError, EmberError, HandoffError, ProtocolError, StageDiedError
from ember_pp.sockets import PrivateDirectory, RouterSocket

logger = logging.getLogger(__name__)

_MAX_STAGE_MESSAGE_BYTES = 256 * 1024 * 1024

Drawn = tuple[Sequence, int, protocol.TokenLogprobs | None]
"""A sequence, the token drawn for it, and its log-probabilities where asked for."""


class Pipeline:
    """Stages and schedule of one replica.

    Args:
        replica: index of this copy of the model.
        config: the whole configuration.
        preparation: the checked model and layout.
        directory: where the socket of the stages is bound.
        launcher: starts the stage processes.
        trace: takes the times of every plan; None: nobody asks for them.
    """

    def __init__(
        self,
        replica: int,
        config: Config,
        preparation: Preparation,
        directory: PrivateDirectory,
        launcher: Launcher,
        trace: TraceLog | None = None,
    ) -> None:
        self.replica = replica
        self._config = config
        self._preparation = preparation
        self.stage_socket = RouterSocket(
            directory.address(f"stages-{replica}.sock"), max_message_bytes=_MAX_STAGE_MESSAGE_BYTES
        )
        self.supervisor = Supervisor(config, preparation, self.stage_socket, launcher, replica)
        self.scheduler: Scheduler | None = None
        """None until every stage takes plans for the first time."""
        self.num_plans = 0
        self._epoch = self.supervisor.epoch
        self._watch = PlanWatch(
            min_s=config.supervisor.overdue_min_s,
            factor=config.supervisor.overdue_factor,
            num_stages=len(preparation.layer_ranges),
            plan_time_s=None if preparation.plan_cost is None else preparation.plan_cost.time_s,
        )
        self._record: BinaryIO | None = None
        self._trace = trace

    @property
    def load_tokens(self) -> int:
        """Tokens of its open sequences, prompt and output so far."""
        return 0 if self.scheduler is None else self.scheduler.num_open_tokens

    @property
    def is_ready(self) -> bool:
        """True while plans can be sent."""
        return self.supervisor.is_ready

    @property
    def next_watch_s(self) -> float:
        """When ``watch`` has something to do."""
        return self.supervisor.next_watch_s

    def check(self) -> None:
        """Notice stages that ended; open the scheduler once all stages are ready.

        Raises:
            EmberError: a failure that a new epoch would not get over.
        """
        self.supervisor.check()
        self._follow_epoch()
        if self.scheduler is None and self.supervisor.is_ready:
            self._open_scheduler()

    def watch(self) -> None:
        """Notice stages that are silent, and plans that are overdue.

        Raises:
            EmberError: as ``check``.
        """
        now_s = time.monotonic()
        if now_s < self.supervisor.next_watch_s:
            return
        self.supervisor.watch(now_s)
        self.check()
        overdue_at_s = self._watch.overdue_at_s
        if overdue_at_s is not None and now_s >= overdue_at_s:
            self._on_overdue(now_s)
            self._follow_epoch()

    def take_messages(self) -> Iterator[Drawn]:
        """What the stages said: tokens are yielded, all else is dealt with here.

        Raises:
            EmberError: as ``check``.
        """
        unread, self.supervisor.unread = self.supervisor.unread, []
        for identity, message in itertools.chain(unread, self.stage_socket.receive_all()):
            stage = self.supervisor.accept(identity, message)
            if stage is None or isinstance(message, ProtocolError):
                pass
            elif isinstance(message, protocol.StageTrace):
                self._on_trace(message)
            elif isinstance(message, protocol.Sampled):
                yield from self._on_sampled(stage, message)
            else:
                self.supervisor.handle(stage, message)
            self._follow_epoch()

    def issue_plans(self) -> None:
        """Send every plan that the scheduler can make now.

        Raises:
            EmberError: as ``check``.
        """
        if self.scheduler is None or not self.supervisor.is_ready:
            return
        epoch = self.supervisor.epoch
        while (plan := self.scheduler.next_plan()) is not None:
            tap = self._config.debug.tap
            if plan.number % self._config.debug.tap_every:
                tap = None
            packed = protocol.encode(plan_to_execute(plan, epoch, tap))
            if self._record is not None:
                self._record.write(len(packed).to_bytes(4, "little") + packed)
            if self._trace is not None:
                self._trace.issue(plan, epoch)
            self._watch.issue(plan, time.monotonic())
            self.num_plans += 1
            if not self.supervisor.send_to_all(packed):
                self._follow_epoch()
                return

    def stop(self, reason: str) -> None:
        """End the stages and close what is open."""
        self.supervisor.stop(reason)
        for _, message in [*self.supervisor.unread, *self.stage_socket.receive_all()]:
            if isinstance(message, protocol.StageTrace):  # sent at the very end
                self._on_trace(message)
        self.stage_socket.close(linger_ms=0)
        if self._record is not None:
            self._record.close()

    def status(self) -> dict[str, Any]:
        """Counts of the scheduler, and a map per stage, for ``StatusReply``."""
        stages = [
            _stage_status(stage, self.replica, self.supervisor.num_blocks)
            for stage in self.supervisor.stages
        ]
        counts = {} if self.scheduler is None else self.scheduler.stats()
        counts["num_restarts"] = self.supervisor.budget.num_restarts
        return {
            "counts": counts,
            "stages": stages,
            "edges": self.supervisor.edges,
            "edge_reasons": self.supervisor.edge_reasons,
            "epoch": self.supervisor.epoch,
            "problem": self._problem(),
        }

    def _problem(self) -> str:
        """Why it makes no progress, in words; empty while it does, or has nothing to do."""
        supervisor, now_s = self.supervisor, time.monotonic()
        if supervisor.problem:
            awaited = [s.stage_index for s in supervisor.stages if s.phase is supervisor.phase]
            return (
                f"epoch {supervisor.epoch}, since {now_s - supervisor.problem_since_s:.1f} s: "
                f"stages {awaited} are {supervisor.phase.value}; because: {supervisor.problem}"
            )
        overdue_at_s = self._watch.overdue_at_s
        if overdue_at_s is None or now_s < overdue_at_s:
            return ""
        return f"plan {self._watch.oldest} is overdue since {now_s - overdue_at_s:.1f} s"

    def _follow_epoch(self) -> None:
        """In a new epoch the stages know nothing of what was before, and all is planned anew."""
        if self._epoch == self.supervisor.epoch:
            return
        self._epoch = self.supervisor.epoch
        self.supervisor.renewal_limit_s = self._watch.longest_limit_s
        self._watch.forget()
        if self.scheduler is not None:
            self.scheduler.forget()
            logger.info(
                "%d sequences are to be computed anew", self.scheduler.stats()["num_waiting"]
            )

    def _on_overdue(self, now_s: float) -> None:
        """Have the stage to blame replaced, or the epoch ended if it is none of them."""
        supervisor, plan = self.supervisor, self._watch.oldest
        assert plan is not None, "a plan is overdue"
        late = who_is_late(supervisor.stages, self._epoch, plan)
        if late is not None and late.building:
            limit_s = self._config.supervisor.build_timeout_s
            if now_s - late.building_since_s < limit_s:
                return
        waits = [
            f"stage {stage.stage_index} waits for {wait}"
            for stage in supervisor.stages
            if (wait := stage.waiting_for(self._epoch))
        ]
        text = f"plan {plan} is overdue after {self._watch.waited_s(now_s):.1f} s"
        if late is None:
            error: EmberError = HandoffError(
                "; ".join([f"{text}, and no stage works at it", *waits])
            )
            supervisor.end_epoch(error)
            return
        what = f"{late} has its input and has not finished it"
        error = StageDiedError("; ".join([f"{text}: {what}", *waits]), stage_index=late.stage_index)
        supervisor.end_epoch(error, [late])

    def _open_scheduler(self) -> None:
        config, plan_cost = self._config, self._preparation.plan_cost
        self.scheduler = Scheduler(
            num_blocks=self.supervisor.num_blocks,
            block_size=config.cache.block_size,
            max_in_flight=self._preparation.max_in_flight,
            max_sequences=config.scheduler.max_sequences,
            max_tokens_per_plan=config.scheduler.max_tokens_per_plan,
            max_model_len=self._preparation.max_model_len,
            max_prompt_tokens=config.coordinator.max_prompt_tokens,
            prefix_caching=config.cache.prefix,
            num_microbatches=self._preparation.num_microbatches,
            run_ahead=config.pipeline.run_ahead,
            policy=POLICIES[config.scheduler.policy],
            plan_time_s=None if plan_cost is None else plan_cost.time_s,
        )
        if config.debug.record is not None:
            suffix = f".{self.replica}" if config.pipeline.replicas > 1 else ""
            try:
                self._record = open(config.debug.record + suffix, "wb")  # noqa: SIM115  closed in stop
            except OSError as error:
                raise ConfigError(
                    f"debug.record: {config.debug.record}: {error.strerror}"
                ) from None

    def _on_sampled(self, stage: StageState, sampled: protocol.Sampled) -> Iterator[Drawn]:
        if self.scheduler is None or not self.supervisor.is_ready:
            self.supervisor.blame(stage, ProtocolError(f"{stage} sent tokens without a plan"))
            return
        if self._trace is not None:
            self._trace.returned(sampled.plan, sampled.epoch)
        oldest = self.scheduler.in_flight.oldest
        try:
            token_ids = protocol.unpack_i32(sampled.token_ids)
            drawn = self.scheduler.complete(sampled.plan, token_ids)
        except ProtocolError as error:
            self.supervisor.blame(stage, error)
            return
        logprobs: dict[Sequence, protocol.TokenLogprobs | None] = {}
        if sampled.logprobs and oldest is not None:
            logprobs = dict(zip(oldest.rows, sampled.logprobs, strict=False))
        self._watch.complete(time.monotonic())
        for sequence, token_id in drawn:
            yield sequence, token_id, logprobs.get(sequence)

    def _on_trace(self, trace: protocol.StageTrace) -> None:
        if self._trace is not None:
            self._trace.add(trace)


def _stage_status(stage: StageState, replica: int, num_blocks: int) -> dict[str, Any]:
    status: dict[str, Any] = {
        "replica": replica,
        "stage_index": stage.stage_index,
        "pid": stage.process.pid,
        "device": stage.device,
        "phase": stage.building or stage.phase.value,
        "unanswered_heartbeats": stage.num_unanswered or 0,
        "start_layer": stage.start_layer,
        "end_layer": stage.end_layer,
        "num_done": stage.num_done,
        "num_total": stage.num_total,
    }
    if stage.ready is not None:
        status["weight_bytes"] = stage.ready.weight_bytes
        status["kv_bytes"] = stage.ready.block_bytes * num_blocks
    if stage.stats is not None:
        status |= _times_of(stage.stats)
    return status


def _times_of(stats: protocol.StageStats) -> dict[str, Any]:
    """Totals, and fractions of the time in which there was work."""
    parts = {
        "busy": stats.busy_ns,
        "wait_input": stats.wait_input_ns,
        "wait_output": stats.wait_output_ns,
        "host_gap": stats.host_gap_ns,
    }
    total_ns = sum(parts.values())
    return {
        "plan": stats.plan,
        **{f"{name}_ns": part_ns for name, part_ns in parts.items()},
        "idle_ns": stats.idle_ns,
        **{f"{name}_fraction": ns / total_ns if total_ns else 0.0 for name, ns in parts.items()},
        "waiting_for": stats.waiting_for,
        "peak_bytes": stats.peak_bytes,
    }
