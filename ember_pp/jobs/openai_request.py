"""OpenAI's forms of requests: a line of a batch file to what ``Client.submit`` takes.

A line is OpenAI's own (``custom_id``, ``method``, ``url``, ``body``) or the short form: the
body's fields at the top, ``messages`` for a chat, ``prompt`` or ``token_ids`` for a
completion. Each field is honoured, or refused by name; ``null`` means not given, everywhere.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, Literal

from ember_pp.chat_template import REFUSED_KWARGS, check_messages
from ember_pp.errors import InvalidRequestError
from ember_pp.sampling_params import SamplingParams, suggest

MAX_CUSTOM_ID_CHARS = 512
_MAX_DEPTH = 64

_URLS: Mapping[str, Literal["chat", "completion"]] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completion",
}
_ENVELOPE = ("custom_id", "method", "url", "body")
_PROMPTS = ("prompt", "messages", "token_ids")

_FLOAT_FIELDS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
_SAMPLING_FIELDS = (
    *_FLOAT_FIELDS,
    "top_k",
    "logit_bias",
    "seed",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "skip_special_tokens",
)
_LIMITS = ("max_tokens", "max_completion_tokens")
"""Two names of one field."""
_ANNOTATIONS: Mapping[str, type] = {
    "user": str,
    "safety_identifier": str,
    "prompt_cache_key": str,
    "metadata": dict,
    "store": bool,
}
"""Fields about the request that say nothing about the answer, with their types."""

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "stream": (False,),
    "echo": (False,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "service_tier": ("auto", "default"),
}
"""Fields of which we can do only these values: what OpenAI does without the field."""

_CHAT_ONLY = (
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "top_logprobs",
    "chat_template_kwargs",
    "modalities",
    "response_format",
)
_COMPLETION_ONLY = ("best_of", "echo", "suffix")
_KNOWN_FIELDS = (
    "model",
    *_PROMPTS,
    *_SAMPLING_FIELDS,
    *_ANNOTATIONS,
    *_NEUTRAL,
    *_LIMITS,
    "logprobs",
    "return_token_ids",
    *_CHAT_ONLY,
)

_ADVICE: Mapping[str, str] = {
    "n": "write one line per answer, with ids of their own",
    "best_of": "write one line per answer, with ids of their own",
    "stream": "a batch answers when the answer is complete; leave it out",
    "stream_options": "a batch does not stream; leave it out",
    "echo": "put prompt and answer together yourself",
    "suffix": "the text after the answer cannot be given",
    "response_format": 'answers are free text: {"type": "text"}',
    "modalities": 'answers are text: ["text"]',
    "parallel_tool_calls": "calls are text of the answer and are not counted; leave it out",
    "service_tier": "there is one tier; leave it out",
    "functions": "use tools",
    "function_call": "use tool_choice",
    "tool_choice": 'use "auto" or "none"; calls stay in the text of the answer',
    "reasoning_effort": 'use chat_template_kwargs, such as {"enable_thinking": false}',
    "enable_thinking": 'use chat_template_kwargs: {"enable_thinking": false}',
    "extra_body": "put its fields beside the others",
    "max_new_tokens": "use max_tokens",
    "max_length": "use max_tokens",
    "max_output_tokens": "use max_tokens",
    "input": "use messages or prompt",
    "instructions": "use a system message",
    "prompt_token_ids": "use token_ids",
    "include_stop_str_in_output": "an answer ends before its stop string",
    "audio": "answers are text",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class BatchRequest:
    """What one line of a batch asks for; exactly one of the three prompts is given."""

    custom_id: str
    kind: Literal["chat", "completion"]
    model: str | None = None
    """The name in the line; the coordinator has one model, so this chooses nothing."""
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    """As ``check_messages`` returns them."""
    token_ids: list[int] | None = None
    sampling: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The ``SamplingParams`` fields that the line gives, checked."""
    template_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    return_token_ids: bool = False

    @property
    def has_logprobs(self) -> bool:
        """True when the answer must carry log-probabilities."""
        return self.sampling.get("logprobs") is not None


