"""The wire format: every message round-trips; anything else is a ProtocolError and no other."""

import array
import contextlib
import dataclasses
import re
import types
import typing
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ember_pp import protocol
from ember_pp.errors import ProtocolError
from ember_pp.protocol import Execute, OpenSlot, decode, encode

MESSAGES = sorted(protocol.registered_messages().values(), key=lambda cls: cls.TAG)
PAGE = Path(__file__).parent.parent / "docs" / "protocol.md"

# Time is no property of the wire format: a busy machine must not fail these.
generated = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
INT64 = st.integers(-(2**63), 2**64 - 1)
PLAIN = st.recursive(
    st.none() | st.booleans() | INT64 | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def values_for(hint: Any) -> st.SearchStrategy:
    """Values of a field's declared type."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([values_for(option) for option in options])
    if origin is list:
        return st.lists(values_for(options[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(st.text(), PLAIN, max_size=3)
    if dataclasses.is_dataclass(hint):
        return instances(hint)
    simple = {
        int: INT64,
        float: st.floats(allow_nan=False),
        bool: st.booleans(),
        str: st.text(),
        bytes: st.binary(),
        types.NoneType: st.none(),
        Any: PLAIN,
    }
    return simple[hint]


def instances(cls: Any) -> st.SearchStrategy:
    hints = typing.get_type_hints(cls)
    return st.builds(cls, *(values_for(hints[field.name]) for field in dataclasses.fields(cls)))


ANY_MESSAGE = st.one_of([instances(cls) for cls in MESSAGES])


def is_of(value: Any, hint: Any) -> bool:
    """Whether a decoded value is of a field's declared type; the oracle for wrong types."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(is_of(value, option) for option in options)
    if origin is list:
        return isinstance(value, list) and all(is_of(item, options[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict)
    if dataclasses.is_dataclass(hint):
        return False  # the values tried below hold no list of the right fields
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is hint


@pytest.mark.parametrize("cls", MESSAGES, ids=lambda cls: cls.__name__)
@generated
@given(data=st.data())
def test_round_trip(cls, data):
    message = data.draw(instances(cls))
    received = decode(encode(message))
    assert type(received) is cls
    assert received == message


@pytest.mark.parametrize("cls", MESSAGES, ids=lambda cls: cls.__name__)
@generated
@given(data=st.data())
def test_refuses_a_field_of_the_wrong_type_by_name(cls, data):
    fields = dataclasses.fields(cls)
    if not fields:
        return
    raw = msgpack.unpackb(encode(data.draw(instances(cls))), strict_map_key=False)
    index = data.draw(st.integers(0, len(fields) - 1))
    hint = typing.get_type_hints(cls)[fields[index].name]
    wrong = [
        value
        for value in (None, True, 7, 1.5, "x", b"x", [None], [[]], {"a": 1})
        if not is_of(value, hint)
    ]
    if not wrong:
        return
    raw[2 + index] = data.draw(st.sampled_from(wrong))
    with pytest.raises(ProtocolError, match=rf"{cls.__name__}\.{fields[index].name}\b"):
        decode(msgpack.packb(raw))


@pytest.mark.parametrize("cls", MESSAGES, ids=lambda cls: cls.__name__)
@generated
@given(data=st.data())
def test_refuses_missing_and_extra_fields(cls, data):
    raw = msgpack.unpackb(encode(data.draw(instances(cls))), strict_map_key=False)
    with pytest.raises(ProtocolError, match=cls.__name__):
        decode(msgpack.packb([*raw, None]))
    if len(raw) > 2:
        with pytest.raises(ProtocolError, match=cls.__name__):
            decode(msgpack.packb(raw[:-1]))


@generated
@given(message=ANY_MESSAGE, version=INT64 | st.text() | st.none() | st.booleans())
def test_refuses_another_version_and_says_which(message, version):
    if type(version) is int and version == protocol.PROTOCOL_VERSION:
        return
    raw = msgpack.unpackb(encode(message), strict_map_key=False)
    with pytest.raises(ProtocolError, match="version"):
        decode(msgpack.packb([version, *raw[1:]]))


@generated
@given(packed=st.binary())
def test_foreign_bytes_are_a_protocol_error(packed):
    with pytest.raises(ProtocolError):
        decode(packed)


@generated
@given(value=PLAIN)
def test_foreign_msgpack_is_a_protocol_error(value):
    with pytest.raises(ProtocolError):
        decode(msgpack.packb(value))


@generated
@given(message=ANY_MESSAGE, data=st.data())
def test_damaged_bytes_never_raise_anything_else(message, data):
    packed = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 3))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ProtocolError):  # damage inside a text can still be a message
        decode(bytes(packed))


@generated
@given(message=ANY_MESSAGE, data=st.data())
def test_cut_and_padded_bytes_are_refused(message, data):
    packed = encode(message)
    with pytest.raises(ProtocolError):
        decode(packed[: data.draw(st.integers(0, len(packed) - 1))])
    with pytest.raises(ProtocolError):
        decode(packed + b"\x00")


