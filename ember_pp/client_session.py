"""The protocol of a client without input or output: what was sent, what has come, what ended.

``Client`` and ``AsyncClient`` are two ways to move its messages.
"""

from __future__ import annotations

import collections
import dataclasses
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

from ember_pp import protocol
from ember_pp.errors import (
    DeadlineExceededError,
    EmberError,
    InvalidRequestError,
    ProtocolError,
    UnavailableError,
    from_wire,
)
from ember_pp.protocol import TokenLogprobs
from ember_pp.sampling_params import SamplingParams

Messages = Sequence[Mapping[str, Any]]
Sampling = SamplingParams | Mapping[str, Any] | None
_OwnerT = TypeVar("_OwnerT")

MAX_SUBMIT_BYTES = 16 * 1024 * 1024
"""Above it a coordinator with the default ``coordinator.max_message_bytes`` hangs up."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What is new of a streamed answer."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    received_s: float = dataclasses.field(default_factory=time.monotonic, compare=False)
    """When it came, by ``time.monotonic``."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A whole answer."""

    request_id: str
    text: str
    token_ids: list[int]
    """Generated ids, with the token that ended the answer."""
    logprobs: list[TokenLogprobs]
    """One per token id, or empty when not asked for."""
    finish_reason: str
    """``stop``, ``length`` or ``abort``."""
    stop_reason: str | int | None
    """The stop string or stop token id that ended it, if one did."""
    num_prompt_tokens: int
    num_cached_tokens: int
    """Prompt tokens that were found in the prefix cache."""
    num_output_tokens: int