# --------------------------------------------------------------------------------------
# a line in


def parse_line(line: Any, line_number: int) -> BatchRequest:
    """The request in ``line``, a decoded line of the input.

    A line without ``custom_id`` gets ``line-<line_number>``.

    Raises:
        InvalidRequestError: a field is unknown, not supported, missing or has a wrong value;
            the text starts with its name.
    """
    if not isinstance(line, Mapping):
        raise InvalidRequestError(f"expected a JSON object, got {_shown(line)}")
    _check_keys(line, "")
    custom_id = _custom_id(line.get("custom_id"), line_number)
    if any(line.get(name) is not None for name in ("method", "url", "body")):
        kind, body = _open_envelope(line)
    else:
        body = {name: value for name, value in line.items() if name != "custom_id"}
        kind = "chat" if body.get("messages") is not None else "completion"
    given = {name: value for name, value in body.items() if value is not None}
    for name in given:
        _check_field(name, given[name], kind)
    return BatchRequest(
        custom_id=custom_id,
        kind=kind,
        model=_typed("model", given.get("model"), str),
        sampling=_sampling(given, kind),
        template_kwargs=_template_kwargs(given) if kind == "chat" else {},
        return_token_ids=bool(_typed("return_token_ids", given.get("return_token_ids"), bool)),
        **_prompt(given, kind),
    )


def to_submit_fields(request: BatchRequest) -> dict[str, Any]:
    """Keyword arguments of ``Client.submit`` for ``request``, without ``seed_key``."""
    return {
        "prompt": request.prompt,
        "messages": request.messages,
        "token_ids": request.token_ids,
        "sampling": dict(request.sampling),
        "template_kwargs": dict(request.template_kwargs),
    }


