"""Dataclasses to arrays of plain values and back, by the declared types of their fields.

The part of ``protocol.py`` that knows no message. What a field's type allows is worked out once
per class. A plan's messages go this way, so it is made for time.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import types
import typing
from collections.abc import Callable
from typing import Any

from ember_pp.errors import ProtocolError


@dataclasses.dataclass(frozen=True, slots=True)
class Struct:
    """A part of a message: travels as an array of its fields, without tag or version."""


_Encoder = Callable[[Any], Any]
_Decoder = Callable[[Any, str], Any]


def _identity(value: Any) -> Any:
    return value


def to_array(value: Any) -> tuple[Any, ...] | list[Any]:
    """The fields of ``value``, in their order, as what msgpack can pack."""
    cls: Any = type(value)
    codec = _codec_of(cls)
    values = codec.get_values(value)
    if not codec.encoders:
        return values
    values = list(values)
    for index, encode_value in codec.encoders:
        values[index] = encode_value(values[index])
    return values


@dataclasses.dataclass(frozen=True, slots=True)
class _Codec:
    """How the fields of a class travel."""

    get_values: Callable[[Any], tuple[Any, ...] | list[Any]]
    encoders: tuple[tuple[int, _Encoder], ...]
    """Of the fields that do not travel as they are, by their index."""
    decoders: tuple[tuple[str, type[Any] | None, _Decoder], ...]
    """Name of each field, the type that needs no further look, and what looks."""


@functools.cache
def _codec_of(cls: Any) -> _Codec:
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    codecs = [_codec_for(hints[name]) for name in names]
    return _Codec(
        get_values=_values_getter(names),
        encoders=tuple(
            (index, encode_value)
            for index, (encode_value, _) in enumerate(codecs)
            if encode_value is not _identity
        ),
        decoders=tuple(
            (name, hints[name] if hints[name] in (int, str, bytes, bool) else None, decode_value)
            for name, (_, decode_value) in zip(names, codecs, strict=True)
        ),
    )


def _values_getter(names: list[str]) -> Callable[[Any], tuple[Any, ...]]:
    if len(names) > 1:
        return operator.attrgetter(*names)  # of a single name it would give no tuple
    return lambda value: tuple(getattr(value, name) for name in names)


def _codec_for(hint: Any) -> tuple[_Encoder, _Decoder]:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _union_codec(typing.get_args(hint))
    if origin is list:
        return _list_codec(typing.get_args(hint)[0])
    if origin is dict:
        return _identity, _checked(dict)
    if isinstance(hint, type) and issubclass(hint, Struct):
        return to_array, lambda value, where: from_array(hint, value, where)
    return _identity, _checked(hint)


def _checked(expected: type[Any]) -> _Decoder:
    accepted: tuple[type[Any], ...] = (float, int) if expected is float else (expected,)

    def decode_value(value: Any, where: str) -> Any:
        if not isinstance(value, accepted) or (isinstance(value, bool) and expected is not bool):
            raise ProtocolError(
                f"{where}: expected {expected.__name__}, got {type(value).__name__}"
            )
        return value

    return decode_value


def _list_codec(item_hint: Any) -> tuple[_Encoder, _Decoder]:
    if item_hint is Any:
        return _identity, _checked(list)
    encode_item, decode_item = _codec_for(item_hint)
    check_list = _checked(list)

    def decode_list(value: Any, where: str) -> list[Any]:
        return [decode_item(item, where) for item in check_list(value, where)]

    if encode_item is _identity:
        return _identity, decode_list
    return lambda value: [encode_item(item) for item in value], decode_list


def _union_codec(options: tuple[Any, ...]) -> tuple[_Encoder, _Decoder]:
    is_optional = type(None) in options
    codecs = [_codec_for(option) for option in options if option is not type(None)]

    def encode_value(value: Any) -> Any:
        return to_array(value) if isinstance(value, Struct) else value

    def decode_value(value: Any, where: str) -> Any:
        if value is None and is_optional:
            return None
        failure = ProtocolError(f"{where}: missing")
        for _, decode_option in codecs:
            try:
                return decode_option(value, where)
            except ProtocolError as error:
                failure = error
        raise failure

    return encode_value, decode_value


def from_array(cls: Any, values: Any, where: str) -> Any:
    """The ``cls`` whose ``to_array`` gave ``values``.

    Raises:
        ProtocolError: no array, or a field that is missing, extra or of the wrong type; names
            it, after ``where``.
    """
    decoders = _codec_of(cls).decoders
    if not isinstance(values, list) or len(values) != len(decoders):
        count = len(values) if isinstance(values, list) else type(values).__name__
        raise ProtocolError(f"{where}: expected {len(decoders)} fields, got {count}")
    try:
        decoded = [
            value if type(value) is exact_type else decode_value(value, "")
            for (_, exact_type, decode_value), value in zip(decoders, values, strict=True)
        ]
    except ProtocolError:  # once more, to say where
        decoded = [
            decode_value(value, f"{where}.{name}")
            for (name, _, decode_value), value in zip(decoders, values, strict=True)
        ]
    return cls(*decoded)
