"""OpenAI's forms: every field is taken or refused by name; answers have OpenAI's shape."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ember_pp import errors, protocol
from ember_pp.client import Completion
from ember_pp.errors import InvalidRequestError
from ember_pp.jobs import openai
from ember_pp.sampling_params import SamplingParams

HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def chat_line(**body):
    body = {"model": "gpt-4o-mini", "messages": HELLO} | body
    return {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}


def completion_line(**body):
    body = {"model": "davinci-002", "prompt": "Once"} | body
    return {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}


def parse(line):
    return openai.parse_line(line, 7)


# --------------------------------------------------------------------------------------
# forms of a line


def test_a_real_openai_line():
    line = chat_line(
        messages=[
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        ],
        max_completion_tokens=1000,
        temperature=0,
        top_p=1,
        n=1,
        stream=False,
        stop="\n",
        presence_penalty=0,
        frequency_penalty=0,
        logit_bias={"50256": -100},
        user="user-1234",
        metadata={"topic": "demo"},
        store=True,
        seed=42,
        response_format={"type": "text"},
        tools=[TOOL],
        tool_choice="auto",
        parallel_tool_calls=True,
        service_tier="auto",
        logprobs=True,
        top_logprobs=2,
        safety_identifier="x",
        prompt_cache_key="y",
        modalities=["text"],
    )
    assert parse(line) == openai.BatchRequest(
        custom_id="a",
        kind="chat",
        model="gpt-4o-mini",
        messages=[
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "Hello"},
        ],
        sampling={
            "temperature": 0.0,
            "top_p": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "logit_bias": {50256: -100.0},
            "seed": 42,
            "stop": ["\n"],
            "max_tokens": 1000,
            "logprobs": 2,
        },
        template_kwargs={"tools": [TOOL]},
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ({"prompt": "Once"}, {"kind": "completion", "prompt": "Once"}),
        ({"prompt": ""}, {"kind": "completion", "prompt": ""}),
        ({"prompt": [1, 2]}, {"kind": "completion", "token_ids": [1, 2]}),
        ({"prompt": ["Once"]}, {"kind": "completion", "prompt": "Once"}),
        ({"prompt": [[1, 2]]}, {"kind": "completion", "token_ids": [1, 2]}),
        ({"token_ids": [0, 5]}, {"kind": "completion", "token_ids": [0, 5]}),
        ({"messages": HELLO}, {"kind": "chat", "messages": HELLO}),
        ({"messages": HELLO, "prompt": None}, {"kind": "chat", "messages": HELLO}),
        ({"prompt": "a", "top_k": 3}, {"prompt": "a", "sampling": {"top_k": 3}}),
        (completion_line(model=None), {"kind": "completion", "prompt": "Once", "model": None}),
        (completion_line(), {"model": "davinci-002"}),
        ({"url": "/v1/completions", "body": {"prompt": "a"}}, {"prompt": "a"}),
    ],
)
def test_forms(line, expected):
    request = parse(line)
    assert {name: getattr(request, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("custom_id", "expected"), [(None, "line-7"), ("x", "x"), ("é" * 512, "é" * 512)]
)
def test_custom_id(custom_id, expected):
    assert parse({"custom_id": custom_id, "prompt": "a"}).custom_id == expected
    assert parse(chat_line() | {"custom_id": custom_id}).custom_id == expected


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ([], r"^expected a JSON object, got \[\]"),
        ("x", r'^expected a JSON object, got "x"'),
        (None, r"^expected a JSON object, got null"),
        ({}, r"^expected one of prompt, token_ids and messages, got none"),
        ({"custom_id": ""}, r"^custom_id: expected text of 1 to 512"),
        ({"custom_id": "x" * 513}, r"^custom_id: expected text of 1 to 512"),
        ({"custom_id": 5}, r"^custom_id: expected text of 1 to 512 characters, got 5"),
        ({"custom_id": "\ud800", "prompt": "a"}, r"^custom_id: not valid Unicode"),
        ({"prompt": "a", "messages": HELLO}, r"got both prompt and messages"),
        ({"prompt": "a", "token_ids": [1]}, r"got both prompt and token_ids"),
        (chat_line() | {"method": "GET"}, r'^method: expected "POST", got "GET"'),
        (chat_line() | {"url": None}, r"^url: expected /v1/chat/completions or"),
        (chat_line() | {"url": "/v1/embeddings"}, r'^url: expected .*got "/v1/embeddings"'),
        (chat_line() | {"url": "/v1/chat/completion"}, r"did you mean '/v1/chat/completions'"),
        (chat_line() | {"url": 5}, r"^url: expected .* got 5"),
        (chat_line() | {"body": None}, r"^body: expected a JSON object, got null"),
        (chat_line() | {"body": []}, r"^body: expected a JSON object"),
        (chat_line() | {"prompt": "a"}, r"^prompt: not a field of a batch line; put it into body"),
        (chat_line() | {"customid": "a"}, r"^customid: not a field .*mean 'custom_id'"),
        (chat_line(prompt="a"), r"got both prompt and messages"),
        (chat_line(messages=None), r"got none"),
        (chat_line(messages=None, prompt="a"), r"^prompt: expected messages for this url"),
        (completion_line(prompt=None, messages=HELLO), r"^messages: expected prompt for this url"),
        ({5: 1}, r"^expected names as keys, got 5"),
        (completion_line() | {"body": {5: 1}}, r"^body: expected names as keys"),
    ],
)
def test_bad_forms_are_named(line, complaint):
    with pytest.raises(InvalidRequestError, match=complaint):
        parse(line)


# --------------------------------------------------------------------------------------
# fields

SAMPLING = [
    ("temperature", 0.5, 0.5),
    ("temperature", 1, 1.0),
    ("top_k", 5, 5),
    ("top_p", 0.9, 0.9),
    ("min_p", 0.1, 0.1),
    ("repetition_penalty", 0.9, 0.9),
    ("presence_penalty", -1, -1.0),
    ("frequency_penalty", 2, 2.0),
    ("logit_bias", {"3": 1, "1": -5.5}, {1: -5.5, 3: 1.0}),
    ("logit_bias", {}, {}),
    ("seed", -3, -3),
    ("min_tokens", 2, 2),
    ("stop", "x", ["x"]),
    ("stop", ["x", "y"], ["x", "y"]),
    ("stop_token_ids", [4], [4]),
    ("ignore_eos", True, True),
    ("skip_special_tokens", False, False),
    ("max_tokens", 9, 9),
]
MAKERS = pytest.mark.parametrize("make", [chat_line, completion_line])


@MAKERS
@pytest.mark.parametrize(("name", "value", "expected"), SAMPLING, ids=str)
def test_sampling_fields_are_taken(make, name, value, expected):
    assert parse(make(**{name: value})).sampling == {name: expected}
    assert parse({"prompt": "a", name: value}).sampling == {name: expected}


def test_every_sampling_parameter_can_be_asked_for():
    named = {name for name, _, _ in SAMPLING} | {"logprobs"}
    assert named == set(SamplingParams.__dataclass_fields__)


@MAKERS
def test_a_value_that_equals_the_default_is_still_given(make):
    """It must win over the checkpoint's own default, which may be another."""
    given = {"temperature": 1.0, "top_k": 0, "stop": []}
    assert parse(make(**given)).sampling == given


