"""The loop of the one process that knows requests: clients on one side, stages on the other.

Each turn waits until something happened, then takes, in this order, what stages said, what was
admitted, what clients said (a bounded number, so that a flood of submissions does not stop
the pipeline), makes plans while the scheduler has any, and sends what is new of streamed
answers. With nothing to do it sleeps in the poll. What may take long, templates and
tokenising, another thread does (``admission_thread.py``); files are the business of jobs.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import math
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

from ember_pp import __version__, protocol
from ember_pp.config import Config
from ember_pp.coordinator.admission import Admission
from ember_pp.coordinator.admission_thread import AdmissionThread, Submission
from ember_pp.coordinator.launcher import Launcher, LocalLauncher
from ember_pp.coordinator.metrics import MetricsServer
from ember_pp.coordinator.open_requests import OpenRequests
from ember_pp.coordinator.pipeline import Pipeline
from ember_pp.coordinator.preparation import Preparation, prepare
from ember_pp.coordinator.request import Request, take_deltas
from ember_pp.coordinator.router import Router
from ember_pp.coordinator.sequence import Sequence
from ember_pp.coordinator.stop_signal import StopSignal
from ember_pp.coordinator.trace_output import TraceOutput, check_trace
from ember_pp.coordinator.unread_clients import UnreadClients
from ember_pp.errors import (
    EmberError,
    InvalidRequestError,
    NumericalError,
    PipelineError,
    ProtocolError,
    StageError,
    TransportError,
    UnavailableError,
)
from ember_pp.key_files import server_keys
from ember_pp.sockets import Delivery, PrivateDirectory, RouterSocket, wait_readable

logger = logging.getLogger(__name__)

_MAX_CLIENT_MESSAGES_PER_TURN = 64
_HANG_UP_FACTOR = 2
"""A message above ``coordinator.max_message_bytes`` is answered; of this many times as much the
sender's connection ends, before it is all in memory."""
_GONE_CHECK_DELAY_S = 0.1
"""From a broken connection to looking who is gone: the socket may hear of it a little later."""
_NO_TOKEN = (
    "the model's logits are NaN or infinite for this request; check the checkpoint, or run with "
    "model.dtype=float32"
)


