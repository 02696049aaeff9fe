"""The text side of one request: from drawn token ids to text, stops and messages.

``on_token`` runs for every token of every request: it is written for time.
"""

from __future__ import annotations

import array
import dataclasses
from collections.abc import Iterable

from ember_pp import protocol
from ember_pp.coordinator.sequence import Sequence
from ember_pp.sampling_params import SamplingParams
from ember_pp.tokenizer import IncrementalDetokenizer, StopMatcher


@dataclasses.dataclass(slots=True, eq=False)
class Request:
    """What a client sent and is waiting for; the scheduler sees only ``sequence``."""

    request_id: str
    client: bytes
    """Identity of the client at the coordinator's socket."""
    sequence: Sequence
    params: SamplingParams
    eos_token_ids: frozenset[int]
    stream: bool
    detokenizer: IncrementalDetokenizer | None
    """None without a tokenizer: then there is no text, only ids."""
    matcher: StopMatcher | None
    """None when the request has no stop strings."""
    replica: int = 0
    """Which pipeline it was given to."""
    num_output_tokens: int = 0
    stop_reason: str | int | None = None
    _text: list[str] = dataclasses.field(default_factory=list)
    _token_ids: array.array[int] = dataclasses.field(default_factory=lambda: array.array("i"))
    _logprobs: list[protocol.TokenLogprobs] = dataclasses.field(default_factory=list)
    _ending_ids: frozenset[int] = dataclasses.field(init=False)
    _num_prompt_tokens: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        eos_token_ids = frozenset() if self.params.ignore_eos else self.eos_token_ids
        self._ending_ids = eos_token_ids.union(self.params.stop_token_ids)
        self._num_prompt_tokens = self.sequence.num_prompt_tokens

    def on_token(self, token_id: int, logprobs: protocol.TokenLogprobs | None) -> str | None:
        """Take the next drawn token; returns the finish reason if the answer ends with it.

        The text of an ending token (end-of-text, ``stop_token_ids``) is not part of the answer;
        its id is.
        """
        self.num_output_tokens += 1
        self._token_ids.append(token_id)
        if logprobs is not None:
            self._logprobs.append(logprobs)
        if token_id in self._ending_ids:
            if token_id in self.params.stop_token_ids:
                self.stop_reason = token_id
            return self._end_text("stop")
        if self.detokenizer is not None:
            text = self.detokenizer.push_one(token_id)
            if text and self._add_text(text):
                return "stop"
        if self.num_output_tokens + self._num_prompt_tokens >= self.sequence.max_total_tokens:
            return self._end_text("length")
        return None

    def take_finished(self, finish_reason: str) -> protocol.Finished:
        """The last message of this request, with what no delta has carried."""
        finished = protocol.Finished(
            request_id=self.request_id,
            text="".join(self._text),
            token_ids=protocol.pack_i32(self._token_ids),
            logprobs=self._logprobs,
            finish_reason=finish_reason,
            stop_reason=self.stop_reason,
            num_prompt_tokens=self.sequence.num_prompt_tokens,
            num_cached_tokens=self.sequence.num_cached_tokens,
            num_output_tokens=self.num_output_tokens,
        )
        self._clear()
        return finished

    def _clear(self) -> None:
        self._text, self._logprobs = [], []
        self._token_ids = array.array("i")

    def _add_text(self, text: str) -> bool:
        """Append text; True when a stop string completed in it."""
        if self.matcher is None:
            self._text.append(text)
            return False
        safe, matched = self.matcher.push(text)
        self._text.append(safe)
        if matched is None:
            return False
        self.stop_reason = matched
        return True

    def _end_text(self, finish_reason: str) -> str:
        """Let out what the detokenizer and the matcher held back; a stop string may end in it."""
        if self.detokenizer is None:
            return finish_reason
        if self._add_text(self.detokenizer.flush()):
            return "stop"
        if self.matcher is not None:
            self._text.append(self.matcher.flush())
        return finish_reason


def take_deltas(requests: Iterable[Request]) -> protocol.TokenDeltas:
    """What is new of these requests, which are of one client, since the last deltas."""
    request_ids: list[str] = []
    texts: list[str] = []
    counts = array.array("I")
    token_ids = array.array("i")
    logprobs: list[protocol.TokenLogprobs | None] = []
    for request in requests:
        new_ids = request._token_ids
        if request._logprobs:
            logprobs += [None] * (len(token_ids) - len(logprobs))
            logprobs += request._logprobs
            request._logprobs = []
        request_ids.append(request.request_id)
        texts.append("".join(request._text))
        counts.append(len(new_ids))
        token_ids += new_ids
        request._text.clear()
        del new_ids[:]
    if logprobs:
        logprobs += [None] * (len(token_ids) - len(logprobs))
    return protocol.TokenDeltas(
        request_ids, texts, protocol.pack_u32(counts), protocol.pack_i32(token_ids), logprobs
    )