@MAKERS
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "hot"),
        ("temperature", -1),
        ("temperature", True),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 10**400),
        ("top_k", 1.5),
        ("top_p", 0),
        ("top_p", [1]),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("presence_penalty", 3),
        ("frequency_penalty", {}),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"1": 1000}),
        ("logit_bias", [1]),
        ("seed", 1.5),
        ("seed", 2**70),
        ("max_tokens", 0),
        ("max_tokens", 1.0),
        ("max_tokens", True),
        ("max_completion_tokens", "9"),
        ("min_tokens", -1),
        ("stop", 5),
        ("stop", [""]),
        ("stop", [5]),
        ("stop", "\ud800"),
        ("stop_token_ids", 5),
        ("stop_token_ids", [-1]),
        ("ignore_eos", 1),
        ("skip_special_tokens", "no"),
        ("logprobs", "yes"),
        ("logprobs", 1.5),
        ("return_token_ids", 1),
        ("model", 5),
        ("user", 5),
        ("metadata", "x"),
        ("store", "yes"),
        ("safety_identifier", 1),
        ("prompt_cache_key", 1),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_wrong_value_names_its_field(make, name, value):
    shown = "max_tokens|max_completion_tokens" if "max" in name else name
    with pytest.raises(InvalidRequestError, match=rf"^({shown})(\[1\])?: ") as failure:
        parse(make(**{name: value}))
    assert len(str(failure.value)) < 300


