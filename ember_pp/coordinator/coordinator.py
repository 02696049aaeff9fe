"""The loop of the one process that knows requests: clients on one side, stages on the other.

Each turn waits until something happened, then takes, in this order, what stages said, what
clients said (a bounded number, so that a flood of submissions does not stop the pipeline),
and makes plans while the scheduler has any. With nothing to do it sleeps in the poll.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, BinaryIO

from ember_pp import __version__, protocol
from ember_pp.config import Config
from ember_pp.coordinator.admission import Admission
from ember_pp.coordinator.launcher import Launcher, LocalLauncher
from ember_pp.coordinator.preparation import Preparation, prepare
from ember_pp.coordinator.request import Request
from ember_pp.coordinator.scheduler import Scheduler, plan_to_execute
from ember_pp.coordinator.sequence import Sequence
from ember_pp.coordinator.stop_signal import StopSignal
from ember_pp.coordinator.supervisor import EPOCH, StageState, Supervisor
from ember_pp.errors import (
    ConfigError,
    EmberError,
    InvalidRequestError,
    NumericalError,
    PipelineError,
    ProtocolError,
    StageError,
    TransportError,
    UnavailableError,
)
from ember_pp.sockets import PrivateDirectory, RouterSocket, wait_readable

logger = logging.getLogger(__name__)

_MAX_CLIENT_MESSAGES_PER_TURN = 64
_MAX_STAGE_MESSAGE_BYTES = 256 * 1024 * 1024
_START_CHECK_INTERVAL_S = 0.5
_NO_TOKEN = (
    "the model's logits are NaN or infinite for this request; check the checkpoint, or run with "
    "model.dtype=float32"
)


class Coordinator:
    """Requests, text and schedule of one pipeline.

    Args:
        config: the whole configuration.
        preparation: the checked model and layout.
        clients: bound socket for clients.
        stages: bound socket for stages.
        supervisor: the stages.
    """

    def __init__(
        self,
        config: Config,
        preparation: Preparation,
        clients: RouterSocket,
        stages: RouterSocket,
        supervisor: Supervisor,
    ) -> None:
        self._config = config
        self._preparation = preparation
        self._clients = clients
        self._stages = stages
        self._supervisor = supervisor
        self._admission = Admission(config, preparation)
        self._requests: dict[str, Request] = {}
        self._scheduler: Scheduler | None = None
        self._waiting_for_start: list[Request] = []
        self._record: BinaryIO | None = None
        self._num_plans = 0
        self._num_finished = 0

    def run(self, stop: StopSignal, announce: Callable[[str], None] = logger.info) -> None:
        """Serve until a signal; open requests are then refused by name.

        Raises:
            EmberError: a stage failed; every open request has been told.
        """
        try:
            self._supervisor.start()
            while stop.name is None:
                was_ready = self._scheduler is not None
                self._turn(stop.descriptor)
                if self._scheduler is not None and not was_ready:
                    announce("ready")
            raise UnavailableError(f"the coordinator was asked to end ({stop.name})")
        except UnavailableError as ending:
            self._fail_all(ending)
        except EmberError as failure:
            self._fail_all(failure)
            raise
        except Exception as bug:
            self._fail_all(PipelineError(f"the coordinator failed: {type(bug).__name__}: {bug}"))
            raise
        finally:
            self._supervisor.stop("the coordinator ends")
            if self._record is not None:
                self._record.close()

    def _turn(self, stop_descriptor: int) -> None:
        descriptors = [*self._supervisor.exit_descriptors, stop_descriptor]
        timeout_s = None if self._supervisor.is_ready else _START_CHECK_INTERVAL_S
        ended = wait_readable([self._clients, self._stages], descriptors, timeout_s)
        self._take_stage_messages()
        if ended or timeout_s is not None:
            self._supervisor.check()
        if self._scheduler is None and self._supervisor.is_ready:
            self._open_scheduler()
        for identity, message in self._clients.receive_all(_MAX_CLIENT_MESSAGES_PER_TURN):
            self._take_client_message(identity, message)
        self._issue_plans()

    # stages

    def _take_stage_messages(self) -> None:
        for identity, message in self._stages.receive_all():
            if isinstance(message, ProtocolError):
                raise ProtocolError(f"from {identity.decode(errors='replace')}: {message}")
            if isinstance(message, protocol.Sampled):
                self._on_sampled(message)
            else:
                self._supervisor.handle(identity, message)

    def _open_scheduler(self) -> None:
        self._scheduler = Scheduler(
            num_blocks=self._supervisor.num_blocks,
            block_size=self._config.cache.block_size,
            max_in_flight=self._preparation.max_in_flight,
            max_sequences=self._config.scheduler.max_sequences,
            max_tokens_per_plan=self._config.scheduler.max_tokens_per_plan,
            max_model_len=self._preparation.max_model_len,
            max_prompt_tokens=self._config.coordinator.max_prompt_tokens,
            prefix_caching=self._config.cache.prefix,
        )
        if self._config.debug.record is not None:
            try:
                self._record = open(self._config.debug.record, "wb")  # noqa: SIM115  closed in run
            except OSError as error:
                path = self._config.debug.record
                raise ConfigError(f"debug.record: {path}: {error.strerror}") from None
        waiting, self._waiting_for_start = self._waiting_for_start, []
        for request in waiting:
            if self._requests.get(request.request_id) is request:  # else it was cancelled
                self._queue_or_refuse(request)

    def _issue_plans(self) -> None:
        if self._scheduler is None:
            return
        while (plan := self._scheduler.next_plan()) is not None:
            execute = plan_to_execute(plan, EPOCH, self._config.debug.tap)
            if self._record is not None:
                packed = protocol.encode(execute)
                self._record.write(len(packed).to_bytes(4, "little") + packed)
            self._supervisor.send_to_all(execute)
            self._num_plans += 1

    def _on_sampled(self, sampled: protocol.Sampled) -> None:
        if sampled.epoch != EPOCH or self._scheduler is None:
            return
        token_ids = protocol.unpack_i32(sampled.token_ids)
        logprobs: dict[Sequence, protocol.TokenLogprobs | None] = {}
        oldest = self._scheduler.in_flight.oldest
        if sampled.logprobs and oldest is not None:
            logprobs = dict(zip(oldest.rows, sampled.logprobs, strict=False))
        for sequence, token_id in self._scheduler.complete(sampled.plan, token_ids):
            request = self._requests.get(sequence.request_id)
            if request is None or request.sequence is not sequence:
                continue  # its client went away during this very loop
            if token_id < 0:
                self._scheduler.finish(sequence)
                self._fail(request, NumericalError(_NO_TOKEN))
                continue
            finish_reason = request.on_token(token_id, logprobs.get(sequence))
            if finish_reason is not None:
                self._scheduler.finish(sequence)
                self._finish(request, finish_reason)
            elif request.stream and not self._clients.send(request.client, request.take_delta()):
                self._drop_client(request.client)

    # clients

    def _take_client_message(
        self, client: bytes, message: protocol.Message | ProtocolError
    ) -> None:
        match message:
            case protocol.Submit():
                self._on_submit(client, message)
            case protocol.Cancel():
                self._on_cancel(client, message)
            case protocol.Status():
                own = [r.request_id for r in self._requests.values() if r.client == client]
                self._clients.send(client, protocol.StatusReply(self.status(), own))
            case ProtocolError():
                self._refuse(client, "", message)
            case _:
                error = ProtocolError(f"{type(message).__name__} is no message of a client")
                self._refuse(client, "", error)

    def _on_submit(self, client: bytes, submit: protocol.Submit) -> None:
        try:
            if submit.request_id in self._requests or not submit.request_id:
                raise InvalidRequestError(f"request_id: {submit.request_id!r} is empty or open")
            limit = self._config.coordinator.max_queued_requests
            if len(self._requests) >= limit:
                raise UnavailableError(
                    f"{limit} requests are open (coordinator.max_queued_requests)"
                )
            request = self._admission.admit(client, submit)
        except EmberError as error:
            self._refuse(client, submit.request_id, error)
            return
        except Exception as bug:  # whatever one request does to us, the others go on
            logger.exception("request %r", submit.request_id)
            reason = f"this request made the coordinator fail: {type(bug).__name__}"
            self._refuse(client, submit.request_id, EmberError(reason))
            return
        self._requests[request.request_id] = request
        self._queue_or_refuse(request)

    def _queue_or_refuse(self, request: Request) -> None:
        if self._scheduler is None:  # what fits is known once the stages are loaded
            self._waiting_for_start.append(request)
            return
        try:
            self._scheduler.add(request.sequence)
        except InvalidRequestError as error:
            self._fail(request, error)
            return
        accepted = protocol.Accepted(request.request_id, request.sequence.num_prompt_tokens)
        self._clients.send(request.client, accepted)

    def _on_cancel(self, client: bytes, cancel: protocol.Cancel) -> None:
        ids = cancel.request_ids or (list(self._requests) if cancel.everyone else [])
        num_cancelled = 0
        for request_id in ids:
            request = self._requests.get(request_id)
            if request is not None and (cancel.everyone or request.client == client):
                self._abort(request)
                num_cancelled += 1
        self._clients.send(client, protocol.CancelReply(num_cancelled))

    def _abort(self, request: Request) -> None:
        if self._scheduler is not None:
            self._scheduler.abort(request.sequence)
        self._finish(request, "abort")

    def _finish(self, request: Request, finish_reason: str) -> None:
        self._requests.pop(request.request_id, None)
        self._num_finished += 1
        if not self._clients.send(request.client, request.take_finished(finish_reason)):
            self._drop_client(request.client)

    def _drop_client(self, client: bytes) -> None:
        """A client is gone, or reads nothing: its requests leave the pipeline."""
        gone = [request for request in self._requests.values() if request.client == client]
        for request in gone:
            del self._requests[request.request_id]
            if self._scheduler is not None:
                self._scheduler.abort(request.sequence)
        if gone:
            logger.info("a client is gone; %d of its requests end", len(gone))

    def _refuse(self, client: bytes, request_id: str, error: EmberError) -> None:
        self._clients.send(client, protocol.RequestFailed(request_id, error.to_wire()))

    def _fail(self, request: Request, error: EmberError) -> None:
        self._requests.pop(request.request_id, None)
        self._refuse(request.client, request.request_id, error)

    def _fail_all(self, error: EmberError) -> None:
        """Tell every client; by the class of the error, that it is not the request's own fault."""
        if not isinstance(error, UnavailableError | TransportError | StageError):
            error = PipelineError(str(error))
        for request in list(self._requests.values()):
            self._fail(request, error)

    # status

    def status(self) -> dict[str, Any]:
        """The map that ``StatusReply`` carries; ``docs/protocol.md`` lists its keys."""
        counts = self._scheduler.stats() if self._scheduler is not None else {}
        model = self._preparation.model_config
        return {
            "version": __version__,
            "phase": "ready" if self._supervisor.is_ready else "loading",
            "model": {
                "path": self._config.model.path,
                "model_type": model.model_type,
                "num_layers": model.num_layers,
                "dtype": self._config.model.dtype,
                "max_model_len": self._preparation.max_model_len,
            },
            "open_requests": len(self._requests),
            "finished_requests": self._num_finished,
            "num_plans": self._num_plans,
            "max_in_flight": self._preparation.max_in_flight,
            **counts,
            "edges": dict(self._supervisor.edges),
            "stages": [
                _stage_status(stage, self._supervisor.num_blocks)
                for stage in self._supervisor.stages
            ],
        }


