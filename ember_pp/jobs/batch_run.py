"""The loop of a batch: keep a window of requests open, make each answer durable as it ends.

Knows the client by four methods and the clock by one, so that it runs in tests with neither
processes nor time.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from ember_pp.client import Completion
from ember_pp.errors import (
    EmberError,
    PipelineError,
    RequestAbortedError,
    StageError,
    TransportError,
    UnavailableError,
)
from ember_pp.jobs import openai
from ember_pp.jobs.batch_answers import AnswerWriter, encode_line
from ember_pp.jobs.batch_output import BatchOutput
from ember_pp.jobs.batch_requests import BadLine, Item
from ember_pp.jobs.progress import Progress, Tally
from ember_pp.sampling_params import derive_seed

TICK_S = 0.2
"""Longest wait for an answer before signals, fsync and progress are looked at."""
_LAST_STATUS_S = 0.6
"""Longest wait for the closing figures of the stages, which report some times a second."""
_MIN_BACKOFF_S, _MAX_BACKOFF_S = 0.05, 2.0
_MAX_HELD_WINDOWS = 8
_LOST = (TransportError, StageError, PipelineError)
"""What says that the coordinator or its pipeline is gone, not that a request is wrong."""
_MAX_HELD_BYTES = 32 * 1024 * 1024


class OpenRequest(Protocol):
    """A submitted request, as ``ember_pp.client.Request``."""

    @property
    def request_id(self) -> str:
        """Its name at the coordinator."""

    def result(self) -> Completion:
        """The answer, or what it failed with; called once it has ended."""


class BatchClient(Protocol):
    """What a batch needs of ``ember_pp.client.Client``."""

    @property
    def submit(self) -> Callable[..., OpenRequest]:
        """Sends a request, of fields as ``openai.to_submit_fields`` has them."""

    def wait_any(self, timeout_s: float | None = None) -> Sequence[OpenRequest]:
        """The requests that ended since the last call."""

    def cancel(self, request_ids: Sequence[str] = ()) -> int:
        """End requests."""

    def status(self) -> Mapping[str, Any]:
        """State of the coordinator."""


@dataclasses.dataclass(slots=True)
class _Submitted:
    item: Item
    position: int
    """Among the requests of this run, from 0: the order of the input."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Answer:
    """A line to write, and what to count once it is durable."""

    line: bytes
    tally: Tally


class InOrder:
    """Answers held back until those before them are there, or known not to come."""

    def __init__(self) -> None:
        self._held: dict[int, _Answer | None] = {}
        self._next = 0
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._held)

    def put(self, position: int, answer: _Answer | None) -> list[_Answer]:
        """What can be written now that ``position`` is settled (None: no answer to it)."""
        self._held[position] = answer
        self.num_bytes += len(answer.line) if answer else 0
        ready: list[_Answer] = []
        while self._next in self._held:
            settled = self._held.pop(self._next)
            self._next += 1
            if settled is not None:
                ready.append(settled)
                self.num_bytes -= len(settled.line)
        return ready

    def take_all(self) -> list[_Answer]:
        """What is held, gaps or not."""
        answers = [answer for _, answer in sorted(self._held.items()) if answer is not None]
        self._held.clear()
        self.num_bytes = 0
        return answers