def test_min_tokens_above_max_tokens_is_refused():
    with pytest.raises(InvalidRequestError, match=r"^min_tokens: 5 is above max_tokens 4"):
        parse({"prompt": "a", "min_tokens": 5, "max_completion_tokens": 4})


def test_two_limits_must_agree():
    both = {"max_tokens": 5, "max_completion_tokens": 5}
    assert parse(chat_line(**both)).sampling == {"max_tokens": 5}
    with pytest.raises(InvalidRequestError, match=r"^max_completion_tokens: differs"):
        parse(chat_line(**both | {"max_tokens": 6}))


@MAKERS
@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("n", 2, "one line per answer"),
        ("n", True, "one line per answer"),
        ("stream", True, "leave it out"),
        ("stream", 0, "leave it out"),
        ("stream_options", {}, "does not stream"),
        ("service_tier", "flex", "one tier"),
        ("functions", [], "use tools"),
        ("function_call", "auto", "use tool_choice"),
        ("reasoning_effort", "low", "chat_template_kwargs"),
        ("enable_thinking", False, "chat_template_kwargs"),
        ("extra_body", {}, "beside the others"),
        ("max_new_tokens", 5, "use max_tokens"),
        ("input", "a", "use messages or prompt"),
        ("audio", {}, "answers are text"),
        ("temprature", 1, "did you mean 'temperature'"),
        ("guided_json", {}, "not supported"),
        ("prompt_logprobs", 1, "not supported"),
        ("prediction", {}, "not supported"),
        ("web_search_options", {}, "not supported"),
        ("verbosity", "low", "not supported"),
        ("x" * 5000, 1, "not supported"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_beyond_us_is_refused_by_name(make, name, value, advice):
    with pytest.raises(InvalidRequestError, match=rf"^{name[:80]}.*{advice}") as failure:
        parse(make(**{name: value}))
    assert len(str(failure.value)) < 300


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (completion_line(best_of=2), r"^best_of: 2 is not supported; write one line"),
        (completion_line(echo=True), r"^echo: true is not supported"),
        (completion_line(suffix="the end"), r'^suffix: "the end" is not supported'),
        (completion_line(prompt=["a", "b"]), r"^prompt: 2 prompts in one line"),
        (completion_line(prompt=[[1], [2]]), r"^prompt: 2 prompts in one line"),
        (completion_line(prompt=[]), r"^prompt: empty"),
        (completion_line(prompt=[[]]), r"^prompt: expected text or a list of token ids"),
        (completion_line(prompt=5), r"^prompt: expected text or a list of token ids, got 5"),
        (completion_line(prompt=[1, "a"]), r"^prompt: expected text or a list of token ids"),
        (completion_line(prompt=[1, True]), r"^prompt: expected text or a list of token ids"),
        (completion_line(prompt=[-1]), r"^prompt: expected text or a list of token ids"),
        (completion_line(prompt=[2**31]), r"^prompt: expected text or a list of token ids"),
        (completion_line(prompt="\udc00"), r"^prompt: not valid Unicode"),
        ({"token_ids": []}, r"^token_ids: expected a list of token ids"),
        ({"token_ids": "a"}, r"^token_ids: expected a list of token ids"),
        (completion_line(tools=[TOOL]), r"^tools: only for chats"),
        (completion_line(tool_choice="auto"), r"^tool_choice: only for chats"),
        (completion_line(top_logprobs=1), r"^top_logprobs: only for chats"),
        (completion_line(chat_template_kwargs={}), r"^chat_template_kwargs: only for chats"),
        (completion_line(response_format={"type": "text"}), r"^response_format: only for chats"),
        (completion_line(logprobs=True), r"^logprobs: expected a whole number"),
        (completion_line(logprobs=21), r"^logprobs: expected \[0, 20\]"),
        (chat_line(best_of=1), r"^best_of: only for completions"),
        (chat_line(echo=False), r"^echo: only for completions"),
        (chat_line(suffix=""), r"^suffix: only for completions"),
        (chat_line(logprobs=5), r"^logprobs: expected true or false.* top_logprobs"),
        (chat_line(top_logprobs=2), r"^top_logprobs: needs logprobs: true"),
        (chat_line(logprobs=False, top_logprobs=2), r"^top_logprobs: needs logprobs: true"),
        (chat_line(logprobs=True, top_logprobs=21), r"^logprobs: expected \[0, 20\]"),
        (chat_line(logprobs=True, top_logprobs=True), r"^logprobs: expected a whole number"),
        (chat_line(response_format={"type": "json_object"}), r"^response_format: .*free text"),
        (chat_line(response_format={"type": "json_schema", "json_schema": {}}),
         r"^response_format: "),
        (chat_line(modalities=["text", "audio"]), r"^modalities: "),
        (chat_line(parallel_tool_calls=False), r"^parallel_tool_calls: "),
        (chat_line(tool_choice="required"), r'^tool_choice: "required" is not supported; use'),
        (chat_line(tool_choice={"type": "function"}), r"^tool_choice: "),
        (chat_line(tools="f"), r"^tools: expected a list"),
        (chat_line(tools=["f"]), r"^tools\[0\]: expected a map"),
        (chat_line(tools=[TOOL, {"type": "web_search"}]), r"^tools\[1\]\.type: \"web_search\""),
        (chat_line(tools=[TOOL | {"x": float("nan")}]), r"^tools: expected finite numbers"),
        (chat_line(chat_template_kwargs=[]), r"^chat_template_kwargs: expected a map"),
        (chat_line(chat_template_kwargs={"messages": []}), r"^chat_template_kwargs\.messages: "),
        (chat_line(chat_template_kwargs={"tools": [TOOL]}, tools=[TOOL]),
         r"^chat_template_kwargs\.tools: given beside tools"),
        (chat_line(chat_template_kwargs={"a": 2**64}), r"^chat_template_kwargs: .* 64 bits"),
        (chat_line(messages=[]), r"^messages: expected a list with at least one"),
        (chat_line(messages=[{"role": "user"}]), r"^messages\[0\]\.content: expected text"),
        (chat_line(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
         r"^messages\[0\]\.content\[0\]: parts of type 'image_url'"),
        (chat_line(messages=[{"role": "user", "content": [{"type": "input_audio"}]}]),
         r"^messages\[0\]\.content\[0\]: parts of type 'input_audio'"),
        (chat_line(messages=[{"role": "user", "content": "\ud800"}]),
         r"^messages: not valid Unicode"),
    ],
)  # fmt: skip
def test_fields_of_one_kind_of_request(line, complaint):
    with pytest.raises(InvalidRequestError, match=complaint):
        parse(line)


