"""The error tree: as its docstring draws it, and the same class on both sides of the wire."""

import inspect
import re

import msgpack
import pytest

from ember_pp import errors
from ember_pp.errors import EmberError, from_wire

# Arguments for the classes that take more than a text.
EXTRA = {
    "BatchInputError": {"problems": ("a.jsonl:3: not JSON", "a.jsonl:9: no prompt")},
    "StageError": {"stage_index": 2},
    "StageFailedError": {
        "stage_index": 1,
        "remote_type": "RuntimeError",
        "remote_traceback": "Traceback ...",
    },
    "StageDiedError": {"stage_index": 3, "exit_status": -9},
}
ALL = [
    value
    for value in vars(errors).values()
    if inspect.isclass(value) and issubclass(value, EmberError)
]


def drawn_tree() -> dict[str, tuple[str | None, set[str]]]:
    """Class -> (parent, other bases) as the module docstring draws them."""
    path: list[tuple[int, str]] = []
    tree: dict[str, tuple[str | None, set[str]]] = {}
    for line in (errors.__doc__ or "").splitlines():
        if not (found := re.match(r"( *)([A-Z]\w*Error)\b", line)):
            continue
        indent, name = len(found[1]), found[2]
        path = [(level, parent) for level, parent in path if level < indent]
        also = re.search(r"also (\w+)\)", line)
        tree[name] = (path[-1][1] if path else None, {also[1]} if also else set())
        path.append((indent, name))
    return tree


def test_docstring_draws_exactly_the_classes():
    real = {
        cls.__name__: (
            next((b.__name__ for b in cls.__bases__ if issubclass(b, EmberError)), None),
            {b.__name__ for b in cls.__bases__ if not issubclass(b, EmberError)} - {"Exception"},
        )
        for cls in ALL
    }
    assert drawn_tree() == real


def test_codes_are_set_and_unique():
    codes = [cls.__dict__.get("code") for cls in ALL]
    assert None not in codes
    assert len(set(codes)) == len(codes)


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_survives_the_wire(cls):
    error = cls("what to change", **EXTRA.get(cls.__name__, {}))
    packed = msgpack.packb(error.to_wire(), use_bin_type=True)

    received = from_wire(msgpack.unpackb(packed, raw=False))

    assert type(received) is cls
    assert str(received) == "what to change"
    assert received.details() == error.details()
    assert vars(received) == vars(error)
    assert received.exit_code == error.exit_code


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_has_one_sentence_of_its_own(cls):
    assert cls.__doc__
    assert cls.__doc__ != (cls.__base__.__doc__ or "")


def test_unknown_code_is_still_an_error_with_its_text():
    error = from_wire({"code": "from_the_future", "message": "text", "details": {}})
    assert type(error) is EmberError
    assert str(error) == "text"


@pytest.mark.parametrize(
    "wire",
    [
        {},
        {"code": "stage_died"},
        {"code": "stage_died", "message": "text", "details": {"stage_index": 1, "new": 2}},
        {"code": 7, "message": None, "details": None},
    ],
)
def test_odd_wire_never_raises(wire):
    assert isinstance(from_wire(wire), EmberError)


def test_exit_codes_tell_configuration_and_capacity_apart():
    assert errors.ConfigError.exit_code == errors.CheckpointError.exit_code == 2
    assert errors.BatchInputError.exit_code == errors.AddressError.exit_code == 2
    assert errors.CapacityError.exit_code == 3
    assert errors.StageDiedError.exit_code == EmberError.exit_code == 1
