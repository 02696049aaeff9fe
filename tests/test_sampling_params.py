"""SamplingParams: round trips, every bad value named, suggestions, vocabulary."""

import contextlib
import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ember_pp import protocol
from ember_pp.errors import InvalidRequestError
from ember_pp.sampling_params import (
    MAX_LOGPROBS,
    SamplingParams,
    SamplingSizes,
    check_against_vocabulary,
    suggest,
)

FIELDS = [field.name for field in dataclasses.fields(SamplingParams)]
TOKEN_IDS = st.integers(0, 2**31 - 1)
STOP_STRINGS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=256)

VALID = {
    "temperature": st.floats(0, 100) | st.integers(0, 100),
    "top_k": st.integers(0, 2**31 - 1),
    "top_p": st.floats(0, 1, exclude_min=True),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(0.01, 100),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "logit_bias": st.dictionaries(TOKEN_IDS, st.floats(-100, 100), max_size=5),
    "seed": st.integers(-(2**63), 2**64 - 1),
    "max_tokens": st.integers(1000, 2**31 - 1),
    "min_tokens": st.integers(0, 1000),
    "stop": st.lists(STOP_STRINGS, max_size=16).map(tuple),
    "stop_token_ids": st.lists(TOKEN_IDS, max_size=5).map(tuple),
    "ignore_eos": st.booleans(),
    "logprobs": st.integers(0, MAX_LOGPROBS),
    "skip_special_tokens": st.booleans(),
}
PARAMS = st.fixed_dictionaries({}, optional=VALID).map(lambda fields: SamplingParams(**fields))

ANYTHING = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.lists(st.integers() | st.text(max_size=3) | st.none(), max_size=3)
    | st.dictionaries(st.integers() | st.text(max_size=3), st.floats() | st.text(), max_size=3)
)

NOT_A_NUMBER = [True, "1", None, [1], math.nan, 10**400, -(10**400)]
NOT_WHOLE = [True, 1.0, "1", [1], math.nan, 10**400]
BAD = {
    "temperature": [*NOT_A_NUMBER, -0.1, 100.1, math.inf],
    "top_k": [*NOT_WHOLE, None, -1, 2**31],
    "top_p": [*NOT_A_NUMBER, 0, 0.0, -0.5, 1.01],
    "min_p": [*NOT_A_NUMBER, -0.1, 1.1],
    "repetition_penalty": [*NOT_A_NUMBER, 0, -1.0, 0.009, 101],
    "presence_penalty": [*NOT_A_NUMBER, -2.1, 2.1],
    "frequency_penalty": [*NOT_A_NUMBER, -2.1, 2.1],
    "logit_bias": [
        None,
        [1],
        "5",
        {-1: 0.0},
        {2**31: 0.0},
        {True: 0.0},
        {1.0: 0.0},
        {5: 100.5},
        {5: "1"},
        {5: math.nan},
    ],
    "seed": [True, 1.0, "1", -(2**63) - 1, 2**64, 10**5000],
    "max_tokens": [True, 1.0, "1", 0, -1, 2**31],
    "min_tokens": [*NOT_WHOLE, None, -1, 2**31],
    "stop": [
        None,
        5,
        {"a": 1},
        ("",),
        (5,),
        (None,),
        ("\ud800",),
    ],
    "stop_token_ids": [None, 5, "5", (-1,), (2**31,), (True,), (1.0,), ("5",)],
    "ignore_eos": [None, 0, 1, "true"],
    "logprobs": [True, 1.0, "1", -1, MAX_LOGPROBS + 1],
    "skip_special_tokens": [None, 0, 1, "false"],
}


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_has_good_and_bad_values_here(name):
    assert name in VALID
    assert name in BAD


@settings(deadline=None)
@given(PARAMS)
def test_to_mapping_and_back_is_the_same(params):
    assert SamplingParams.from_mapping(params.to_mapping()) == params


@settings(deadline=None)
@given(PARAMS)
def test_a_mapping_survives_the_wire(params):
    opened = protocol.OpenSlot(0, 0, params.to_mapping(), 1, 0, b"", b"")
    execute = protocol.Execute(0, 0, 0, b"", [opened], b"", b"", b"", b"", -1, False, None)
    decoded = protocol.decode(protocol.encode(execute))
    assert SamplingParams.from_mapping(decoded.open[0].sampling) == params


@settings(deadline=None)
@given(PARAMS)
def test_a_mapping_survives_json(params):
    """JSON turns token ids into strings; numbers come back to the last bit."""
    assert SamplingParams.from_mapping(json.loads(json.dumps(params.to_mapping()))) == params


@settings(deadline=None)
@given(PARAMS)
def test_a_mapping_says_only_what_differs(params):
    default = SamplingParams()
    mapping = params.to_mapping()
    for name in FIELDS:
        assert (name in mapping) == (getattr(params, name) != getattr(default, name))


@settings(deadline=None)
@given(st.sampled_from(FIELDS), ANYTHING)
def test_any_value_is_taken_or_refused_by_name(name, value):
    try:
        params = SamplingParams.from_mapping({name: value})
    except InvalidRequestError as error:
        refusal = str(error)
    else:
        assert SamplingParams.from_mapping(params.to_mapping()) == params
        return
    assert refusal.startswith(name)
    assert len(refusal) < 300


@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param(name, value, id=f"{name}-{index}")
        for name, values in BAD.items()
        for index, value in enumerate(values)
    ],
)
def test_a_bad_value_names_its_field(name, value):
    with pytest.raises(InvalidRequestError, match=f"^{name}") as failure:
        SamplingParams(**{name: value})
    assert len(str(failure.value)) < 300