@MAKERS
def test_null_is_not_given(make):
    names = ["temperature", "stop", "n", "stream", "logprobs", "user", "max_tokens", "seed"]
    assert parse(make(**dict.fromkeys(names))) == parse(make())


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 3}, 3),
        ({"logprobs": False}, None),
        ({"logprobs": False, "top_logprobs": 0}, None),
        ({"top_logprobs": None}, None),
    ],
)
def test_logprobs_of_a_chat(body, expected):
    request = parse(chat_line(**body))
    assert request.sampling.get("logprobs") == expected
    assert request.has_logprobs == (expected is not None)


@pytest.mark.parametrize("number", [0, 5])
def test_logprobs_of_a_completion(number):
    request = parse(completion_line(logprobs=number))
    assert request.sampling == {"logprobs": number}
    assert request.has_logprobs


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"tools": [TOOL]}, {"tools": [TOOL]}),
        ({"tools": [TOOL], "tool_choice": "none"}, {}),
        ({"tools": []}, {}),
        ({"chat_template_kwargs": {"enable_thinking": False}}, {"enable_thinking": False}),
        (
            {"chat_template_kwargs": {"a": 1}, "tools": [TOOL], "tool_choice": "auto"},
            {"a": 1, "tools": [TOOL]},
        ),
        ({"chat_template_kwargs": {"tools": [TOOL]}}, {"tools": [TOOL]}),
    ],
)
def test_template_kwargs(body, expected):
    assert parse(chat_line(**body)).template_kwargs == expected