def _stage_status(stage: StageState, num_blocks: int) -> dict[str, Any]:
    status: dict[str, Any] = {
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
        stats = stage.stats
        total_ns = stats.busy_ns + stats.wait_input_ns + stats.wait_output_ns
        status |= {
            "plan": stats.plan,
            "busy_ns": stats.busy_ns,
            "wait_input_ns": stats.wait_input_ns,
            "wait_output_ns": stats.wait_output_ns,
            "busy_fraction": stats.busy_ns / total_ns if total_ns else 0.0,
            "wait_input_fraction": stats.wait_input_ns / total_ns if total_ns else 0.0,
            "wait_output_fraction": stats.wait_output_ns / total_ns if total_ns else 0.0,
            "waiting_for": stats.waiting_for,
            "peak_bytes": stats.peak_bytes,
        }
    return status


def serve(
    config: Config,
    stop: StopSignal,
    *,
    launcher: Launcher | None = None,
    announce: Callable[[str], None] = logger.info,
) -> None:
    """Run a coordinator at ``coordinator.address`` until ``stop``; call from the main thread.

    ``announce`` is told when clients can connect and when the stages take work.

    Raises:
        EmberError: the model, the settings or the address cannot be used, or a stage failed.
    """
    address = config.coordinator.address
    if address is None:
        raise AssertionError("serve needs coordinator.address")
    started_s = time.monotonic()
    clients = RouterSocket(address, max_message_bytes=config.coordinator.max_message_bytes)
    try:
        preparation = prepare(config)
        with PrivateDirectory() as directory:
            stages = RouterSocket(
                directory.address("stages.sock"), max_message_bytes=_MAX_STAGE_MESSAGE_BYTES
            )
            supervisor = Supervisor(config, preparation, stages, launcher or LocalLauncher())
            try:
                coordinator = Coordinator(config, preparation, clients, stages, supervisor)
                announce(f"listening at {address}, loading")
                coordinator.run(stop, announce)
            finally:
                stages.close(linger_ms=0)
    finally:
        clients.close()
        logger.info("served for %.1f s", time.monotonic() - started_s)
