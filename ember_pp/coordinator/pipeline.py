"""One copy of the model: its stages, its scheduler, the plans between them.

A coordinator has one pipeline, or ``pipeline.replicas`` of them. A pipeline knows sequences
and plans; clients, text and requests stay with the coordinator.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, BinaryIO

from ember_pp import protocol
from ember_pp.config import Config
from ember_pp.coordinator.launcher import Launcher
from ember_pp.coordinator.policy import POLICIES
from ember_pp.coordinator.preparation import Preparation
from ember_pp.coordinator.scheduler import Scheduler, plan_to_execute
from ember_pp.coordinator.sequence import Sequence
from ember_pp.coordinator.supervisor import EPOCH, StageState, Supervisor
from ember_pp.coordinator.trace import TraceLog
from ember_pp.errors import ConfigError, ProtocolError
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
        """None until every stage takes plans."""
        self.num_plans = 0
        self._record: BinaryIO | None = None
        self._trace = trace

    @property
    def load_tokens(self) -> int:
        """Tokens of its open sequences, prompt and output so far."""
        return 0 if self.scheduler is None else self.scheduler.num_open_tokens

    def check(self) -> None:
        """Notice stages that ended; open the scheduler once all stages are ready."""
        self.supervisor.check()
        if self.scheduler is None and self.supervisor.is_ready:
            self._open_scheduler()

    def take_messages(self) -> Iterator[Drawn]:
        """What the stages said: tokens are yielded, all else is dealt with here.

        Raises:
            EmberError: a stage failed, or broke the protocol.
        """
        for identity, message in self.stage_socket.receive_all():
            if isinstance(message, ProtocolError):
                raise ProtocolError(f"from {identity.decode(errors='replace')}: {message}")
            if isinstance(message, protocol.Sampled):
                yield from self._on_sampled(message)
            elif isinstance(message, protocol.StageTrace):
                self._on_trace(message)
            else:
                self.supervisor.handle(identity, message)

    def issue_plans(self) -> None:
        """Send every plan that the scheduler can make now."""
        if self.scheduler is None:
            return
        while (plan := self.scheduler.next_plan()) is not None:
            tap = self._config.debug.tap
            if plan.number % self._config.debug.tap_every:
                tap = None
            packed = protocol.encode(plan_to_execute(plan, EPOCH, tap))
            if self._record is not None:
                self._record.write(len(packed).to_bytes(4, "little") + packed)
            if self._trace is not None:
                self._trace.issue(plan, EPOCH)
            self.supervisor.send_to_all(packed)
            self.num_plans += 1

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
        return {
            "counts": counts,
            "stages": stages,
            "edges": self.supervisor.edges,
            "edge_reasons": self.supervisor.edge_reasons,
        }

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

    def _on_sampled(self, sampled: protocol.Sampled) -> Iterator[Drawn]:
        if sampled.epoch != EPOCH or self.scheduler is None:
            return
        if self._trace is not None:
            self._trace.returned(sampled.plan, sampled.epoch)
        token_ids = protocol.unpack_i32(sampled.token_ids)
        logprobs: dict[Sequence, protocol.TokenLogprobs | None] = {}
        oldest = self.scheduler.in_flight.oldest
        if sampled.logprobs and oldest is not None:
            logprobs = dict(zip(oldest.rows, sampled.logprobs, strict=False))
        for sequence, token_id in self.scheduler.complete(sampled.plan, token_ids):
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
        "phase": stage.phase.value,
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