def test_submit_fields():
    fields = openai.to_submit_fields(parse({"prompt": [1, 2], "temperature": 0}))
    assert fields == {
        "prompt": None,
        "messages": None,
        "token_ids": [1, 2],
        "sampling": {"temperature": 0.0},
        "template_kwargs": {},
    }
    assert SamplingParams.from_mapping(fields["sampling"]).is_greedy


def test_deep_nests_are_refused():
    nested = []
    for _ in range(100):
        nested = [nested]
    with pytest.raises(InvalidRequestError, match=r"^messages: nested more than 64 deep"):
        parse({"messages": [{"role": "user", "content": "a", "x": nested}]})


# --------------------------------------------------------------------------------------
# any line at all

FIELDS = [
    "custom_id", "method", "url", "body", "prompt", "messages", "token_ids", "temperature", "n",
    "stop", "logit_bias", "logprobs", "top_logprobs", "tools", "tool_choice", "max_tokens",
    "chat_template_kwargs", "response_format", "model", "stream", "metadata", "seed", "role",
    "content", "type", "text",
]  # fmt: skip
words = st.sampled_from(
    ["POST", "/v1/chat/completions", "/v1/completions", "user", "text", "auto", "a", "", "\ud800"]
)
scalars = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | words
    | st.just(10**400) | st.integers(0, 5)
)  # fmt: skip
names = st.sampled_from(FIELDS) | st.text(max_size=3)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=5),
    max_leaves=20,
)
bodies = st.dictionaries(st.sampled_from(FIELDS), values, max_size=5)


def envelope(url, body):
    return {"custom_id": "x", "method": "POST", "url": url, "body": body}


lines = values | bodies | st.builds(envelope, st.sampled_from(
    ["/v1/chat/completions", "/v1/completions"]), bodies)  # fmt: skip


def parsed_or_refused(line):
    try:
        return openai.parse_line(line, 1)
    except InvalidRequestError as error:
        complaint = str(error)
    complaint.encode()
    assert 0 < len(complaint) < 1000
    return None


HUGE = 10**5000  # Python refuses to write it in decimal


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": HUGE},
        {"prompt": [HUGE]},
        {"custom_id": HUGE},
        {"prompt": "a", "n": HUGE},
        {"prompt": "a", "temperature": HUGE},
        {"prompt": "a", "temperature": -HUGE},
        {"prompt": "a", "max_tokens": HUGE},
        {"prompt": "a", "seed": HUGE},
        {"prompt": "a", "logit_bias": {"1": HUGE}},
        {"prompt": "a", "logit_bias": {"1" * 5000: 1}},
        {"prompt": "a", "stop": [HUGE]},
        {"prompt": "a", "stop_token_ids": [HUGE]},
        {"prompt": "a", "metadata": {"x": HUGE}},
        {"prompt": "a", "model": HUGE},
        {"messages": [HUGE]},
        {"messages": [{"role": HUGE}]},
        {"messages": [{"role": "user", "content": [{"type": HUGE}]}]},
        {"messages": [{"role": "user", "content": "a", "x": HUGE}]},
        {"messages": HELLO, "tool_choice": HUGE},
        {"messages": HELLO, "response_format": [HUGE]},
        {"messages": HELLO, "top_logprobs": HUGE, "logprobs": True},
        {"method": HUGE},
        {"url": [HUGE], "body": {}},
    ],
    ids=lambda line: next(reversed(line)),
)
def test_huge_numbers_are_refused_like_others(line):
    assert parsed_or_refused(line) is None