class RequestState:
    """What has come for one request so far."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.deltas: collections.deque[Delta] = collections.deque()
        self.completion: Completion | None = None
        self.error: EmberError | None = None
        self.text: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []

    @property
    def has_ended(self) -> bool:
        return self.completion is not None or self.error is not None

    def add(self, delta: Delta) -> None:
        self.text.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        if delta.text or delta.token_ids:
            self.deltas.append(delta)

    def finish(self, message: protocol.Finished) -> None:
        token_ids = list(protocol.unpack_i32(message.token_ids))
        self.add(Delta(text=message.text, token_ids=token_ids, logprobs=message.logprobs))
        self.completion = Completion(
            request_id=self.request_id,
            text="".join(self.text),
            token_ids=self.token_ids,
            logprobs=self.logprobs,
            finish_reason=message.finish_reason,
            stop_reason=message.stop_reason,
            num_prompt_tokens=message.num_prompt_tokens,
            num_cached_tokens=message.num_cached_tokens,
            num_output_tokens=message.num_output_tokens,
        )

    def outcome(self) -> Completion:
        """The completion; raises what the request failed with."""
        if self.error is not None:
            raise self.error
        if self.completion is None:
            raise AssertionError("the request has not ended")
        return self.completion


class CancelTicket:
    """One ``Cancel``; answers come in the order of asking."""

    def __init__(self) -> None:
        self.num_cancelled: int | None = None
        """How many requests it ended; None until it is answered."""


class ClientSession(Generic[_OwnerT]):
    """The protocol of a client, without input or output.

    ``_OwnerT`` is what the client hands to its user for a request: ``Request`` or
    ``AsyncRequest``.
    """

    def __init__(self, address: str, timeout_s: float) -> None:
        self.address = address
        self.timeout_s = timeout_s
        self.whereabouts = (
            f"coordinator at {address} (is it running? job=serve coordinator.address={address})"
        )
        self.open: dict[str, tuple[RequestState, _OwnerT]] = {}
        self.ended: dict[_OwnerT, None] = {}
        """What ended and has not been handed out yet, oldest first."""
        self.status: dict[str, Any] | None = None
        self._asked_to_cancel: collections.deque[CancelTicket] = collections.deque()
        self.heard_at_s = time.monotonic()
        self._asked_at_s: float | None = None
        self._asked_about: collections.deque[list[str]] = collections.deque()

    def submit(
        self,
        prompt: str | None,
        *,
        messages: Messages | None = None,
        token_ids: Sequence[int] | None = None,
        sampling: Sampling = None,
        template_kwargs: Mapping[str, Any] | None = None,
        stream: bool = False,
        request_id: str | None = None,
        seed_key: str | None = None,
    ) -> protocol.Submit:
        """The message of a new request.

        Raises:
            InvalidRequestError: an id that is open, or values that no message can carry.
        """
        if request_id is not None and request_id in self.open:
            raise InvalidRequestError(f"request_id: {request_id!r} is open already")
        if isinstance(sampling, SamplingParams):
            sampling = sampling.to_mapping()
        try:
            packed_ids = None if token_ids is None else protocol.pack_i32(token_ids)
        except (TypeError, OverflowError) as error:
            raise InvalidRequestError(
                f"token_ids: expected 32-bit whole numbers: {error}"
            ) from None
        submit = protocol.Submit(
            request_id=request_id or f"req-{uuid.uuid4().hex}",
            prompt=prompt,
            messages=None if messages is None else [dict(message) for message in messages],
            token_ids=packed_ids,
            sampling=dict(sampling or {}),
            template_kwargs=dict(template_kwargs or {}),
            stream=stream,
            seed_key=seed_key or "",
        )
        _check_can_travel(submit)
        return submit

    def add(self, state: RequestState, owner: _OwnerT) -> None:
        """The request has been sent; call in the order of sending."""
        self.open[state.request_id] = (state, owner)

    def ask_cancel(self) -> CancelTicket:
        """A ``Cancel`` is sent, now: the place where its answer will be."""
        ticket = CancelTicket()
        self._asked_to_cancel.append(ticket)
        return ticket

    def ask_status(self) -> protocol.Status:
        """A question for the status, which also tells which requests the coordinator has."""
        self._asked_about.append(list(self.open))
        return protocol.Status()

    def _give_up_lost(self, open_request_ids: list[str]) -> None:
        """Fail requests that were sent before the question and that the answer does not name.

        It was restarted, or the connection broke and it takes us for somebody else now. The
        socket keeps order, so what ended properly was heard of before this answer.
        """
        asked_about = self._asked_about.popleft() if self._asked_about else []
        for request_id in set(asked_about).difference(open_request_ids).intersection(self.open):
            lost = UnavailableError(f"{self.whereabouts}: it does not know this request any more")
            self._end(request_id, error=lost)

    def handle(self, message: protocol.Message) -> None:
        """Take one message of the coordinator."""
        self.heard_at_s = time.monotonic()
        self._asked_at_s = None
        match message:
            case protocol.StatusReply():
                self.status = message.status
                self._give_up_lost(message.open_request_ids)
            case protocol.CancelReply():
                if self._asked_to_cancel:
                    self._asked_to_cancel.popleft().num_cancelled = message.num_cancelled
            case protocol.Accepted():
                pass
            case protocol.RequestFailed(request_id="", error=error):
                raise from_wire(error)
            case protocol.RequestFailed():
                self._end(message.request_id, error=from_wire(message.error))
            case protocol.TokenDeltas():
                for request_id, delta in _split(message):
                    if request_id in self.open:
                        self.open[request_id][0].add(delta)
            case protocol.Finished():
                self._end(message.request_id, finished=message)
            case _:
                raise ProtocolError(f"{type(message).__name__} is no message for a client")

    def _end(
        self,
        request_id: str,
        *,
        finished: protocol.Finished | None = None,
        error: EmberError | None = None,
    ) -> None:
        state, owner = self.open.pop(request_id, (None, None))
        if state is None or owner is None:
            return  # it was given up already
        if finished is not None:
            state.finish(finished)
        state.error = error
        self.ended[owner] = None

    def forget(self, owner: _OwnerT) -> None:
        """Its outcome has been taken; nobody needs to be told that it ended."""
        self.ended.pop(owner, None)

    def needs_sign_of_life(self) -> bool:
        """True when the coordinator has been silent for long and should be asked for status.

        Raises:
            DeadlineExceededError: it was asked and has not answered either.
        """
        now_s = time.monotonic()
        if self._asked_at_s is not None and now_s - self._asked_at_s > self.timeout_s:
            raise DeadlineExceededError(f"{self.whereabouts}: no answer for {self.timeout_s:g} s")
        if self._asked_at_s is None and now_s - self.heard_at_s > self.timeout_s / 2:
            self._asked_at_s = now_s
            return True
        return False


def _split(message: protocol.TokenDeltas) -> Iterator[tuple[str, Delta]]:
    """The news of each request.

    Raises:
        ProtocolError: its columns do not go together.
    """
    counts = protocol.unpack_u32(message.num_token_ids)
    token_ids = protocol.unpack_i32(message.token_ids).tolist()
    logprobs = message.logprobs
    num_requests, num_ids = len(message.request_ids), len(token_ids)
    is_whole = num_requests == len(message.texts) == len(counts) and num_ids == sum(counts)
    if not is_whole or len(logprobs) not in (0, num_ids):
        raise ProtocolError("TokenDeltas: columns of different lengths")
    start = 0
    for request_id, text, count in zip(message.request_ids, message.texts, counts, strict=True):
        own = [entry for entry in logprobs[start : start + count] if entry is not None]
        yield (
            request_id,
            Delta(text=text, token_ids=token_ids[start : start + count], logprobs=own),
        )
        start += count


def _check_can_travel(submit: protocol.Submit) -> None:
    try:
        packed = protocol.encode(submit)
        protocol.decode(packed)
    except (TypeError, ValueError, OverflowError, ProtocolError) as error:
        raise InvalidRequestError(f"this request cannot be sent: {error}") from None
    if len(packed) > MAX_SUBMIT_BYTES:
        raise InvalidRequestError(
            f"this request is {len(packed)} bytes; at most {MAX_SUBMIT_BYTES} can be sent "
            "(coordinator.max_message_bytes)"
        )