class Coordinator:
    """Requests and text, for one pipeline or several replicas of it.

    Args:
        config: the whole configuration.
        preparation: the checked model and layout.
        clients: bound socket for clients.
        pipelines: the replicas, not yet started.
        metrics: asks for the status now and then; None: nobody does.
    """

    def __init__(
        self,
        config: Config,
        preparation: Preparation,
        clients: RouterSocket,
        pipelines: list[Pipeline],
        metrics: MetricsServer | None = None,
    ) -> None:
        self._config = config
        self._preparation = preparation
        self._clients = clients
        self._pipelines = pipelines
        self._sockets = [clients, *(pipeline.stage_socket for pipeline in pipelines)]
        self._router = Router(len(pipelines), prefix_tokens=config.cache.block_size)
        self._admission = AdmissionThread(Admission(config, preparation).admit)
        self._open = OpenRequests(
            max_requests=config.coordinator.max_queued_requests,
            max_bytes=config.coordinator.max_queued_bytes,
        )
        self._fresh: dict[Request, None] = {}
        """Streamed requests with tokens that are not sent yet, in order."""
        self._waiting_for_start: list[Request] = []
        self._is_ready = False
        self._num_finished = 0
        self._num_output_tokens = 0
        self._metrics = metrics
        self._gone_check_at_s: float | None = None
        self._unread = UnreadClients(
            clients.send, max_unread=config.coordinator.max_unread_messages
        )
        self._num_refused_messages = 0
        self._num_dropped_clients = 0
        self._draining: str | None = None
        """Name of the signal after which nothing new is taken."""
        self._drain_until_s: float | None = None

    def run(self, stop: StopSignal, announce: Callable[[str], None] = logger.info) -> int:
        """Serve until a signal, and then what is open for ``shutdown.grace_s`` at most.

        Returns:
            How many requests were cut off; their clients are told.

        Raises:
            EmberError: a stage failed; every open request has been told.
        """
        try:
            for pipeline in self._pipelines:
                pipeline.supervisor.start()
            while stop.name is None:
                was_ready = self._is_ready
                self._turn(stop.descriptor)
                if self._is_ready and not was_ready:
                    announce("ready")
            self._drain(stop, announce)
            num_cut_off = len(self._open)
            self._fail_all(UnavailableError(f"the coordinator was asked to end ({stop.name})"))
            return num_cut_off
        except EmberError as failure:
            self._fail_all(failure)
            raise
        except Exception as bug:
            self._fail_all(PipelineError(f"the coordinator failed: {type(bug).__name__}: {bug}"))
            raise
        finally:
            for pipeline in self._pipelines:
                pipeline.stop("the coordinator ends")
            self._admission.close(self._config.coordinator.shutdown_grace_s)

    def _drain(self, stop: StopSignal, announce: Callable[[str], None]) -> None:
        """Let open requests end; a second signal, where it comes here, ends the wait."""
        self._draining = stop.name
        if not self._is_ready or not len(self._open):  # while it loads nothing can end
            return
        grace_s = self._config.shutdown.grace_s
        self._drain_until_s = time.monotonic() + grace_s
        announce(
            f"{stop.name}: {len(self._open)} open requests have {grace_s:g} s to end; a second "
            "signal ends at once"
        )
        while len(self._open) and not stop.is_urgent and time.monotonic() < self._drain_until_s:
            stop.take()
            self._turn(stop.descriptor)

    def _turn(self, stop_descriptor: int) -> None:
        descriptors = [stop_descriptor, self._admission.descriptor]
        for pipeline in self._pipelines:
            descriptors += pipeline.supervisor.exit_descriptors
        if self._metrics is not None:
            descriptors.append(self._metrics.request_descriptor)
        readable = wait_readable(self._sockets, descriptors, self._timeout_s())
        for pipeline in self._pipelines:
            for sequence, token_id, logprobs in pipeline.take_messages():
                self._on_token(sequence, token_id, logprobs)
            if readable or not pipeline.is_ready:
                pipeline.check()
            pipeline.watch()
        if not self._is_ready:
            self._open_when_ready()
        if self._admission.descriptor in readable:
            for submission, outcome in self._admission.take():
                self._on_admitted(submission, outcome)
        for identity, message, size in self._clients.receive_sized(_MAX_CLIENT_MESSAGES_PER_TURN):
            self._take_client_message(identity, message, size)
        for pipeline in self._pipelines:
            pipeline.issue_plans()
        self._send_deltas()
        self._look_for_the_gone()
        if self._metrics is not None and self._metrics.request_descriptor in readable:
            self._metrics.publish(self.status())

    def _timeout_s(self) -> float:
        """How long the loop may sleep."""
        moments_s = [pipeline.next_watch_s for pipeline in self._pipelines]
        moments_s += [
            at_s for at_s in (self._gone_check_at_s, self._drain_until_s) if at_s is not None
        ]
        return max(0.0, min(moments_s) - time.monotonic())

    def _open_when_ready(self) -> None:
        """Let in what waited for the start, once every replica can take it."""
        if any(pipeline.scheduler is None for pipeline in self._pipelines):
            return
        self._is_ready = True
        waiting, self._waiting_for_start = self._waiting_for_start, []
        for request in waiting:
            if self._open.find(request.request_id) is request:  # else it was cancelled
                self._queue_or_refuse(request)

    def _on_token(
        self, sequence: Sequence, token_id: int, logprobs: protocol.TokenLogprobs | None
    ) -> None:
        request = self._open.requests.get(sequence.request_id)
        if request is None or request.sequence is not sequence:
            return  # its client went away a moment ago
        if token_id < 0:
            self._release(request)
            self._fail(request, NumericalError(_NO_TOKEN))
            return
        self._num_output_tokens += 1
        finish_reason = request.on_token(token_id, logprobs)
        if finish_reason is not None:
            self._release(request)
            self._finish(request, finish_reason)
        elif request.stream:
            self._fresh[request] = None

    def _send_deltas(self) -> None:
        """One message to each client, for all that is new of its streamed answers."""
        if not self._fresh:
            return
        by_client: dict[bytes, list[Request]] = {}
        for request in self._fresh:
            by_client.setdefault(request.client, []).append(request)
        self._fresh = {}
        for client, requests in by_client.items():
            self._drop_unless(self._clients.send(client, take_deltas(requests)), client)

    def _release(self, request: Request) -> None:
        """The request needs its place in the pipeline no more, whether it ended or is given up."""
        if not self._is_ready:
            return  # it waits for the start: no scheduler has seen it, though some may be there
        scheduler = self._pipelines[request.replica].scheduler
        if scheduler is not None:
            scheduler.finish(request.sequence)

    def _close(self, request: Request | Submission) -> None:
        """Nobody waits for it any more, however it ended."""
        self._num_finished += self._open.close(request)

    # clients

    def _take_client_message(
        self, client: bytes, message: protocol.Message | ProtocolError, num_bytes: int
    ) -> None:
        if self._unread:
            self._unread.tell(client)
        match message:
            case protocol.Submit():
                self._on_submit(Submission(client, message, num_bytes))
            case protocol.Cancel():
                self._on_cancel(client, message)
            case protocol.Status():
                own = [request.request_id for request in self._open.of_client(client)]
                self._clients.send(client, protocol.StatusReply(self.status(), own))
            case ProtocolError():
                self._num_refused_messages += 1
                self._refuse(client, "", message)
            case _:
                self._num_refused_messages += 1
                error = ProtocolError(f"{type(message).__name__} is no message of a client")
                self._refuse(client, "", error)

    def _on_submit(self, submission: Submission) -> None:
        try:
            if submission.num_bytes > self._config.coordinator.max_message_bytes:
                raise InvalidRequestError(
                    f"a message of {submission.num_bytes} bytes; at most "
                    f"{self._config.coordinator.max_message_bytes} "
                    "(coordinator.max_message_bytes)"
                )
            if self._draining is not None:
                raise UnavailableError(
                    f"the coordinator is ending ({self._draining}) and takes nothing new"
                )
            self._open.add(submission)
        except EmberError as error:
            self._refuse(submission.client, submission.request_id, error)
        else:
            self._admission.put(submission)

    def _on_admitted(self, submission: Submission, outcome: Request | EmberError) -> None:
        if submission.is_withdrawn:
            return
        if isinstance(outcome, EmberError):
            self._fail(submission, outcome)
            return
        self._open.admit(submission, outcome)
        self._queue_or_refuse(outcome)

    def _queue_or_refuse(self, request: Request) -> None:
        if not self._is_ready:  # what fits is known once the stages are loaded
            self._waiting_for_start.append(request)
            return
        if len(self._pipelines) > 1:
            are_ready = [pipeline.is_ready for pipeline in self._pipelines]
            loads = [
                pipeline.load_tokens if pipeline.is_ready or not any(are_ready) else math.inf
                for pipeline in self._pipelines
            ]
            request.replica = self._router.choose(request.sequence.prompt_ids, loads)
        scheduler = self._pipelines[request.replica].scheduler
        assert scheduler is not None, "a coordinator that is ready has schedulers"
        try:
            scheduler.add(request.sequence)
        except InvalidRequestError as error:
            self._fail(request, error)
            return
        accepted = protocol.Accepted(request.request_id, request.sequence.num_prompt_tokens)
        self._clients.send(request.client, accepted)

    def _on_cancel(self, client: bytes, cancel: protocol.Cancel) -> None:
        if cancel.request_ids:
            found = [self._open.find(request_id) for request_id in cancel.request_ids]
            chosen = [request for request in found if request is not None]
        else:
            chosen = list(self._open) if cancel.everyone else []
        num_cancelled = 0
        for request in chosen:
            if cancel.everyone or request.client == client:
                num_cancelled += self._abort(request)
        self._clients.send(client, protocol.CancelReply(num_cancelled))

    def _abort(self, request: Request | Submission) -> bool:
        if self._open.find(request.request_id) is not request:
            return False  # named twice, or its client was found to be gone
        if isinstance(request, Request):
            self._release(request)
            self._finish(request, "abort")
        else:
            self._close(request)
            nothing = protocol.Finished(request.request_id, "", b"", [], "abort", None, 0, 0, 0)
            self._settle(request, self._clients.send(request.client, nothing))
        return True

    def _finish(self, request: Request, finish_reason: str) -> None:
        self._close(request)
        self._fresh.pop(request, None)  # the last message has it all
        self._settle(
            request, self._clients.send(request.client, request.take_finished(finish_reason))
        )

    def _settle(self, request: Request | Submission, delivery: Delivery) -> None:
        """The last message of a request is on its way, or was not to be delivered."""
        if delivery is Delivery.UNREAD:
            self._unread.add(request.client, [request.request_id])
        self._drop_unless(delivery, request.client)

    def _look_for_the_gone(self) -> None:
        """Notice clients that ended without a word and wait for no delta either.

        A broken connection says that somebody is gone, not who: that is found by sending to
        everyone who waits for something.
        """
        if self._clients.take_disconnects() and self._gone_check_at_s is None:
            self._gone_check_at_s = time.monotonic() + _GONE_CHECK_DELAY_S
        if self._gone_check_at_s is None or time.monotonic() < self._gone_check_at_s:
            return
        self._gone_check_at_s = None
        self._unread.forget_the_gone()
        for client in self._open.clients():
            self._drop_unless(self._clients.send(client, take_deltas(())), client)

    def _drop_unless(self, delivery: Delivery, client: bytes) -> None:
        """If a client is gone, or does not read, its requests leave the pipeline."""
        if delivery:
            return
        gone = self._open.of_client(client)
        if delivery is Delivery.UNREAD:
            self._unread.add(client, [request.request_id for request in gone])
        for request in gone:
            self._close(request)
            if isinstance(request, Request):
                self._fresh.pop(request, None)
                self._release(request)
        if gone:
            self._num_dropped_clients += 1
            why = "is gone" if delivery is Delivery.GONE else "does not read"
            logger.info("a client %s; %d of its requests end", why, len(gone))

    def _refuse(self, client: bytes, request_id: str, error: EmberError) -> Delivery:
        return self._clients.send(client, protocol.RequestFailed(request_id, error.to_wire()))

    def _fail(self, request: Request | Submission, error: EmberError) -> None:
        if isinstance(request, Request) and request in self._fresh:
            self._send_deltas()
        self._close(request)
        self._settle(request, self._refuse(request.client, request.request_id, error))

    def _fail_all(self, error: EmberError) -> None:
        """Tell every client; by the class of the error, that it is not the request's own fault."""
        if not isinstance(error, UnavailableError | TransportError | StageError):
            error = PipelineError(str(error))
        for request in self._open:
            self._fail(request, error)

    # status

    @property
    def _phase(self) -> str:
        if self._draining is not None:
            return "draining"
        if not self._is_ready:
            return "loading"
        is_whole = all(pipeline.is_ready for pipeline in self._pipelines)
        return "ready" if is_whole else "renewing"

    def status(self) -> dict[str, Any]:
        """The map that ``StatusReply`` carries; ``docs/protocol.md`` lists its keys."""
        model = self._preparation.model_config
        parts = [pipeline.status() for pipeline in self._pipelines]
        counts = collections.Counter[str]()
        for part in parts:
            counts.update(part["counts"])
        return {
            "version": __version__,
            "phase": self._phase,
            "problems": [part["problem"] for part in parts if part["problem"]],
            "model": {
                "path": self._config.model.path,
                "model_type": model.model_type,
                "num_layers": model.num_layers,
                "dtype": self._config.model.dtype,
                "max_model_len": self._preparation.max_model_len,
            },
            "open_requests": len(self._open),
            "finished_requests": self._num_finished,
            "num_output_tokens": self._num_output_tokens,
            "num_refused_connections": self._clients.num_refused,
            "num_refused_messages": self._num_refused_messages,
            "num_dropped_clients": self._num_dropped_clients,
            "num_plans": sum(pipeline.num_plans for pipeline in self._pipelines),
            "max_in_flight": self._preparation.max_in_flight,
            "replicas": len(self._pipelines),
            **counts,
            "edges": parts[0]["edges"],
            "edge_reasons": parts[0]["edge_reasons"],
            "stages": [stage for part in parts for stage in part["stages"]],
        }


