"""What a request asks of the sampler and of the stop check.

One frozen object, validated when it is made, in the order in which it is applied
(``docs/sampling.md``): logit_bias and min_tokens, repetition penalty, presence and frequency
penalty, temperature, top_k, top_p, min_p, draw.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
from collections.abc import Mapping
from typing import Any

from ember_pp.errors import InvalidRequestError

MAX_LOGPROBS = 20
_MAX_SHOWN = 80


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling and stop settings of one request.

    Raises:
        InvalidRequestError: a value has the wrong type or is out of range; names the field.
    """

    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token, ties to the lowest id."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all. Tokens equal to the k-th are kept too."""
    top_p: float = 1.0
    """Keep the fewest tokens whose probability sums to this, of what top_k left; (0, 1]."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely; [0, 1]."""
    repetition_penalty: float = 1.0
    """Divides positive, multiplies negative logits of tokens in prompt or output; [0.01, 100]."""
    presence_penalty: float = 0.0
    """Subtracted once from tokens that the output has; [-2, 2]."""
    frequency_penalty: float = 0.0
    """Subtracted per occurrence in the output; [-2, 2]."""
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    """Added to the logits of these token ids; values in [-100, 100]."""
    seed: int | None = None
    """Key of the random numbers; None lets the coordinator choose. [-2**63, 2**64)."""
    max_tokens: int | None = None
    """Most tokens to generate; None means up to the context length."""
    min_tokens: int = 0
    """End-of-text and stop tokens are not drawn before this many tokens."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these strings."""
    stop_token_ids: tuple[int, ...] = ()
    """The answer ends with any of these tokens, as with end-of-text."""
    ignore_eos: bool = False
    """Go on past the checkpoint's end-of-text tokens."""
    logprobs: int | None = None
    """Log-probabilities of the drawn token and of this many most likely ones; [0, 20]."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, low=0.0, high=100.0)
        _check_int("top_k", self.top_k, low=0, high=2**31 - 1)
        _check_number("top_p", self.top_p, low=0.0, high=1.0, low_open=True)
        _check_number("min_p", self.min_p, low=0.0, high=1.0)
        _check_number("repetition_penalty", self.repetition_penalty, low=0.01, high=100.0)
        _check_number("presence_penalty", self.presence_penalty, low=-2.0, high=2.0)
        _check_number("frequency_penalty", self.frequency_penalty, low=-2.0, high=2.0)
        _check_logit_bias(self.logit_bias)
        if self.seed is not None:
            _check_int("seed", self.seed, low=-(2**63), high=2**64 - 1)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, low=1, high=2**31 - 1)
        _check_int("min_tokens", self.min_tokens, low=0, high=2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens: {self.min_tokens} is above max_tokens {self.max_tokens}"
            )
        _check_stop(self.stop)
        _check_stop_token_ids(self.stop_token_ids)
        for name in ("ignore_eos", "skip_special_tokens"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise InvalidRequestError(f"{name}: expected true or false, got {_shown(value)}")
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, low=0, high=MAX_LOGPROBS)

    @property
    def is_greedy(self) -> bool:
        """True when the draw is an argmax."""
        return self.temperature == 0.0

    @property
    def needs_token_counts(self) -> bool:
        """True when a penalty reads which tokens the prompt or the output has."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> SamplingParams:
        """Build from plain values, e.g. a request body or a decoded message.

        ``None`` means "not said" for every field; ``stop`` may be one string;
        ``logit_bias`` keys may be decimal strings, as JSON needs.

        Raises:
            InvalidRequestError: an unknown field (with a suggestion), a wrong type or range.
        """
        if not isinstance(values, Mapping):
            raise InvalidRequestError(f"sampling: expected a map of fields, got {_shown(values)}")
        fields = {field.name for field in dataclasses.fields(cls)}
        chosen: dict[str, Any] = {}
        for name, value in values.items():
            if name not in fields:
                shown = name[:_MAX_SHOWN] if isinstance(name, str) else _shown(name)
                raise InvalidRequestError(f"{shown}: not a sampling field{suggest(shown, fields)}")
            if value is None:
                continue
            if name == "stop":
                value = (value,) if isinstance(value, str) else _as_tuple(name, value)
            elif name == "stop_token_ids":
                value = _as_tuple(name, value)
            elif name == "logit_bias":
                value = _int_keys(value)
            chosen[name] = value
        return cls(**chosen)

    def to_mapping(self) -> dict[str, Any]:
        """Plain values of the fields that differ from their defaults, for ``from_mapping``."""
        plain: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            default = {} if field.name == "logit_bias" else field.default
            if value != default:
                if isinstance(value, tuple):
                    value = list(value)
                plain[field.name] = dict(value) if isinstance(value, Mapping) else value
        return plain


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSizes:
    """How much a request's sampling fields may hold; settings of ``coordinator`` by these names."""

    max_stop_strings: int
    max_stop_characters: int
    max_stop_token_ids: int
    max_logit_bias_entries: int

    def check(self, fields: Mapping[str, Any]) -> None:
        """Refuse what is more than one request may ask for, before anything looks at each item.

        Args:
            fields: as ``SamplingParams.from_mapping`` takes them; what it would refuse passes.

        Raises:
            InvalidRequestError: names the field and the setting that bounds it.
        """
        stop = fields.get("stop")
        strings = (stop,) if isinstance(stop, str) else stop
        longest = max((_num_items(text) for text in _items(strings)), default=0)
        for field, size, of_what, setting in (
            ("stop", _num_items(strings), "strings", "max_stop_strings"),
            ("stop", longest, "characters in a string", "max_stop_characters"),
            (
                "stop_token_ids",
                _num_items(fields.get("stop_token_ids")),
                "ids",
                "max_stop_token_ids",
            ),
            (
                "logit_bias",
                _num_items(fields.get("logit_bias")),
                "entries",
                "max_logit_bias_entries",
            ),
        ):
            limit = getattr(self, setting)
            if size > limit:
                raise InvalidRequestError(
                    f"{field}: {size} {of_what}; at most {limit} (coordinator.{setting})"
                )


