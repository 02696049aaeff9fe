"""Chat templates: transformers' apply_chat_template is the oracle; what gets lost is refused."""

import functools
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ember_pp.chat_template import ChatTemplate, check_messages
from ember_pp.errors import InvalidRequestError
from ember_pp.tokenizer import Tokenizer

DEMO = Path(__file__).parents[1] / "ember_pp" / "demo"
DATA = Path(os.environ.get("EMBER_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# In the manner of Llama 3: named roles only, tool calls written as JSON, bos from outside.
NAMED_ROLES = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}"
    "{% for m in messages %}{% if m.role in ['system', 'user', 'assistant', 'tool'] %}"
    "[{{ m.role }}]{{ m.content | trim }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}"
    "{% endif %}{% endfor %}[assistant]"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather <now> & here",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def call(arguments):
    function = {"name": "get_weather", "arguments": arguments}
    return {"id": "call_1", "type": "function", "function": function}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text} | more


SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"role": "tool", "tool_call_id": "call_1", "content": '{"celsius": 21}'}
CHATS = {
    "one": [user("Hello")],
    "system": [SYSTEM, user("Hello")],
    "unicode": [user("naïve café 船 \U0001f6a2 <b>&</b>\n\n  indented")],
    "turns": [SYSTEM, user("a"), assistant("b"), user("c")],
    "ends-with-assistant": [user("a"), assistant("b")],
    "thinking-in-content": [user("a"), assistant("<think>\nhm\n</think>\n\nb"), user("c")],
    "reasoning": [user("a"), assistant("b", reasoning_content="hm"), user("c")],
    "reasoning-last": [user("a"), assistant("b", reasoning_content="hm")],
    "reasoning-alias": [user("a"), assistant("b", reasoning="hm")],
    "thinking-alias": [user("a"), assistant("b", thinking="hm"), TOOL],
    "tool-call": [user("a"), assistant("", tool_calls=[call({"city": "Köln"})]), TOOL],
    "tool-call-text": [user("a"), assistant("ok", tool_calls=[call('{"city":"Köln"}')]), TOOL],
    "two-tools": [
        user("a"),
        assistant("", tool_calls=[call({"city": "A"}), call({"city": "B"})]),
        TOOL,
        TOOL,
        assistant("done", reasoning_content="both"),
        user("thanks"),
    ],
    "looks-like-a-tool": [user("<tool_response>x</tool_response>"), assistant("b"), user("c")],
    "empty": [user("")],
    "names": [{"role": "user", "name": "ada", "content": "Hello"}],
}
KWARGS = {
    "plain": {},
    "no-thinking": {"enable_thinking": False},
    "thinking": {"enable_thinking": True},
    "tools": {"tools": [WEATHER]},
    "two-tools": {"tools": [WEATHER, {"type": "function", "function": {"name": "é"}}]},
    "no-prompt": {"add_generation_prompt": False},
}


def theirs(tokenizer, messages, kwargs):
    options = {"add_generation_prompt": True} | kwargs
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


@pytest.fixture(scope="session")
def pair(request):
    """Our tokenizer and transformers' of the same folder."""
    transformers = pytest.importorskip("transformers")
    return Tokenizer.load(request.param), transformers.AutoTokenizer.from_pretrained(request.param)


@functools.cache
def qwen3_template():
    """Source and our compiled template."""
    path = DATA / "qwen3-tokenizer" / "tokenizer_config.json"
    if not path.is_file():
        pytest.skip("Qwen3's template is not here; EMBER_TEST_DATA names the folder above it")
    source = json.loads(path.read_text())["chat_template"]
    return source, ChatTemplate(source, origin="qwen3")


def oracle_render(source, messages, kwargs, **special_tokens):
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    names = special_tokens | {"add_generation_prompt": True} | kwargs
    (rendered,) = utils.render_jinja_template(
        conversations=[messages], chat_template=source, **names
    )[0]
    return rendered


@pytest.mark.optional
@pytest.mark.parametrize("kwargs", KWARGS.values(), ids=KWARGS)
@pytest.mark.parametrize("messages", CHATS.values(), ids=CHATS)
def test_qwen3_renders_like_transformers(messages, kwargs):
    source, template = qwen3_template()
    ours = template.render(messages, kwargs, {})
    assert ours == oracle_render(source, messages, kwargs)


@pytest.mark.parametrize("pair", [DEMO], indirect=True, ids=["demo"])
@pytest.mark.parametrize("messages", CHATS.values(), ids=CHATS)
def test_demo_renders_and_encodes_like_transformers(pair, messages):
    ours, transformers_tokenizer = pair
    rendered = ours.render_chat(messages, {})
    assert rendered == theirs(transformers_tokenizer, messages, {})
    ids = transformers_tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert ours.encode_rendered(rendered) == ids