class BatchRun:
    """One pass over ``pending``, at most ``window`` requests open at a time.

    ``tally`` counts what is durable; ``status`` is the last word of the coordinator.

    Args:
        defaults: sampling fields for requests that do not say.
        base_seed: ``sampling.seed``, for a coordinator that runs with another one; None: the
            coordinator has this job's own settings.
        stop: set from outside (a signal) to end early with what is done.
    """

    def __init__(
        self,
        client: BatchClient,
        pending: Iterator[Item | BadLine],
        output: BatchOutput,
        writer: AnswerWriter,
        progress: Progress,
        *,
        window: int,
        is_ordered: bool,
        defaults: Mapping[str, Any],
        base_seed: int | None,
        stop: threading.Event,
        grace_s: float,
        clock: Callable[[], float],
    ) -> None:
        self.tally = Tally()
        self.status: Mapping[str, Any] | None = None
        self.ready_s: float | None = None
        """When the stages were last seen loading, by ``clock``; None while they are."""
        self._client = client
        self._pending = pending
        self._has_more = True
        self._output = output
        self._writer = writer
        self._progress = progress
        self._window = window
        self._defaults = defaults
        self._base_seed = base_seed
        self._stop = stop
        self._grace_s = grace_s
        self._clock = clock
        self._open: dict[str, _Submitted] = {}
        self._retry: collections.deque[_Submitted] = collections.deque()
        self._in_order = InOrder() if is_ordered else None
        self._num_positions = 0
        self._unsynced = Tally()
        self._backoff_s = _MIN_BACKOFF_S
        self._not_before_s = 0.0
        self._loading_s = clock()
        self._next_ask_s = self._loading_s

    def run(self) -> None:
        """Return when every pending request has ended, or soon after ``stop`` is set.

        Whatever ends it, the answers that had come are durable and counted.

        Raises:
            EmberError: the coordinator is lost, or the output cannot be written.
        """
        try:
            while self._open or self._retry or self._has_more:
                if self._stop.is_set():
                    self._drain()
                    break
                self._fill_window()
                self._collect()
        except BaseException as error:
            # Slurm's signal reaches every process: whoever ends first, what is done is kept, and
            # the rest is for the next run.
            is_drained = self._stop.is_set() and isinstance(error, _LOST)
            if not is_drained:
                with contextlib.suppress(EmberError):  # the error that ended the run says more
                    self._flush()
                raise
            self._progress.note(f"stopping: {error}")
        self._flush()
        self._progress.show_running(self.tally, num_open=len(self._open), is_final=True)
        with contextlib.suppress(EmberError):  # all is done: only the table would be poorer
            self._ask_last_status()

    # -- sending

    def _fill_window(self) -> None:
        while self._has_room() and not self._stop.is_set():
            if self._retry:
                self._submit(self._retry.popleft())
                continue
            parsed = next(self._pending, None)
            if parsed is None:
                self._has_more = False
                return
            submitted_as = self._num_positions
            if isinstance(parsed, BadLine):
                self._write_error(parsed.custom_id, parsed.error)
            else:
                self._num_positions += 1
                self._submit(_Submitted(parsed, submitted_as))

    def _has_room(self) -> bool:
        if len(self._open) >= self._window or self._clock() < self._not_before_s:
            return False
        if not self._retry and not self._has_more:
            return False
        if self._in_order is None or self._retry:
            return True
        num_held = len(self._in_order)
        return num_held < _MAX_HELD_WINDOWS * self._window and (
            self._in_order.num_bytes < _MAX_HELD_BYTES
        )

    def _submit(self, submitted: _Submitted) -> None:
        fields = openai.to_submit_fields(submitted.item.request)
        fields["sampling"] = {**self._defaults, **fields["sampling"]}
        if self._base_seed is not None:
            seed = derive_seed(self._base_seed, submitted.item.custom_id)
            fields["sampling"].setdefault("seed", seed)
        try:
            request = self._client.submit(**fields, seed_key=submitted.item.custom_id)
        except UnavailableError:
            self._put_back(submitted)
        except (TransportError, StageError):
            raise
        except EmberError as error:
            self._fail(submitted, error)
        else:
            self._open[request.request_id] = submitted

    def _put_back(self, submitted: _Submitted) -> None:
        self._retry.append(submitted)
        now_s = self._clock()
        if now_s >= self._not_before_s:  # the first refusal of a round counts for all of it
            self._not_before_s = now_s + self._backoff_s
            self._backoff_s = min(2 * self._backoff_s, _MAX_BACKOFF_S)

    # -- receiving

    def _collect(self) -> None:
        """Wait for answers, at most a tick, and see to everything that is due."""
        if self._open:
            ended = self._client.wait_any(TICK_S)
        else:
            ended = []
            if self._retry:
                self._stop.wait(min(TICK_S, max(0.0, self._not_before_s - self._clock())))
        lost: EmberError | None = None
        for request in ended:
            lost = self._end(request) or lost
        if self._output.is_sync_due(self._clock()):
            self._sync()
        if lost is not None:
            raise lost
        self._show()

    def _end(self, request: OpenRequest) -> EmberError | None:
        """Settle one request; the error, if it means that the pipeline is lost."""
        submitted = self._open.pop(request.request_id, None)
        if submitted is None:
            return None
        try:
            completion = request.result()
            if completion.finish_reason == "abort":
                raise RequestAbortedError("cancelled before it was finished")
            line = self._writer.answer(submitted.item, completion)
        except UnavailableError:
            self._put_back(submitted)
        except _LOST as error:
            return error
        except EmberError as error:
            self._fail(submitted, error)
        else:
            self._succeed(submitted, completion, line)
        return None

    def _succeed(self, submitted: _Submitted, completion: Completion, line: bytes) -> None:
        self._backoff_s = _MIN_BACKOFF_S
        tally = Tally(
            num_ok=1,
            num_prompt_tokens=completion.num_prompt_tokens,
            num_cached_tokens=completion.num_cached_tokens,
            num_output_tokens=completion.num_output_tokens,
        )
        self._settle(submitted.position, _Answer(line, tally))

    def _fail(self, submitted: _Submitted, error: EmberError) -> None:
        self._write_error(submitted.item.custom_id, error)
        self._settle(submitted.position, None)

    # -- writing

    def _settle(self, position: int, answer: _Answer | None) -> None:
        if self._in_order is not None:
            self._write(self._in_order.put(position, answer))
        elif answer is not None:
            self._write([answer])

    def _write(self, answers: list[_Answer]) -> None:
        for answer in answers:
            self._output.answers.append(answer.line)
            self._unsynced.add(answer.tally)

    def _write_error(self, custom_id: str, error: EmberError) -> None:
        self._output.errors.append(encode_line(openai.error_line(custom_id, error)))
        self._unsynced.num_failed += 1

    def _sync(self) -> None:
        """Make durable what was written, and only then count it."""
        self._output.sync(self._clock())
        self.tally.add(self._unsynced)
        self._unsynced = Tally()

    def _flush(self) -> None:
        if self._in_order is not None:
            self._write(self._in_order.take_all())
        self._sync()

    # -- watching

    def _show(self) -> None:
        if self.ready_s is None and self._clock() >= self._next_ask_s:
            self._ask_status()
        if self.ready_s is None:
            self._progress.show_loading(self.status or {})
        else:
            self._progress.show_running(self.tally, num_open=len(self._open))

    def _ask_status(self) -> None:
        self.status = self._client.status()
        if self.ready_s is None and self.status.get("phase") == "ready":
            self.ready_s = self._loading_s  # not before: rates err on the low side
        self._loading_s = self._clock()
        self._next_ask_s = self._loading_s + TICK_S

    def _ask_last_status(self) -> None:
        """Ask until every stage has reported its last plan, at most a short while."""
        deadline_s = self._clock() + _LAST_STATUS_S
        self._ask_status()
        while self._clock() < deadline_s and not _is_settled(self.status or {}):
            self._stop.wait(_LAST_STATUS_S / 10)
            self._ask_status()

    def _drain(self) -> None:
        """Give what is open the grace period to end, then let go of it."""
        grace_s = 0.0 if self.ready_s is None else self._grace_s
        if self._open and grace_s:
            self._progress.note(
                f"stopping: {len(self._open):,} open requests have {grace_s:g} s to end; "
                "a second signal ends at once"
            )
        deadline_s = self._clock() + grace_s
        while self._open and self._clock() < deadline_s:
            self._retry.clear()
            self._collect()
        if self._open:
            self._client.cancel(list(self._open))


def _is_settled(status: Mapping[str, Any]) -> bool:
    """True when the figures of all stages are those after the last plan."""
    last_plan = status.get("num_plans", 0) - 1
    return all(stage.get("plan", -1) >= last_plan for stage in status.get("stages", ()))