def request_hash(request: BatchRequest) -> str:
    """SHA-256, in hex, of everything that ``request`` asks for, its ``model`` included.

    Spelling does not matter: the order of fields, ``stop`` as text or list, 1 or 1.0,
    ``max_tokens`` or ``max_completion_tokens``, content as text or as parts. ``custom_id``
    is left out: it is the key under which the hash is kept.
    """
    names = (field.name for field in dataclasses.fields(request))
    content = {name: getattr(request, name) for name in names if name != "custom_id"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _custom_id(value: Any, line_number: int) -> str:
    if value is None:
        return f"line-{line_number}"
    if not isinstance(value, str) or not 0 < len(value) <= MAX_CUSTOM_ID_CHARS:
        raise InvalidRequestError(
            f"custom_id: expected text of 1 to {MAX_CUSTOM_ID_CHARS} characters, "
            f"got {_shown(value)}"
        )
    _check_plain("custom_id", value)
    return value


def _open_envelope(
    line: Mapping[str, Any],
) -> tuple[Literal["chat", "completion"], Mapping[str, Any]]:
    for name in line:
        if name not in _ENVELOPE:
            place = "; put it into body" if name in _KNOWN_FIELDS else suggest(name, _ENVELOPE)
            raise InvalidRequestError(f"{_short(name)}: not a field of a batch line{place}")
    if line.get("method") not in (None, "POST"):
        raise InvalidRequestError(f'method: expected "POST", got {_shown(line["method"])}')
    url = line.get("url")
    kind = _URLS.get(url) if isinstance(url, str) else None
    if kind is None:
        hint = suggest(url, _URLS) if isinstance(url, str) else ""
        raise InvalidRequestError(f"url: expected {' or '.join(_URLS)}, got {_shown(url)}{hint}")
    body = line.get("body")
    if not isinstance(body, Mapping):
        raise InvalidRequestError(f"body: expected a JSON object, got {_shown(body)}")
    _check_keys(body, "body: ")
    return kind, body


def _check_field(name: str, value: Any, kind: str) -> None:
    """Refuse a field that is unknown, of the other kind of request, or beyond us."""
    if name not in _KNOWN_FIELDS:
        advice = _ADVICE.get(name)
        hint = f"; {advice}" if advice else suggest(name, _KNOWN_FIELDS)
        raise InvalidRequestError(f"{_short(name)}: not supported{hint}")
    if kind == "completion" and name in _CHAT_ONLY:
        raise InvalidRequestError(f"{name}: only for chats (messages, /v1/chat/completions)")
    if kind == "chat" and name in _COMPLETION_ONLY:
        raise InvalidRequestError(f"{name}: only for completions (prompt, /v1/completions)")
    if name in _ANNOTATIONS:
        _typed(name, value, _ANNOTATIONS[name])
    if name in _NEUTRAL:
        allowed = _NEUTRAL[name]
        if not any(type(value) is type(option) and value == option for option in allowed):
            raise InvalidRequestError(f"{name}: {_shown(value)} is not supported; {_ADVICE[name]}")


def _prompt(given: Mapping[str, Any], kind: str) -> dict[str, Any]:
    names = [name for name in _PROMPTS if name in given]
    if len(names) != 1:
        found = f"both {' and '.join(names)}" if names else "none"
        raise InvalidRequestError(f"expected one of prompt, token_ids and messages, got {found}")
    name = names[0]
    if (name == "messages") != (kind == "chat"):
        wanted = "messages" if kind == "chat" else "prompt"
        raise InvalidRequestError(f"{name}: expected {wanted} for this url")
    value = given[name]
    if name == "messages":
        _check_plain(name, value)
        return {"messages": check_messages(value)}
    if name == "prompt" and isinstance(value, list) and not _is_token_ids(value):
        value = _only_prompt(value)
    if name == "prompt" and isinstance(value, str):
        _check_plain(name, value)
        return {"prompt": value}
    if not _is_token_ids(value):
        kinds = "text or a list of token ids" if name == "prompt" else "a list of token ids"
        raise InvalidRequestError(f"{name}: expected {kinds}, got {_shown(value)}")
    return {"token_ids": list(value)}


def _only_prompt(prompts: list[Any]) -> Any:
    if len(prompts) > 1 and all(isinstance(prompt, str | list) for prompt in prompts):
        raise InvalidRequestError(
            f"prompt: {len(prompts)} prompts in one line; write one line per prompt"
        )
    if not prompts:
        raise InvalidRequestError("prompt: empty; give at least one token")
    return prompts[0] if len(prompts) == 1 else prompts


def _is_token_ids(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(type(token_id) is int for token_id in value)
        and min(value) >= 0
        and max(value) < 2**31
    )


def _sampling(given: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The fields of ``SamplingParams`` in one spelling: floats, lists, integer keys."""
    sampling = {name: given[name] for name in _SAMPLING_FIELDS if name in given}
    limits = {name: given[name] for name in _LIMITS if name in given}
    if len(limits) == 2 and limits[_LIMITS[0]] != limits[_LIMITS[1]]:
        raise InvalidRequestError(f"{_LIMITS[1]}: differs from {_LIMITS[0]}; give one of them")
    for name, value in limits.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidRequestError(f"{name}: expected a whole number, got {_shown(value)}")
        sampling["max_tokens"] = value
    logprobs = _num_logprobs(given, kind)
    if logprobs is not None:
        sampling["logprobs"] = logprobs
    params = SamplingParams.from_mapping(sampling)
    for name in sampling:
        value = getattr(params, name)
        if name in _FLOAT_FIELDS:
            value = float(value) + 0.0  # -0.0 becomes 0.0
        elif name == "logit_bias":
            value = {token_id: float(bias) for token_id, bias in value.items()}
        elif isinstance(value, tuple):
            value = list(value)
        sampling[name] = value
    return sampling


def _num_logprobs(given: Mapping[str, Any], kind: str) -> Any:
    """How many of the most likely tokens to tell at each position; None: nothing at all."""
    logprobs = given.get("logprobs")
    if kind == "completion":
        return logprobs
    if logprobs is not None and not isinstance(logprobs, bool):
        raise InvalidRequestError(
            f"logprobs: expected true or false, got {_shown(logprobs)}; the number of "
            "tokens is top_logprobs"
        )
    top_logprobs = given.get("top_logprobs")
    if logprobs:
        return 0 if top_logprobs is None else top_logprobs
    if top_logprobs is not None and (top_logprobs != 0 or isinstance(top_logprobs, bool)):
        raise InvalidRequestError("top_logprobs: needs logprobs: true")
    return None


def _template_kwargs(given: Mapping[str, Any]) -> dict[str, Any]:
    kwargs = dict(_typed("chat_template_kwargs", given.get("chat_template_kwargs"), dict) or {})
    _check_keys(kwargs, "chat_template_kwargs: ")
    for name in kwargs:
        if name in REFUSED_KWARGS:
            raise InvalidRequestError(f"chat_template_kwargs.{name}: {REFUSED_KWARGS[name]}")
    _check_plain("chat_template_kwargs", kwargs)
    tools = given.get("tools")
    if tools is not None and kwargs.get("tools") is not None:
        raise InvalidRequestError("chat_template_kwargs.tools: given beside tools; give one")
    tools = kwargs.pop("tools", None) if tools is None else tools
    _check_tools(tools)
    choice = given.get("tool_choice", "auto")
    if choice not in ("auto", "none"):
        raise InvalidRequestError(
            f"tool_choice: {_shown(choice)} is not supported; {_ADVICE['tool_choice']}"
        )
    # "none" promises that the model calls none: it is not told of any.
    return {**kwargs, "tools": tools} if tools and choice == "auto" else kwargs


def _check_tools(tools: Any) -> None:
    if tools is None:
        return
    if not isinstance(tools, list):
        raise InvalidRequestError(f"tools: expected a list, got {_shown(tools)}")
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise InvalidRequestError(f"tools[{i}]: expected a map, got {_shown(tool)}")
        if tool.get("type", "function") != "function":
            raise InvalidRequestError(
                f"tools[{i}].type: {_shown(tool['type'])} is not supported; use function"
            )
    _check_plain("tools", tools)


# --------------------------------------------------------------------------------------
# checks


def _typed(name: str, value: Any, expected: type) -> Any:
    if value is None:
        return None
    if type(value) is not expected:
        words = {str: "text", dict: "a map", bool: "true or false"}
        raise InvalidRequestError(f"{name}: expected {words[expected]}, got {_shown(value)}")
    _check_plain(name, value)
    return value


def _check_keys(fields: Mapping[Any, Any], where: str) -> None:
    for name in fields:
        if not isinstance(name, str):
            raise InvalidRequestError(f"{where}expected names as keys, got {_shown(name)}")


def _check_plain(where: str, value: Any, depth: int = 0) -> None:
    """Refuse what cannot travel or be hashed: lone surrogates, NaN, huge numbers, deep nests."""
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise InvalidRequestError(f"{where}: not valid Unicode (a lone surrogate)")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise InvalidRequestError(f"{where}: expected finite numbers, got {value}")
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**64:
            raise InvalidRequestError(f"{where}: a number of more than 64 bits")
    elif depth >= _MAX_DEPTH:
        raise InvalidRequestError(f"{where}: nested more than {_MAX_DEPTH} deep")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise InvalidRequestError(f"{where}: expected names as keys, got {_shown(key)}")
            _check_plain(where, key, depth + 1)
            _check_plain(where, item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_plain(where, item, depth + 1)
    elif value is not None:
        raise InvalidRequestError(f"{where}: not a JSON value: {type(value).__name__}")


def _short(name: str) -> str:
    return name if len(name) <= 80 else f"{name[:80]}..."


def _shown(value: Any) -> str:
    """``value`` for an error text: short, whatever it is."""
    if value is None or isinstance(value, bool | str | float):
        return _short(json.dumps(value))
    if isinstance(value, int):
        return str(value) if abs(value) < 10**20 else "a huge number"
    if isinstance(value, list | Mapping) and len(value) <= 3:
        try:
            return _short(json.dumps(value))
        except (TypeError, ValueError, RecursionError):
            pass
    return f"a {type(value).__name__}"
