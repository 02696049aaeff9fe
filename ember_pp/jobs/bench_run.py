"""Sends a workload through a client, and notes when which tokens came."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from ember_pp.client import Completion, Delta
from ember_pp.errors import EmberError
from ember_pp.jobs.bench_workload import BenchWorkload, Stream

_STATS_PERIOD_S = 0.3  # stages report somewhat more often than this


class BenchAnswer(Protocol):
    """A submitted request, as ``ember_pp.client.Request``."""

    def __iter__(self) -> Any:
        """Its deltas, once it has ended."""

    def result(self) -> Completion:
        """The answer, or what it failed with."""


class BenchClient(Protocol):
    """What a benchmark needs of ``ember_pp.client.Client``."""

    @property
    def submit(self) -> Callable[..., BenchAnswer]:
        """Sends a request."""

    def wait_any(self, timeout_s: float | None = None) -> Sequence[Any]:
        """The requests that ended since the last call."""

    def status(self) -> Mapping[str, Any]:
        """State of the coordinator."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BenchRun:
    """One run of a workload."""

    elapsed_s: float
    """From the first request being sent to the last token."""
    streams: list[Stream]


def submit_all(
    client: BenchClient, workload: BenchWorkload, sampling: Mapping[str, Any], *, seed_key: str
) -> list[BenchAnswer]:
    """Send every request of ``workload`` at once, as streams, each of its full length.

    ``sampling`` beside the workload's temperature; ``seed_key`` begins the key of each.
    """
    return [
        client.submit(
            token_ids=request.token_ids,
            sampling={
                "temperature": workload.temperature,
                **sampling,
                "max_tokens": request.output_tokens,
                "ignore_eos": True,
            },
            stream=True,
            seed_key=f"{seed_key}-{index}",
        )
        for index, request in enumerate(workload.requests)
    ]


def run_once(client: BenchClient, workload: BenchWorkload, sampling: Mapping[str, Any]) -> BenchRun:
    """Send every request at once, and wait for all.

    Raises:
        EmberError: a request failed, or came back with another number of tokens.
    """
    started_s = time.monotonic()
    requests = submit_all(client, workload, sampling, seed_key="bench")
    num_ended = 0
    while num_ended < len(requests):
        num_ended += len(client.wait_any())
    streams = [
        _stream_of(answer, request.output_tokens, started_s)
        for answer, request in zip(requests, workload.requests, strict=True)
    ]
    return BenchRun(elapsed_s=max(stream.end_s for stream in streams), streams=streams)


def _stream_of(answer: BenchAnswer, output_tokens: int, started_s: float) -> Stream:
    deltas: Iterable[Delta] = list(answer)
    completion = answer.result()
    if completion.num_output_tokens != output_tokens:
        raise EmberError(
            f"a request ended with {completion.num_output_tokens} of {output_tokens} tokens "
            f"({completion.finish_reason}); the run does not count"
        )
    return Stream(
        input_tokens=completion.num_prompt_tokens,
        arrivals=[
            (delta.received_s - started_s, len(delta.token_ids))
            for delta in deltas
            if delta.token_ids
        ],
        first_token=completion.token_ids[0],
        cached_tokens=completion.num_cached_tokens,
    )


def settled_status(client: BenchClient) -> Mapping[str, Any]:
    """The status once every stage has reported its last plan, or a short while later."""
    time.sleep(_STATS_PERIOD_S)
    return client.status()


def stage_times(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Where the time of each stage went between two statuses."""
    earlier = {(stage["replica"], stage["stage_index"]): stage for stage in before["stages"]}
    return [
        _times_between(earlier[stage["replica"], stage["stage_index"]], stage)
        for stage in after["stages"]
    ]


def _times_between(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    names = ("busy", "wait_input", "wait_output", "host_gap")
    spans = {name: after.get(f"{name}_ns", 0) - before.get(f"{name}_ns", 0) for name in names}
    total_ns = sum(spans.values())
    plans = after.get("plan", -1) - before.get("plan", -1)
    return {
        "replica": after["replica"],
        "stage_index": after["stage_index"],
        "device": after["device"],
        "layers": [after["start_layer"], after["end_layer"]],
        "weight_bytes": after.get("weight_bytes"),
        "kv_bytes": after.get("kv_bytes"),
        "peak_bytes": after.get("peak_bytes"),
        "plans": plans,
        "busy_ms_per_plan": spans["busy"] / plans / 1e6 if plans > 0 else None,
        **{f"{name}_fraction": ns / total_ns if total_ns else 0.0 for name, ns in spans.items()},
    }
