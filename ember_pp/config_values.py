"""Nested maps of plain values to dataclasses, by the declared types of their fields.

The part of ``config.py`` that knows no setting. A field may be a scalar, ``Literal``, a list,
another dataclass, or a union of dataclasses that their field ``name`` tells apart.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from ember_pp.errors import ConfigError
from ember_pp.sampling_params import suggest

_SettingsT = TypeVar("_SettingsT")


def build_dataclass(
    cls: type[_SettingsT], plain: Any, prefix: str = "", *, known_keys: Sequence[str] = ()
) -> _SettingsT:
    """The ``cls`` that ``plain`` describes; what it does not say has its default.

    Args:
        prefix: of the dotted keys in errors, with its dot.
        known_keys: dotted keys to suggest beside the fields of ``cls`` for an unknown one.

    Raises:
        ConfigError: an unknown key or a wrong type; the text starts with the dotted key.
    """
    if not isinstance(plain, Mapping):
        raise ConfigError(f"{prefix.rstrip('.')}: expected a group of settings, got {plain!r}")
    hints = typing.get_type_hints(cls)
    for key in plain:
        if key not in hints:
            known = [*(prefix + name for name in hints), *known_keys]
            raise ConfigError(f"{prefix}{key}: no such setting{suggest(f'{prefix}{key}', known)}")
    return cls(
        **{key: _build_value(hints[key], value, prefix + key) for key, value in plain.items()}
    )


def _build_value(hint: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build_dataclass(typing.cast(type[Any], hint), value, f"{key}.")
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType or origin is typing.Union:
        if all(dataclasses.is_dataclass(option) for option in options):
            return _build_named(options, value, key)
        if value is None and type(None) in options:
            return None
        hint = next(option for option in options if option is not type(None))
        return _build_value(hint, value, key)
    if origin is Literal:
        if value not in options:
            listed = ", ".join(str(option) for option in options)
            raise ConfigError(
                f"{key}: expected one of {listed}; got {value!r}{suggest(str(value), options)}"
            )
        return value
    if origin is list:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{key}: expected a list, got {value!r}")
        return [_build_value(options[0], item, f"{key}[{i}]") for i, item in enumerate(value)]
    return _build_scalar(dict if origin is dict else hint, value, key)


def _build_named(options: Sequence[Any], plain: Any, key: str) -> Any:
    by_name = {option().name: option for option in options}
    listed = ", ".join(by_name)
    if not isinstance(plain, Mapping):
        raise ConfigError(f"{key}: expected one of {listed}; got {plain!r}")
    name = str(plain.get("name"))
    if name not in by_name:
        raise ConfigError(f"{key}: expected one of {listed}; got {name!r}{suggest(name, by_name)}")
    return build_dataclass(by_name[name], plain, f"{key}.")


def _build_scalar(hint: Any, value: Any, key: str) -> Any:
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        names = {
            int: "a whole number",
            float: "a number",
            bool: "true or false",
            str: "text",
        }
        raise ConfigError(f"{key}: expected {names.get(hint, hint.__name__)}, got {value!r}")
    return value