@pytest.mark.parametrize(
    "key", ["1.5", " 5", "5_0", "\u0665", "", "x", "-1", True, 1.5, None, "9" * 11]
)
def test_logit_bias_keys_are_token_ids_or_their_decimal_strings(key):
    with pytest.raises(InvalidRequestError, match=r"^logit_bias"):
        SamplingParams.from_mapping({"logit_bias": {key: 1.0}})


def test_logit_bias_refuses_a_token_id_in_two_spellings():
    with pytest.raises(InvalidRequestError, match="logit_bias: token id 5 is given twice"):
        SamplingParams.from_mapping({"logit_bias": {"5": 1.0, "05": 2.0}})


SIZES = SamplingSizes(
    max_stop_strings=3, max_stop_characters=4, max_stop_token_ids=5, max_logit_bias_entries=6
)
TOO_MUCH = {
    "max_stop_strings": ("stop: 4 strings; at most 3", {"stop": ["a"] * 4}),
    "max_stop_characters": ("stop: 5 characters in a string; at most 4", {"stop": ["a", "abcde"]}),
    "max_stop_token_ids": ("stop_token_ids: 6 ids; at most 5", {"stop_token_ids": [1] * 6}),
    "max_logit_bias_entries": (
        "logit_bias: 7 entries; at most 6",
        {"logit_bias": dict.fromkeys(map(str, range(7)), 0.0)},
    ),
}


@pytest.mark.parametrize("setting", TOO_MUCH)
def test_more_than_a_setting_allows_is_refused_by_its_name(setting):
    message, fields = TOO_MUCH[setting]
    with pytest.raises(InvalidRequestError, match=rf"^{message} \(coordinator\.{setting}\)$"):
        SIZES.check(fields)


def test_every_size_has_a_refusal_here():
    assert set(TOO_MUCH) == {field.name for field in dataclasses.fields(SamplingSizes)}


def test_as_much_as_the_settings_allow_passes():
    SIZES.check({"stop": ["abcd"] * 3, "stop_token_ids": (1,) * 5})
    SIZES.check({"logit_bias": dict.fromkeys(range(6), 0.0), "stop": "abcd"})
    with pytest.raises(InvalidRequestError, match="max_stop_characters"):
        SIZES.check({"stop": "abcde"})


@given(st.dictionaries(st.sampled_from(FIELDS), ANYTHING))
def test_sizes_of_what_is_no_field_value_are_not_its_business(fields):
    """A wrong type is told as one, by ``from_mapping``."""
    with contextlib.suppress(InvalidRequestError):
        SIZES.check(fields)


def test_min_tokens_must_fit_max_tokens():
    SamplingParams(min_tokens=5, max_tokens=5)
    with pytest.raises(InvalidRequestError, match=r"^min_tokens: 6 is above max_tokens 5"):
        SamplingParams(min_tokens=6, max_tokens=5)


def test_none_means_not_said():
    assert SamplingParams.from_mapping(dict.fromkeys(FIELDS)) == SamplingParams()


def test_stop_may_be_one_string():
    assert SamplingParams.from_mapping({"stop": "END"}).stop == ("END",)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("temprature", "temperature"),
        ("topk", "top_k"),
        ("repetition_penality", "repetition_penalty"),
    ],
)
def test_an_unknown_field_is_refused_with_a_suggestion(name, meant):
    with pytest.raises(InvalidRequestError, match=f"^{name}: .*did you mean '{meant}'"):
        SamplingParams.from_mapping({name: 1})


@pytest.mark.parametrize("name", ["n", "best_of", "x" * 5000, 5, None])
def test_a_foreign_field_is_refused_without_a_far_fetched_suggestion(name):
    with pytest.raises(InvalidRequestError, match=r"not a sampling field$") as failure:
        SamplingParams.from_mapping({name: 1})
    assert len(str(failure.value)) < 200


@pytest.mark.parametrize("values", [None, [], "temperature=1", 5])
def test_fields_must_come_as_a_map(values):
    with pytest.raises(InvalidRequestError, match=r"^sampling: expected a map"):
        SamplingParams.from_mapping(values)


def test_suggest_knows_when_nothing_is_close():
    assert suggest("zzz", FIELDS) == ""


@pytest.mark.parametrize(
    ("fields", "needs_counts"),
    [
        ({}, False),
        ({"temperature": 0.0, "top_k": 3, "logit_bias": {1: 1.0}, "min_tokens": 2}, False),
        ({"repetition_penalty": 0.9}, True),
        ({"presence_penalty": -0.1}, True),
        ({"frequency_penalty": 0.1}, True),
    ],
)
def test_needs_token_counts_only_with_a_penalty(fields, needs_counts):
    assert SamplingParams(**fields).needs_token_counts is needs_counts


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logit_bias": {3: 1.0, 100: 1.0}}, "^logit_bias: token id 100 .* of 100 tokens"),
        ({"stop_token_ids": (2**31 - 1,)}, "^stop_token_ids: token id 2147483647 "),
    ],
)
def test_ids_outside_the_vocabulary_are_refused(fields, message):
    with pytest.raises(InvalidRequestError, match=message):
        check_against_vocabulary(SamplingParams(**fields), 100)


def test_ids_inside_the_vocabulary_are_taken():
    check_against_vocabulary(SamplingParams(logit_bias={99: 1.0}, stop_token_ids=(0, 99)), 100)
    check_against_vocabulary(SamplingParams(), 1)
