"""The text side of a request: stops, ends, deltas; and admission: defaults, seeds, refusals."""

import array
import dataclasses
from pathlib import Path

import pytest

import ember_pp
from ember_pp import config as configuration
from ember_pp import protocol
from ember_pp.coordinator.admission import Admission
from ember_pp.coordinator.preparation import (
    choose_devices,
    choose_num_microbatches,
    default_max_in_flight,
    prepare,
)
from ember_pp.coordinator.request import take_deltas
from ember_pp.errors import ConfigError, InvalidRequestError
from ember_pp.tokenizer import Tokenizer

DEMO = Path(ember_pp.__file__).parent / "demo"


def make_config(**groups):
    plain = {
        "job": {"name": "serve"},
        "model": {"path": "demo", "dtype": "float32"},
        "pipeline": {"stages": 2, "devices": "cpu"},
    }
    for name, values in groups.items():
        plain[name] = plain.get(name, {}) | values
    return configuration.build(plain)


@pytest.fixture(scope="module")
def preparation():
    return prepare(make_config())


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(DEMO)


def admit(preparation, config=None, **fields):
    submit = {
        "request_id": "r",
        "prompt": None,
        "messages": None,
        "token_ids": None,
        "sampling": {},
        "template_kwargs": {},
        "stream": False,
        "seed_key": "",
    } | fields
    request = Admission(config or make_config(), preparation).admit(b"c", protocol.Submit(**submit))
    request.sequence.max_total_tokens = request.sequence.num_prompt_tokens + (
        request.params.max_tokens or 1000
    )
    return request


def feed(request, token_ids):
    """Give tokens as the coordinator does; returns the finish reason and how many were taken."""
    for count, token_id in enumerate(token_ids, 1):
        request.sequence.output_ids.append(token_id)
        finish_reason = request.on_token(token_id, None)
        if finish_reason is not None:
            return finish_reason, count
    return None, len(token_ids)


def test_text_of_deltas_and_end_add_up(preparation, tokenizer):
    request = admit(preparation, prompt="x", stream=True)
    text = "Caf\u00e9 \u732b and more"
    parts = []
    for token_id in tokenizer.encode(text):
        assert feed(request, [token_id])[0] is None
        deltas = take_deltas([request])
        assert list(protocol.unpack_i32(deltas.token_ids)) == [token_id]
        parts += deltas.texts
    finished = request.take_finished("abort")
    assert "".join(parts) + finished.text == text
    assert "\ufffd" not in "".join(parts)
    assert finished.token_ids == b""


def test_end_of_text_ends_and_is_not_shown(preparation, tokenizer):
    request = admit(preparation, prompt="x")
    eos = preparation.eos_token_ids[0]
    ids = [*tokenizer.encode("Done."), eos]
    assert feed(request, ids) == ("stop", len(ids))
    finished = request.take_finished("stop")
    assert finished.text == "Done."
    assert list(protocol.unpack_i32(finished.token_ids)) == ids
    assert finished.stop_reason is None


def test_ignore_eos_goes_on(preparation):
    request = admit(preparation, prompt="x", sampling={"ignore_eos": True})
    assert feed(request, [preparation.eos_token_ids[0]])[0] is None


def test_stop_token_ids_end_and_are_named(preparation, tokenizer):
    first, second = tokenizer.encode("a b")[:2]
    request = admit(preparation, prompt="x", sampling={"stop_token_ids": [second]})
    assert feed(request, [first, second]) == ("stop", 2)
    finished = request.take_finished("stop")
    assert finished.stop_reason == second
    assert finished.text == tokenizer.decode([first], True)


def test_a_stop_string_across_tokens_is_cut_and_named(preparation, tokenizer):
    request = admit(preparation, prompt="x", stream=True, sampling={"stop": ["lo wor"]})
    ids = tokenizer.encode("hello world and on")
    reason, _ = feed(request, ids)
    assert reason == "stop"
    finished = request.take_finished("stop")
    assert (finished.text, finished.stop_reason) == ("hel", "lo wor")


def test_a_stop_string_that_only_begins_is_let_out_at_the_end(preparation, tokenizer):
    ids = tokenizer.encode("hello wor")
    sampling = {"stop": ["world"], "max_tokens": len(ids)}
    request = admit(preparation, prompt="x", sampling=sampling)
    assert feed(request, ids) == ("length", len(ids))
    assert request.take_finished("length").text == "hello wor"


def test_max_tokens_ends_by_length(preparation, tokenizer):
    request = admit(preparation, prompt="x", sampling={"max_tokens": 2})
    assert feed(request, tokenizer.encode("one two three four")) == ("length", 2)


def test_logprobs_travel_with_their_tokens(preparation):
    request = admit(preparation, prompt="x", sampling={"logprobs": 0})
    entry = protocol.TokenLogprobs(-0.5, b"", b"")
    request.sequence.output_ids = array.array("i", [5])
    request.on_token(5, entry)
    assert take_deltas([request]).logprobs == [entry]


