"""Counters for Prometheus: ``http://127.0.0.1:PORT/metrics``, text format 0.0.4.

The page is served by a thread of its own. For each scrape it asks the coordinator's loop for a
status map through a descriptor that the loop polls, waits for it, and renders it: nothing is
computed while nobody asks, and the loop never waits for a reader.
"""

from __future__ import annotations

import contextlib
import http.server
import os
import socket
import socketserver
import threading
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from ember_pp.errors import ConfigError

_HOST = "127.0.0.1"
_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SNAPSHOT_TIMEOUT_S = 5.0
_CLIENT_TIMEOUT_S = 2.0  # one reader at a time: one that says nothing must not keep the others out
_JOIN_TIMEOUT_S = 1.0

# name: (key of the status map, type, help)
_SCALARS = MappingProxyType(
    {
        "requests_open": ("open_requests", "gauge", "Requests accepted and not ended."),
        "requests_finished_total": ("finished_requests", "counter", "Requests that ended."),
        "sequences_running": ("num_running", "gauge", "Sequences that have a slot."),
        "sequences_waiting": ("num_waiting", "gauge", "Sequences that wait for a slot."),
        "plans_in_flight": ("num_in_flight", "gauge", "Plans issued whose tokens are not back."),
        "plans_total": ("num_plans", "counter", "Plans issued."),
        "blocks": ("num_blocks", "gauge", "KV blocks."),
        "blocks_free": ("num_free_blocks", "gauge", "KV blocks that hold nothing in use."),
        "blocks_cached": ("num_cached_blocks", "gauge", "Free blocks with a reusable prefix."),
        "restarts_total": ("num_restarts", "counter", "Failures of stages that were got over."),
        "preemptions_total": (
            "num_preemptions",
            "counter",
            "Sequences that gave their blocks back.",
        ),
        "prompt_tokens_total": (
            "num_prompt_tokens",
            "counter",
            "Prompt tokens of admitted requests.",
        ),
        "prefix_hit_tokens_total": (
            "num_prefix_hit_tokens",
            "counter",
            "Prompt tokens taken from the prefix cache.",
        ),
        "output_tokens_total": ("num_output_tokens", "counter", "Tokens drawn for requests."),
        "connections_refused_total": (
            "num_refused_connections",
            "counter",
            "Connections that ended in their handshake: no key, a wrong one, or no client of ours.",
        ),
        "messages_refused_total": (
            "num_refused_messages",
            "counter",
            "Messages of clients that were none.",
        ),
        "clients_dropped_total": (
            "num_dropped_clients",
            "counter",
            "Clients that went away, or did not read, and left requests.",
        ),
    }
)
_STAGE_SCALARS = MappingProxyType(
    {
        "stage_plan": ("plan", "gauge", "Last plan that the stage finished."),
        "stage_weight_bytes": ("weight_bytes", "gauge", "Weights on the stage's device."),
        "stage_kv_bytes": ("kv_bytes", "gauge", "KV cache on the stage's device."),
        "stage_peak_bytes": ("peak_bytes", "gauge", "Most device memory held so far."),
    }
)
_STATES = ("busy", "wait_input", "wait_output", "host_gap", "idle")


def render(status: Mapping[str, Any]) -> str:
    """The page for one status map (``docs/protocol.md``); what it lacks is left out."""
    return "".join(f"{line}\n" for line in _lines(status))