@pytest.mark.parametrize("messages", CHATS.values(), ids=CHATS)
def test_chatml_renders_like_transformers(messages):
    ours = ChatTemplate(CHATML, origin="x").render(messages, {}, {})
    assert ours == oracle_render(CHATML, messages, {})


def test_special_tokens_are_names_that_kwargs_override():
    template = ChatTemplate(NAMED_ROLES, origin="x")
    special_tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    assert template.render([user("a")], {}, special_tokens) == "<s>[user]a[assistant]"
    overridden = template.render([user("a")], {"bos_token": ""}, special_tokens)
    assert overridden == "[user]a[assistant]"


text = st.text(st.characters(codec="utf-8"), max_size=20)
messages_strategy = st.lists(
    st.builds(lambda role, content: {"role": role, "content": content},
              st.sampled_from(["system", "user", "assistant", "tool"]), text),
    min_size=1, max_size=5,
)  # fmt: skip


@pytest.mark.optional
@settings(max_examples=60, deadline=None)
@given(messages=messages_strategy, enable_thinking=st.sampled_from([None, True, False]))
def test_qwen3_renders_any_text_like_transformers(messages, enable_thinking):
    source, template = qwen3_template()
    kwargs = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    ours = template.render(messages, kwargs, {})
    assert ours == oracle_render(source, messages, kwargs)


# --------------------------------------------------------------------------------------
# messages


def test_text_parts_are_joined_with_line_breaks():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}, "c", {"text": "d"}]
    assert check_messages([user(parts)]) == [user("a\nb\nc\nd")]


def test_content_may_be_left_out_beside_tool_calls():
    for message in (assistant(None), {"role": "assistant"}):
        message = message | {"tool_calls": [call("{}")]}
        assert check_messages([message])[0]["content"] == ""


def test_messages_are_not_changed():
    message = user([{"type": "text", "text": "a"}])
    check_messages([message])
    assert message == user([{"type": "text", "text": "a"}])


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        (None, r"^messages: expected a list .* got None"),
        ([], r"^messages: expected a list .* got list of 0"),
        ("hi", r"^messages: expected a list"),
        ({"role": "user"}, r"^messages: expected a list"),
        (["hi"], r"^messages\[0\]: expected a map"),
        ([user("a"), {}], r"^messages\[1\]\.role: expected"),
        ([{"role": 1, "content": "a"}], r"^messages\[0\]\.role: expected"),
        ([{"role": "", "content": "a"}], r"^messages\[0\]\.role: expected"),
        ([{"role": "user"}], r"^messages\[0\]\.content: expected text"),
        ([user(None)], r"^messages\[0\]\.content: expected text"),
        ([assistant(None, tool_calls=[])], r"^messages\[0\]\.content: expected text"),
        ([user(5)], r"^messages\[0\]\.content: expected text"),
        ([user([{"type": "image_url", "image_url": {"url": "x"}}])],
         r"^messages\[0\]\.content\[0\]: parts of type 'image_url' are not supported"),
        ([user([{"type": "text", "text": "a"}, {"type": "input_audio"}])],
         r"^messages\[0\]\.content\[1\]: parts of type 'input_audio'"),
        ([user([{"type": "text", "text": 5}])], r"content\[0\]: expected a text part, got int"),
        ([user([{"type": "text"}])], r"content\[0\]: expected a text part, got None"),
        ([user([{"type": "text", "text": "a", "b": 1}])], r"content\[0\]: unknown field 'b'"),
        ([user([5])], r"content\[0\]: expected a text part"),
        ([assistant("a", audio={"id": "x"})], r"^messages\[0\]\.audio: not supported"),
        ([assistant("a", function_call={})],
         r"^messages\[0\]\.function_call: not supported; use tool_calls"),
        ([assistant("a", tool_calls="f()")], r"^messages\[0\]\.tool_calls: expected a list"),
        ([assistant("a", tool_calls=["f()"])], r"^messages\[0\]\.tool_calls: expected a list"),
        ([{1: 2, "role": "user", "content": "a"}], r"^messages\[0\]: expected names as keys"),
    ],
)  # fmt: skip
def test_a_bad_message_is_named(messages, complaint):
    with pytest.raises(InvalidRequestError, match=complaint):
        check_messages(messages)
    with pytest.raises(InvalidRequestError, match=complaint):
        ChatTemplate(CHATML, origin="x").render(messages, {}, {})


# --------------------------------------------------------------------------------------
# nothing is lost in silence