@pytest.mark.parametrize(
    "packed",
    [
        b"\x91" * 100_000,  # nested deeper than any message
        b"\xdf\xff\xff\xff\xff",  # a map that says it has 2**32 entries
        b"\xc6\xff\xff\xff\xff",  # bytes that say they are 4 GiB
        b"\xdd\xff\xff\xff\xff",
        msgpack.packb([1, "no_such_message"]),
        msgpack.packb([1, "execute" * 1000]),
        b"\x93\x01\xa6status\xd4\x05\x00",  # an extension type
        b"\x92\x01\xa1\xff",  # a tag that is not UTF-8
    ],
    ids=["deep", "map-bomb", "bytes-bomb", "list-bomb", "unknown", "long", "ext", "not-utf8"],
)
def test_hostile_bytes_are_refused(packed):
    with pytest.raises(ProtocolError) as failure:
        decode(packed)
    assert len(str(failure.value)) < 1000


@generated
@given(st.lists(st.integers(0, 2**32 - 1)))
def test_packed_u32_comes_back(numbers):
    packed = protocol.pack_u32(numbers)
    assert len(packed) == 4 * len(numbers)
    assert protocol.unpack_u32(packed).tolist() == numbers
    assert packed == b"".join(number.to_bytes(4, "little") for number in numbers)


@generated
@given(st.lists(st.integers(-(2**31), 2**31 - 1)))
def test_packed_i32_comes_back(numbers):
    packed = protocol.pack_i32(numbers)
    assert protocol.unpack_i32(packed).tolist() == numbers
    assert packed == b"".join(number.to_bytes(4, "little", signed=True) for number in numbers)


@pytest.mark.parametrize("typecode", "bBhHiIlLqQ")
def test_arrays_are_packed_by_their_values_not_by_their_type(typecode):
    numbers = [0, 1, 127]
    values = array.array(typecode, numbers)
    assert protocol.pack_i32(values) == protocol.pack_i32(numbers)
    assert protocol.pack_u32(values) == protocol.pack_u32(numbers)
    assert protocol.pack_i64(values) == protocol.pack_i64(numbers)
    assert values.tolist() == numbers  # as they were


@generated
@given(st.lists(st.floats(width=32, allow_nan=False)))
def test_packed_f32_comes_back(numbers):
    assert protocol.unpack_f32(protocol.pack_f32(numbers)).tolist() == numbers


@pytest.mark.parametrize("unpack", [protocol.unpack_u32, protocol.unpack_i32, protocol.unpack_f32])
def test_packed_array_of_odd_length_is_refused(unpack):
    with pytest.raises(ProtocolError, match="7 bytes"):
        unpack(b"1234567")


def plan(**changes: Any) -> Execute:
    """A plan far into a long run, in which nothing changed."""
    steady = Execute(
        epoch=2**31,
        plan=2**40,
        microbatch=1000,
        leave=b"",
        open=[],
        blocks=b"",
        join=b"",
        chunks=b"",
        chunk_ids=b"",
        feedback=2**40 - 1,
        after_idle=False,
        tap=None,
    )
    return dataclasses.replace(steady, **changes)


@pytest.mark.parametrize("num_changes", [0, 1, 100, 512])
def test_a_plan_costs_200_bytes_and_8_per_change(num_changes):
    budget = 200 + 8 * num_changes
    u32 = protocol.pack_u32([2**32 - 1] * num_changes)
    assert len(encode(plan(leave=u32))) <= budget
    assert len(encode(plan(join=u32))) <= budget
    assert len(encode(plan(blocks=u32 * 2))) <= budget


def test_a_steady_decode_is_a_few_bytes_whatever_its_rows():
    assert len(encode(plan())) <= 50
    assert len(encode(plan(epoch=0, plan=40_000, microbatch=7, feedback=39_990))) <= 32


def test_opening_a_slot_with_default_sampling_is_small():
    slot = OpenSlot(
        slot=511,
        seed=2**64 - 1,
        sampling={"temperature": 0.6, "top_k": 20, "top_p": 0.95, "max_tokens": 4096},
        num_prompt_tokens=40_000,
        num_output_tokens=0,
        prompt_ids=b"",
        output_ids=b"",
    )
    assert len(encode(plan(open=[slot]))) - len(encode(plan())) <= 128


def test_the_page_names_exactly_the_registered_messages():
    """Each message has one row in a table of docs/protocol.md whose head says ``message``."""
    named: list[str] = []
    in_table = False
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        first = line.split("|")[1].strip() if line.startswith("|") else ""
        in_table = line.startswith("|") and (in_table or first == "message")
        if in_table:
            named += re.findall(r"`(\w+)`", first)
    assert sorted(named) == sorted(cls.__name__ for cls in MESSAGES)


def test_the_page_states_the_version():
    page = PAGE.read_text(encoding="utf-8")
    assert f"`PROTOCOL_VERSION` (now {protocol.PROTOCOL_VERSION})" in page