@settings(max_examples=1000, deadline=None)
@given(line=lines)
def test_any_json_is_a_request_or_refused(line):
    request = parsed_or_refused(line)
    if request is None:
        return
    assert request == openai.parse_line(line, 1)
    assert len(openai.request_hash(request)) == 64
    fields = openai.to_submit_fields(request)
    message = protocol.Submit(
        "r", fields["prompt"], fields["messages"],
        None if fields["token_ids"] is None else protocol.pack_i32(fields["token_ids"]),
        fields["sampling"], fields["template_kwargs"], False, "x",
    )  # fmt: skip
    assert protocol.decode(protocol.encode(message)) == message
    SamplingParams.from_mapping(fields["sampling"])


# --------------------------------------------------------------------------------------
# the hash


def hash_of(line):
    return openai.request_hash(parse(line))


@pytest.mark.parametrize(
    ("line", "same"),
    [
        ({"prompt": "a", "stop": "x"}, {"stop": ["x"], "prompt": "a"}),
        ({"prompt": "a", "temperature": 1}, {"prompt": "a", "temperature": 1.0}),
        ({"prompt": "a", "max_tokens": 5}, {"prompt": "a", "max_completion_tokens": 5}),
        ({"prompt": "a", "top_k": None}, {"prompt": "a"}),
        ({"prompt": "a", "custom_id": "x"}, {"prompt": "a", "custom_id": "y"}),
        ({"prompt": [1]}, {"token_ids": [1]}),
        (chat_line(), {"messages": HELLO, "model": "gpt-4o-mini"}),
        (chat_line(user="ada"), chat_line(metadata={"a": "b"})),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]},
            {"messages": HELLO},
        ),
        (
            {"prompt": "a", "logit_bias": {"1": 1, "2": 2}},
            {"prompt": "a", "logit_bias": {"2": 2.0, "1": 1.0}},
        ),
    ],
)
def test_spelling_does_not_change_the_hash(line, same):
    assert hash_of(line) == hash_of(same)


def test_what_changes_the_answer_changes_the_hash():
    variants = [
        {"prompt": "a"},
        {"prompt": "b"},
        {"prompt": [1]},
        {"prompt": "a", "model": "m"},
        {"prompt": "a", "return_token_ids": True},
        {"messages": HELLO},
        {"messages": HELLO, "tools": [TOOL]},
        {"messages": HELLO, "chat_template_kwargs": {"enable_thinking": False}},
        {"messages": [*HELLO, {"role": "assistant", "content": "Hi"}]},
        {"messages": HELLO, "logprobs": True},
        *({"prompt": "a", name: value} for name, value, _ in SAMPLING),
    ]
    assert len({hash_of(line) for line in variants}) == len(variants)


def test_the_hash_is_the_same_in_every_version():
    """A resumed job compares with hashes that an earlier version wrote."""
    line = chat_line(temperature=0.5, logit_bias={"7": 1}, stop=["x"], tools=[TOOL])
    assert hash_of(line) == "8d3d56bac8b032c5f867e0bfa649998cd52f82e890baeb206845de816b14b55e"


# --------------------------------------------------------------------------------------
# answers

PIECES = {1: b"Hel", 2: b"lo", 3: "\u00e9".encode()[:1], 4: "\u00e9".encode()[1:], 9: b"<|end|>"}