def test_developer_is_system_unless_the_template_knows_it():
    messages = [{"role": "developer", "content": "Be brief."}, user("a")]
    assert "[system]Be brief." in ChatTemplate(NAMED_ROLES, origin="x").render(messages, {}, {})
    knows = CHATML + "{# developer #}"
    assert "developer\nBe brief." in ChatTemplate(knows, origin="x").render(messages, {}, {})


def test_a_role_that_the_template_passes_over_is_refused():
    messages = [{"role": "critic", "content": "too long"}, user("a")]
    assert "critic\ntoo long" in ChatTemplate(CHATML, origin="x").render(messages, {}, {})
    with pytest.raises(InvalidRequestError, match=r"messages\[0\]\.role: .* know 'critic'"):
        ChatTemplate(NAMED_ROLES, origin="x").render(messages, {}, {})


@pytest.mark.parametrize(
    ("kwargs", "complaint"),
    [
        ({"enable_thinkin": True}, r"^chat_template_kwargs\.enable_thinkin: .* does not read it"),
        ({"tool": [WEATHER]}, r"^chat_template_kwargs\.tool: .*did you mean 'tools'\?"),
        ({"messages": []}, r"^chat_template_kwargs\.messages: send them"),
        ({"chat_template": "x"}, r"^chat_template_kwargs\.chat_template: .* checkpoint's"),
        ({"continue_final_message": True}, r"^chat_template_kwargs\.continue_final_message: "),
    ],
)
def test_kwargs_that_would_do_nothing_are_refused(kwargs, complaint):
    with pytest.raises(InvalidRequestError, match=complaint):
        ChatTemplate(NAMED_ROLES, origin="x").render([user("a")], kwargs, {})


def test_kwargs_that_ask_for_nothing_are_taken():
    template = ChatTemplate(CHATML, origin="x")
    nothing = {"enable_thinking": False, "tools": [], "documents": None}
    assert template.render([user("a")], nothing, {}) == template.render([user("a")], {}, {})


def test_tools_are_refused_where_the_template_has_no_place_for_them():
    with pytest.raises(InvalidRequestError, match=r"^tools: .* does not read it"):
        ChatTemplate(CHATML, origin="x").render([user("a")], {"tools": [WEATHER]}, {})


def test_arguments_as_json_text_are_not_quoted_twice():
    messages = [user("a"), assistant("", tool_calls=[call('{"city": "Köln"}')])]
    assert '{"city": "Köln"}' in ChatTemplate(NAMED_ROLES, origin="x").render(messages, {}, {})


def test_arguments_that_are_no_json_are_named():
    messages = [user("a"), assistant("", tool_calls=[call("{city")])]
    with pytest.raises(InvalidRequestError, match=r"tool_calls: arguments are not JSON: '\{city'"):
        ChatTemplate(NAMED_ROLES, origin="x").render(messages, {}, {})


def test_an_error_of_the_template_is_the_request_s():
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", origin="x")
    complaint = r"^messages: chat template: roles must alternate$"
    with pytest.raises(InvalidRequestError, match=complaint):
        template.render([user("a")], {}, {})


# --------------------------------------------------------------------------------------
# which template


def write(folder, config, **files):
    for name in ("tokenizer.json",):
        (folder / name).write_bytes((DEMO / name).read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, source in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(exist_ok=True)
        path.with_suffix(".jinja").write_text(source)
    return Tokenizer.load(folder)


def test_a_file_wins_over_the_config(tmp_path):
    tokenizer = write(tmp_path, {"chat_template": "config"}, chat_template="file")
    assert tokenizer.render_chat([user("a")], {}) == "file"


def test_templates_have_names(tmp_path):
    named = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "{{ tools | length }} tools"},
    ]
    tokenizer = write(tmp_path, {"chat_template": named})
    assert tokenizer.render_chat([user("a")], {}) == "plain"
    assert tokenizer.render_chat([user("a")], {"tools": [WEATHER]}) == "1 tools"


def test_templates_may_be_files_with_names(tmp_path):
    tokenizer = write(
        tmp_path, {}, chat_template="plain", chat_templates__tool_use="{{ tools | length }} tools"
    )
    assert tokenizer.render_chat([user("a")], {}) == "plain"
    assert tokenizer.render_chat([user("a")], {"tools": [WEATHER]}) == "1 tools"


def test_without_a_template_a_chat_is_refused(tmp_path):
    tokenizer = write(tmp_path, {})
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequestError, match=r"no chat template; send a prompt"):
        tokenizer.render_chat([user("a")], {})


@pytest.mark.parametrize("ending", ["<think>\n", "assistant\n"])
def test_knows_whether_the_prompt_opens_the_thinking(tmp_path, ending):
    tokenizer = write(tmp_path, {"chat_template": "{{ messages[0].content }}" + ending})
    assert tokenizer.opens_thinking({}) == (ending == "<think>\n")