def _items(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else ()


def _num_items(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple | Mapping) else 0


def check_against_vocabulary(params: SamplingParams, vocab_size: int) -> None:
    """Refuse token ids that a vocabulary of ``vocab_size`` tokens does not have.

    Raises:
        InvalidRequestError: an id in ``logit_bias`` or ``stop_token_ids`` is too large; names
            the field and the id.
    """
    named = (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids))
    for name, token_ids in named:
        largest = max(token_ids, default=0)
        if largest >= vocab_size:
            raise InvalidRequestError(
                f"{name}: token id {largest} is not in the vocabulary of {vocab_size} tokens"
            )


def derive_seed(base_seed: int, seed_key: str) -> int:
    """The seed, unsigned 64 bit, of a request without one: the same for the same key, always.

    Args:
        base_seed: ``sampling.seed`` of the run.
        seed_key: a batch line's ``custom_id``, or what else names the request.
    """
    digest = hashlib.blake2b(f"{base_seed}/{seed_key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def suggest(name: str, known: Any) -> str:
    """``; did you mean 'x'?`` for the closest known name, or nothing."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _shown(value: Any) -> str:
    """``repr`` for an error message: bounded, and never an error itself."""
    try:
        text = repr(value)
    except ValueError:  # an int of thousands of digits
        return "a number of too many digits"
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."


def _check_number(
    name: str, value: Any, *, low: float, high: float, low_open: bool = False
) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise InvalidRequestError(f"{name}: expected a number, got {_shown(value)}")
    if value < low or value > high or (low_open and value == low):
        opening = "(" if low_open else "["
        raise InvalidRequestError(
            f"{name}: expected {opening}{low:g}, {high:g}], got {_shown(value)}"
        )


def _check_int(name: str, value: Any, *, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequestError(f"{name}: expected a whole number, got {_shown(value)}")
    if not low <= value <= high:
        raise InvalidRequestError(f"{name}: expected [{low}, {high}], got {_shown(value)}")


def _check_stop(stop: Any) -> None:
    stop = _as_tuple("stop", stop)
    for text in stop:
        if not isinstance(text, str) or not text:
            raise InvalidRequestError(f"stop: expected non-empty strings, got {_shown(text)}")
        if not _is_encodable(text):
            raise InvalidRequestError(f"stop: not valid Unicode: {_shown(text)}")


def _is_encodable(text: str) -> bool:
    """False for lone surrogates, which JSON can carry and no message can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_stop_token_ids(token_ids: Any) -> None:
    token_ids = _as_tuple("stop_token_ids", token_ids)
    for token_id in token_ids:
        _check_int("stop_token_ids", token_id, low=0, high=2**31 - 1)


def _check_logit_bias(bias: Any) -> None:
    if not isinstance(bias, Mapping):
        raise InvalidRequestError(
            f"logit_bias: expected a map of token id to number, got {_shown(bias)}"
        )
    for token_id, value in bias.items():
        _check_int("logit_bias", token_id, low=0, high=2**31 - 1)
        _check_number(f"logit_bias[{token_id}]", value, low=-100.0, high=100.0)


def _as_tuple(name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, list | tuple):
        raise InvalidRequestError(f"{name}: expected a list, got {_shown(value)}")
    return tuple(value)


def _int_keys(value: Any) -> dict[int, Any]:
    if not isinstance(value, Mapping):
        raise InvalidRequestError(
            f"logit_bias: expected a map of token id to number, got {_shown(value)}"
        )
    chosen: dict[int, Any] = {}
    for key, bias in value.items():
        token_id = _token_id(key)
        if token_id in chosen:
            raise InvalidRequestError(f"logit_bias: token id {token_id} is given twice")
        chosen[token_id] = bias
    return chosen


def _token_id(key: Any) -> int:
    # int() alone would also take 1.5, True, " 1 ", "1_0" and digits of other scripts.
    if isinstance(key, int) and not isinstance(key, bool):
        return key
    if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10:
        return int(key)
    raise InvalidRequestError(f"logit_bias: keys must be token ids, got {_shown(key)}")