def position(logprob, *top):
    ids, values = [i for i, _ in top], [v for _, v in top]
    return protocol.TokenLogprobs(logprob, protocol.pack_i32(ids), protocol.pack_f32(values))


def completion(**changes):
    values = {
        "request_id": "req-1",
        "text": "Hello\u00e9",
        "token_ids": [1, 2, 3, 4, 9],
        "logprobs": [],
        "finish_reason": "stop",
        "stop_reason": None,
        "num_prompt_tokens": 11,
        "num_cached_tokens": 8,
        "num_output_tokens": 5,
    }
    return Completion(**values | changes)


def test_a_chat_completion():
    request = parse(chat_line())
    body = openai.success_body(request, completion(), created=1_700_000_000, model_name="demo")
    assert body == {
        "id": "chatcmpl-req-1",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "demo",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello\u00e9"},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16},
        "metrics": {"num_cached_tokens": 8},
    }


def test_a_text_completion():
    request = parse(completion_line(return_token_ids=True, stop="\n"))
    answer = completion(text="<think>x</think>y", finish_reason="length", stop_reason="\n")
    body = openai.success_body(request, answer)
    assert body["object"] == "text_completion"
    assert body["id"] == "cmpl-req-1"
    assert body["model"] == "davinci-002"
    assert body["choices"] == [
        {
            "index": 0,
            "text": "<think>x</think>y",
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": "\n",
            "token_ids": [1, 2, 3, 4, 9],
        }
    ]


def test_usage_does_not_depend_on_the_prefix_cache():
    """A resumed run finds other blocks in the cache, and must give the same usage."""
    request = parse(chat_line())
    bodies = [openai.success_body(request, completion(num_cached_tokens=n)) for n in (0, 8)]
    assert bodies[0]["usage"] == bodies[1]["usage"]
    assert bodies[0]["choices"] == bodies[1]["choices"]


@pytest.mark.parametrize(
    ("text", "is_open", "expected"),
    [
        ("<think>\nhm\n</think>\n\nyes", None, {"content": "yes", "reasoning_content": "hm"}),
        ("hm\n</think>\n\nyes", True, {"content": "yes", "reasoning_content": "hm"}),
        ("cut", True, {"content": "", "reasoning_content": "cut"}),
        ("yes", None, {"content": "yes"}),
        ("say </think>", False, {"content": "say </think>"}),
    ],
)
def test_thinking_is_split_off(text, is_open, expected):
    body = openai.success_body(parse(chat_line()), completion(text=text), is_thinking_open=is_open)
    assert body["choices"][0]["message"] == {"role": "assistant"} | expected


def logprobs():
    return [
        position(-0.5, (1, -0.5), (2, -1.0)),
        position(-0.25, (2, -0.25), (3, -2.0)),
        position(-1.0, (3, -1.0), (1, -math.inf)),
        position(-0.125, (4, -0.125), (1, -4.0)),
        position(0.0, (9, 0.0), (1, -8.0)),
    ]


def test_logprobs_of_a_chat_answer():
    request = parse(chat_line(logprobs=True, top_logprobs=2))
    body = openai.success_body(
        request, completion(logprobs=logprobs()), token_bytes=PIECES.__getitem__
    )
    content = body["choices"][0]["logprobs"]["content"]
    assert body["choices"][0]["logprobs"]["refusal"] is None
    assert [entry["token"] for entry in content] == ["Hel", "lo", "\ufffd", "\ufffd", "<|end|>"]
    assert [entry["logprob"] for entry in content] == [-0.5, -0.25, -1.0, -0.125, 0.0]
    assert content[2] == {
        "token": "\ufffd",
        "logprob": -1.0,
        "bytes": [0xC3],
        "top_logprobs": [
            {"token": "\ufffd", "logprob": -1.0, "bytes": [0xC3]},
            {"token": "Hel", "logprob": -9999.0, "bytes": list(b"Hel")},
        ],
    }
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode() == "Hello\u00e9<|end|>"
    json.dumps(body, allow_nan=False)


