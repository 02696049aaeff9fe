"""OpenAI's forms of answers: response objects, and the lines of the output files."""

from __future__ import annotations

import codecs
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ember_pp import protocol
from ember_pp.client import Completion
from ember_pp.errors import (
    DeadlineExceededError,
    EmberError,
    InvalidRequestError,
    RequestAbortedError,
    UnavailableError,
)
from ember_pp.jobs.openai_request import BatchRequest
from ember_pp.text_stream import split_reasoning

_MIN_LOGPROB = -9999.0
"""What OpenAI writes for a probability of zero; JSON has no infinity."""

TokenBytes = Callable[[int], bytes]
"""The bytes that a token adds to a text: ``Tokenizer.token_bytes``."""


def success_body(
    request: BatchRequest,
    completion: Completion,
    *,
    created: int = 0,
    model_name: str | None = None,
    token_bytes: TokenBytes | None = None,
    is_thinking_open: bool | None = None,
) -> dict[str, Any]:
    """OpenAI's ``chat.completion`` or ``text_completion`` object for an answer.

    Beyond OpenAI's: ``choices[].stop_reason``, ``choices[].token_ids`` where asked,
    ``message.reasoning_content`` where there was thinking, and ``metrics`` for what depends on
    the run: ``choices`` and ``usage`` depend on the request alone.

    Args:
        created: seconds since 1970.
        model_name: name of the model; None: the one in the line.
        token_bytes: spells tokens in log-probabilities; without it they are ``token_id:<id>``.
        is_thinking_open: see ``split_reasoning``; ``Tokenizer.opens_thinking`` knows.
    """
    is_chat = request.kind == "chat"
    spell = _Speller(token_bytes)
    choice: dict[str, Any] = {"index": 0}
    if is_chat:
        choice["message"] = _message(completion.text, is_thinking_open)
        logprobs = _chat_logprobs(completion, spell)
    else:
        choice["text"] = completion.text
        logprobs = _completion_logprobs(completion, spell)
    choice["logprobs"] = logprobs if request.has_logprobs else None
    choice["finish_reason"] = completion.finish_reason
    choice["stop_reason"] = completion.stop_reason
    if request.return_token_ids:
        choice["token_ids"] = list(completion.token_ids)
    return {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{completion.request_id}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": created,
        "model": model_name or request.model or "",
        "choices": [choice],
        "usage": {
            "prompt_tokens": completion.num_prompt_tokens,
            "completion_tokens": completion.num_output_tokens,
            "total_tokens": completion.num_prompt_tokens + completion.num_output_tokens,
        },
        "metrics": {"num_cached_tokens": completion.num_cached_tokens},
    }


def output_line(request: BatchRequest, body: Mapping[str, Any]) -> dict[str, Any]:
    """The line of the output file for an answer, ``body`` from ``success_body``."""
    request_id = str(body["id"]).partition("-")[2]
    return {
        "id": f"batch_req_{request_id}",
        "custom_id": request.custom_id,
        "response": {"status_code": 200, "request_id": request_id, "body": dict(body)},
        "error": None,
    }


def error_line(custom_id: str, error: EmberError, *, request_id: str = "") -> dict[str, Any]:
    """The line of the errors file for a request that came to nothing."""
    digest = hashlib.sha256(custom_id.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    message = str(error)
    return {
        "id": f"batch_req_{request_id or digest}",
        "custom_id": custom_id,
        "response": {
            "status_code": status_code(error),
            "request_id": request_id,
            "body": {"error": {"message": message, "type": error.code, "code": error.code}},
        },
        "error": {"code": error.code, "message": message},
    }


def status_code(error: EmberError) -> int:
    """The HTTP status that says the same as ``error``."""
    for error_type, status in (
        (InvalidRequestError, 400),
        (RequestAbortedError, 499),
        (UnavailableError, 503),
        (DeadlineExceededError, 504),
    ):
        if isinstance(error, error_type):
            return status
    return 500


def _message(text: str, is_thinking_open: bool | None) -> dict[str, Any]:
    reasoning, content = split_reasoning(text, is_open=is_thinking_open)
    message = {"role": "assistant", "content": content}
    return message if reasoning is None else {**message, "reasoning_content": reasoning}


class _Speller:
    """Tokens as text and bytes, in OpenAI's two ways."""

    def __init__(self, token_bytes: TokenBytes | None) -> None:
        self._token_bytes = token_bytes

    def raw(self, token_id: int) -> bytes | None:
        return None if self._token_bytes is None else self._token_bytes(token_id)

    def chat_entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self.raw(token_id)
        token = f"token_id:{token_id}" if raw is None else raw.decode("utf-8", "replace")
        listed = None if raw is None else list(raw)
        return {"token": token, "logprob": _finite(logprob), "bytes": listed}

    def completion_token(self, token_id: int) -> str:
        """Text of a token; ``bytes:\\xe4\\xbd`` for a part of a character."""
        raw = self.raw(token_id)
        if raw is None:
            return f"token_id:{token_id}"
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _finite(logprob: float) -> float:
    return max(logprob, _MIN_LOGPROB) if math.isfinite(logprob) else _MIN_LOGPROB


def _top(position: protocol.TokenLogprobs) -> list[tuple[int, float]]:
    """The most likely tokens and their log-probabilities, most likely first."""
    token_ids = protocol.unpack_i32(position.top_ids)
    return list(zip(token_ids, protocol.unpack_f32(position.top_logprobs), strict=True))


def _positions(completion: Completion) -> Sequence[tuple[int, protocol.TokenLogprobs]]:
    return list(zip(completion.token_ids, completion.logprobs, strict=False))


def _chat_logprobs(completion: Completion, spell: _Speller) -> dict[str, Any]:
    content = []
    for token_id, position in _positions(completion):
        entry = spell.chat_entry(token_id, position.logprob)
        entry["top_logprobs"] = [spell.chat_entry(*top) for top in _top(position)]
        content.append(entry)
    return {"content": content, "refusal": None}


def _completion_logprobs(completion: Completion, spell: _Speller) -> dict[str, Any]:
    positions = _positions(completion)
    tops = [
        {spell.completion_token(token_id): _finite(logprob) for token_id, logprob in _top(position)}
        for _, position in positions
    ]
    return {
        "tokens": [spell.completion_token(token_id) for token_id, _ in positions],
        "token_logprobs": [_finite(position.logprob) for _, position in positions],
        "top_logprobs": tops if any(tops) else None,
        "text_offset": _text_offsets(completion, spell),
    }


def _text_offsets(completion: Completion, spell: _Speller) -> list[int]:
    """Where each token begins in the answer's text, in characters."""
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    offsets, num_chars = [], 0
    for token_id, _ in _positions(completion):
        offsets.append(min(num_chars, len(completion.text)))
        num_chars += len(utf8.decode(spell.raw(token_id) or b""))
    return offsets