def serve(
    config: Config,
    stop: StopSignal,
    *,
    launcher: Launcher | None = None,
    announce: Callable[[str], None] = logger.info,
) -> int:
    """Run a coordinator at ``coordinator.address`` until ``stop``; call from the main thread.

    ``announce`` is told when clients can connect and when the stages take work.

    Returns:
        How many requests were cut off when the time to drain was over.

    Raises:
        EmberError: the model, the settings or the address cannot be used, or a stage failed.
    """
    address = config.coordinator.address
    if address is None:
        raise AssertionError("serve needs coordinator.address")
    started_s = time.monotonic()
    clients = listen(config, address)
    try:
        check_trace(config)
        with contextlib.ExitStack() as stack:
            metrics = _open_metrics(config, stack)
            preparation = prepare(config)
            trace = TraceOutput(config, preparation) if config.trace.is_on else None
            directory = stack.enter_context(PrivateDirectory())
            pipelines = [
                Pipeline(
                    *(replica, config, preparation, directory, launcher or LocalLauncher()),
                    trace=None if trace is None else trace.logs[replica],
                )
                for replica in range(config.pipeline.replicas)
            ]
            if trace is not None:
                stack.callback(trace.write)
            coordinator = Coordinator(config, preparation, clients, pipelines, metrics)
            announce(f"listening at {address}, loading")
            return coordinator.run(stop, announce)
    finally:
        clients.close()
        logger.info("served for %.1f s", time.monotonic() - started_s)


def listen(config: Config, address: str) -> RouterSocket:
    """The socket of the clients, with the bounds and keys of ``coordinator``.

    Raises:
        AddressError: the address cannot be used.
        ConfigError: its keys cannot.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)  # many systems allow 1024 unless asked,
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # and each client is an open file
    clients = RouterSocket(
        address,
        max_message_bytes=_HANG_UP_FACTOR * config.coordinator.max_message_bytes,
        max_unread=config.coordinator.max_unread_messages,
        keys=server_keys(config.coordinator, address),
    )
    clients.watch_disconnects()
    return clients


def _open_metrics(config: Config, stack: contextlib.ExitStack) -> MetricsServer | None:
    if config.metrics.port is None:
        return None
    metrics = MetricsServer(config.metrics.port)
    stack.callback(metrics.close)
    sys.stderr.write(f"metrics: {metrics.url}\n")
    sys.stderr.flush()
    return metrics