def test_logprobs_of_a_completion_answer():
    request = parse(completion_line(logprobs=2))
    body = openai.success_body(
        request, completion(logprobs=logprobs()), token_bytes=PIECES.__getitem__
    )
    assert body["choices"][0]["logprobs"] == {
        "tokens": ["Hel", "lo", "bytes:\\xc3", "bytes:\\xa9", "<|end|>"],
        "token_logprobs": [-0.5, -0.25, -1.0, -0.125, 0.0],
        "top_logprobs": [
            {"Hel": -0.5, "lo": -1.0},
            {"lo": -0.25, "bytes:\\xc3": -2.0},
            {"bytes:\\xc3": -1.0, "Hel": -9999.0},
            {"bytes:\\xa9": -0.125, "Hel": -4.0},
            {"<|end|>": 0.0, "Hel": -8.0},
        ],
        "text_offset": [0, 3, 5, 5, 6],
    }


def test_text_offsets_stay_inside_a_text_that_a_stop_string_cut():
    request = parse(completion_line(logprobs=1))
    answer = completion(text="Hell", logprobs=logprobs())
    body = openai.success_body(request, answer, token_bytes=PIECES.__getitem__)
    assert body["choices"][0]["logprobs"]["text_offset"] == [0, 3, 4, 4, 4]


def test_a_logprob_that_json_has_no_number_for():
    request = parse(chat_line(logprobs=True))
    answer = completion(token_ids=[1], logprobs=[position(math.nan, (1, -math.inf))])
    (entry,) = openai.success_body(request, answer)["choices"][0]["logprobs"]["content"]
    assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] == -9999.0


def test_logprobs_without_any_top_tokens():
    answer = completion(logprobs=[position(-1.0)] * 5)
    completed = openai.success_body(
        parse(completion_line(logprobs=0)), answer, token_bytes=PIECES.__getitem__
    )
    assert completed["choices"][0]["logprobs"]["top_logprobs"] is None
    chatted = openai.success_body(
        parse(chat_line(logprobs=True)), answer, token_bytes=PIECES.__getitem__
    )
    assert chatted["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_logprobs_without_a_tokenizer_name_ids():
    answer = completion(logprobs=logprobs())
    chatted = openai.success_body(parse(chat_line(logprobs=True)), answer)
    entry = chatted["choices"][0]["logprobs"]["content"][0]
    assert (entry["token"], entry["bytes"]) == ("token_id:1", None)
    completed = openai.success_body(parse(completion_line(logprobs=1)), answer)
    assert completed["choices"][0]["logprobs"]["tokens"][:2] == ["token_id:1", "token_id:2"]


def test_an_output_line():
    request = parse(chat_line())
    body = openai.success_body(request, completion())
    assert openai.output_line(request, body) == {
        "id": "batch_req_req-1",
        "custom_id": "a",
        "response": {"status_code": 200, "request_id": "req-1", "body": body},
        "error": None,
    }


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (errors.InvalidRequestError("n: 2 is not supported"), 400, "invalid_request"),
        (errors.RequestAbortedError("cancelled"), 499, "aborted"),
        (errors.UnavailableError("draining"), 503, "unavailable"),
        (errors.DeadlineExceededError("late"), 504, "deadline_exceeded"),
        (errors.StageDiedError("gone", stage_index=1), 500, "stage_died"),
        (errors.EmberError("oh"), 500, "internal_error"),
    ],
)
def test_an_error_line(error, status, code):
    line = openai.error_line("a", error)
    assert line["custom_id"] == "a"
    assert line["error"] == {"code": code, "message": str(error)}
    assert line["response"]["status_code"] == openai.status_code(error) == status
    assert line["response"]["body"]["error"]["message"] == str(error)
    assert line["id"] != openai.error_line("b", error)["id"]
    assert line == openai.error_line("a", error)