def _lines(status: Mapping[str, Any]) -> Iterator[str]:
    model = status["model"]
    yield from _head("info", "gauge", "Always 1; what runs is in the labels.")
    labels = {"version": status["version"], "model": model["path"] or model["model_type"]}
    yield f"ember_pp_info{_labels(labels)} 1"
    yield from _head("ready", "gauge", "1 once every stage takes plans.")
    yield f"ember_pp_ready {int(status['phase'] == 'ready')}"
    for name, (key, kind, text) in _SCALARS.items():
        if key in status:
            yield from _head(name, kind, text)
            yield f"ember_pp_{name} {status[key]}"
    stages = status["stages"]
    yield from _head(
        "stage_seconds_total", "counter", "Time of the stage by what it did; the parts add up."
    )
    for stage in stages:
        for state in _STATES:
            if f"{state}_ns" in stage:
                seconds = stage[f"{state}_ns"] / 1e9
                labels_text = _stage_labels(stage, state=state)
                yield f"ember_pp_stage_seconds_total{labels_text} {seconds:.9f}"
    for name, (key, kind, text) in _STAGE_SCALARS.items():
        yield from _head(name, kind, text)
        for stage in stages:
            if key in stage:
                yield f"ember_pp_{name}{_stage_labels(stage)} {stage[key]}"


def _head(name: str, kind: str, text: str) -> Iterator[str]:
    yield f"# HELP ember_pp_{name} {text}"
    yield f"# TYPE ember_pp_{name} {kind}"


def _stage_labels(stage: Mapping[str, Any], **more: str) -> str:
    return _labels({"replica": stage["replica"], "stage": stage["stage_index"]} | more)


def _labels(labels: Mapping[str, Any]) -> str:
    return "{" + ",".join(f'{name}="{_escape(str(value))}"' for name, value in labels.items()) + "}"


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


class MetricsServer:
    """Serves ``/metrics`` on loopback until ``close``.

    Args:
        port: TCP port; 0: any that is free.

    Raises:
        ConfigError: the port cannot be had; names ``metrics.port``.
    """

    def __init__(self, port: int) -> None:
        self._snapshot: Mapping[str, Any] | None = None
        self._is_answered = threading.Event()
        self.request_descriptor, self._request_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        """Readable while a scrape waits for ``publish``."""
        try:
            self._server = _Server(port, self)
        except OSError as error:
            os.close(self.request_descriptor)
            os.close(self._request_writer)
            raise ConfigError(
                f"metrics.port: {_HOST}:{port} cannot be used: {error.strerror}; name another "
                "port, or 0 for any that is free"
            ) from None
        self.url = f"http://{_HOST}:{self._server.server_address[1]}/metrics"
        self._thread = threading.Thread(target=self._server.run, name="metrics", daemon=True)
        self._thread.start()

    def publish(self, status: Mapping[str, Any]) -> None:
        """Answer the scrape that waits. Nothing may change ``status`` any more."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.request_descriptor, 4096)
        self._snapshot = status
        self._is_answered.set()

    def snapshot(self) -> Mapping[str, Any] | None:
        """A status map of now; None if the loop does not answer. The server's thread alone."""
        self._is_answered.clear()
        with contextlib.suppress(BlockingIOError, OSError):
            os.write(self._request_writer, b"\0")
        return self._snapshot if self._is_answered.wait(_SNAPSHOT_TIMEOUT_S) else None

    def close(self) -> None:
        """Serve no more."""
        self._server.stop()
        self._is_answered.set()
        self._thread.join(_JOIN_TIMEOUT_S)
        os.close(self.request_descriptor)
        os.close(self._request_writer)


class _Server(socketserver.TCPServer):
    """One request after the other; between requests the thread sleeps in the kernel."""

    allow_reuse_address = True

    def __init__(self, port: int, metrics: MetricsServer) -> None:
        self.metrics = metrics
        self._is_stopping = False
        super().__init__((_HOST, port), _Handler)

    def run(self) -> None:
        """Serve until ``stop``."""
        while not self._is_stopping:
            self.handle_request()
        self.server_close()

    def stop(self) -> None:
        """End ``run``; any thread."""
        self._is_stopping = True
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # wakes the poll for a connection

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader that goes away in the middle is no error of ours."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server
    timeout = _CLIENT_TIMEOUT_S

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404, explain="The counters are at /metrics.")
            return
        status = self.server.metrics.snapshot()
        if status is None:
            self.send_error(503, explain="The coordinator does not answer.")
            return
        page = render(status).encode()
        self.send_response(200)
        self.send_header("Content-Type", _CONTENT_TYPE)
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Scrapes are no news."""