def test_deltas_of_many_requests_are_columns(preparation, tokenizer):
    asked = admit(preparation, prompt="x", request_id="asked", sampling={"logprobs": 0})
    silent = admit(preparation, prompt="x", request_id="silent")
    entries = [protocol.TokenLogprobs(-0.5, b"", b""), protocol.TokenLogprobs(-1.5, b"", b"")]
    ids = tokenizer.encode("some words here")[:3]
    for token_id in ids:
        silent.on_token(token_id, None)
    for token_id, entry in zip(ids, entries, strict=False):
        asked.on_token(token_id, entry)
    deltas = take_deltas([silent, asked])
    assert deltas.request_ids == ["silent", "asked"]
    assert deltas.texts == [tokenizer.decode(ids), tokenizer.decode(ids[:2])]
    assert list(protocol.unpack_u32(deltas.num_token_ids)) == [3, 2]
    assert list(protocol.unpack_i32(deltas.token_ids)) == ids + ids[:2]
    assert deltas.logprobs == [None, None, None, *entries]
    silent.on_token(ids[0], None)
    asked.on_token(ids[0], entries[0])
    again = take_deltas([asked, silent])
    assert list(protocol.unpack_i32(again.token_ids)) == [ids[0], ids[0]]
    assert again.logprobs == [entries[0], None]
    assert asked.take_finished("length").text == silent.take_finished("length").text == ""


def test_deltas_of_nothing_are_a_message():
    empty = take_deltas([])
    assert protocol.decode(protocol.encode(empty)) == empty


def test_defaults_come_from_the_checkpoint_then_config_then_request(preparation):
    assert admit(preparation, prompt="x").params.top_k == preparation.sampling_defaults["top_k"]
    config = make_config(sampling={"top_k": 7, "temperature": 0.25})
    overridden = prepare(config)
    assert admit(overridden, config, prompt="x").params.top_k == 7
    request = admit(overridden, config, prompt="x", sampling={"top_k": 3})
    assert (request.params.top_k, request.params.temperature) == (3, 0.25)


def test_seeds_follow_request_then_key_then_base(preparation):
    assert admit(preparation, prompt="x", sampling={"seed": -1}).sequence.seed == 2**64 - 1

    def seed_of(config=None, **fields):
        return admit(preparation, config, prompt="x", **fields).sequence.seed

    assert seed_of(seed_key="a") == seed_of(seed_key="a", request_id="other")
    assert seed_of(seed_key="a") != seed_of(seed_key="b")
    assert seed_of(request_id="p") != seed_of(request_id="q")
    assert seed_of(seed_key="a") != seed_of(make_config(sampling={"seed": 1}), seed_key="a")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "expected one of prompt, messages and token_ids"),
        ({"prompt": "x", "token_ids": b""}, "expected one of"),
        ({"prompt": ""}, "prompt: empty"),
        ({"prompt": "x" * 40_000}, r"prompt: 40000 characters; .*max_prompt_characters"),
        ({"token_ids": protocol.pack_i32([-1])}, "token_ids: expected ids"),
        ({"prompt": "x", "sampling": {"temprature": 1}}, "did you mean 'temperature'"),
        ({"prompt": "x", "sampling": {"stop_token_ids": [10**6]}}, "stop_token_ids"),
        ({"messages": [{"role": "user", "content": 3}]}, "content"),
    ],
)
def test_refusals_name_the_field(preparation, fields, message):
    with pytest.raises(InvalidRequestError, match=message):
        admit(preparation, **fields)


def test_without_a_tokenizer_only_ids_are_taken(preparation):
    bare = dataclasses.replace(preparation, tokenizer=None)
    with pytest.raises(InvalidRequestError, match=r"no tokenizer\.json; send token_ids"):
        admit(bare, prompt="x")
    with pytest.raises(InvalidRequestError, match="use stop_token_ids"):
        admit(bare, token_ids=protocol.pack_i32([1]), sampling={"stop": ["x"]})
    request = admit(bare, token_ids=protocol.pack_i32([1]), sampling={"max_tokens": 1})
    assert feed(request, [7]) == ("length", 1)
    assert request.take_finished("length").text == ""


def test_devices_are_spread_and_checked():
    assert choose_devices("auto", 3, 0) == ["cpu"] * 3
    assert choose_devices("auto", 2, 4) == ["cuda:0", "cuda:1"]
    assert choose_devices("auto", 4, 2) == ["cuda:0", "cuda:0", "cuda:1", "cuda:1"]
    assert choose_devices(["cuda:1", "cpu"], 2, 2) == ["cuda:1", "cpu"]
    with pytest.raises(ConfigError, match="cuda:3 is not there; this process sees 2 GPUs"):
        choose_devices("cuda:3", 1, 2)


def test_plans_in_flight_default_to_one_more_than_stages():
    assert [default_max_in_flight(n, run_ahead=0) for n in (1, 2, 4)] == [1, 3, 5]
    assert [default_max_in_flight(n, run_ahead=1) for n in (1, 2, 4)] == [2, 3, 5]


def test_a_micro_batch_per_stage_or_per_plan():
    assert choose_num_microbatches(4, max_in_flight=5, run_ahead=1) == 4
    assert choose_num_microbatches(4, max_in_flight=5, run_ahead=0) == 5
    assert choose_num_microbatches(4, max_in_flight=2, run_ahead=3) == 2


def test_a_context_beyond_the_checkpoint_is_refused():
    with pytest.raises(ConfigError, match=r"model\.context_length: 999999 is above"):
        prepare(make_config(model={"context_length": 999999}))
