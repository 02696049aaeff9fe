"""The protocol of a client without input or output: what was sent, what has come, what ended.

``Client`` and ``AsyncClient`` are two ways to move its messages.
"""

from __future__ import annotations

import collections
import dataclasses
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

from ember_pp import protocol
from ember_pp.errors import DeadlineExceededError, EmberError, ProtocolError, from_wire
from ember_pp.protocol import TokenLogprobs
from ember_pp.sampling_params import SamplingParams

Messages = Sequence[Mapping[str, Any]]
Sampling = SamplingParams | Mapping[str, Any] | None
_OwnerT = TypeVar("_OwnerT")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What is new of a streamed answer."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs]


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

    def add(self, message: protocol.TokenDelta | protocol.Finished) -> None:
        delta = Delta(
            text=message.text,
            token_ids=list(protocol.unpack_i32(message.token_ids)),
            logprobs=message.logprobs,
        )
        self.text.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        if delta.text or delta.token_ids:
            self.deltas.append(delta)

    def finish(self, message: protocol.Finished) -> None:
        self.add(message)
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
        self.ended: collections.deque[_OwnerT] = collections.deque()
        self.status: dict[str, Any] | None = None
        self.num_cancelled: int | None = None
        self.heard_at_s = time.monotonic()
        self._asked_at_s: float | None = None

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
        if isinstance(sampling, SamplingParams):
            sampling = sampling.to_mapping()
        return protocol.Submit(
            request_id=request_id or f"req-{uuid.uuid4().hex}",
            prompt=prompt,
            messages=None if messages is None else [dict(message) for message in messages],
            token_ids=None if token_ids is None else protocol.pack_i32(token_ids),
            sampling=dict(sampling or {}),
            template_kwargs=dict(template_kwargs or {}),
            stream=stream,
            seed_key=seed_key or "",
        )

    def add(self, state: RequestState, owner: _OwnerT) -> None:
        self.open[state.request_id] = (state, owner)

    def handle(self, message: protocol.Message) -> None:
        """Take one message of the coordinator."""
        self.heard_at_s = time.monotonic()
        self._asked_at_s = None
        match message:
            case protocol.StatusReply():
                self.status = message.status
            case protocol.CancelReply():
                self.num_cancelled = message.num_cancelled
            case protocol.Accepted():
                pass
            case protocol.RequestFailed(request_id="", error=error):
                raise from_wire(error)
            case protocol.RequestFailed():
                self._end(message.request_id, error=from_wire(message.error))
            case protocol.TokenDelta():
                if message.request_id in self.open:
                    self.open[message.request_id][0].add(message)
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
        self.ended.append(owner)

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
