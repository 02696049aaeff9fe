"""Chat messages to prompt text, by a checkpoint's chat template.

``check_messages`` knows what a message is; ``ChatTemplate`` gives it to the template in the
form in which transformers would, and refuses what the template would pass over in silence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ember_pp.errors import CheckpointError, InvalidRequestError
from ember_pp.sampling_params import suggest
from ember_pp.template_sandbox import SandboxedTemplate, TemplateError

_STANDARD_ROLES = ("system", "user", "assistant", "tool")
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_TESTS_ARGUMENTS = re.compile(r"arguments\W{0,3}\s+is\s+(not\s+)?(string|mapping)")
REFUSED_KWARGS = {
    "messages": "send them as the request's messages",
    "chat_template": "the template is the checkpoint's",
    "continue_final_message": "not supported; send a prompt with the text to continue",
}


# --------------------------------------------------------------------------------------
# messages


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """The chat messages in ``messages`` as templates take them: ``content`` is one string.

    Text parts are joined with line breaks. A missing or null ``content`` becomes empty where
    the message has ``tool_calls``. All other keys are left as they are.

    Raises:
        InvalidRequestError: not a list of messages, or content that is not text; names which.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise InvalidRequestError(
            f"messages: expected a list with at least one message, got {_shown(messages)}"
        )
    return [_check_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _check_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequestError(
            f"{where}: expected a map with role and content, got {_shown(message)}"
        )
    for key in message:
        if not isinstance(key, str):
            raise InvalidRequestError(f"{where}: expected names as keys, got {_shown(key)}")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequestError(
            f"{where}.role: expected system, user, assistant or tool, got {_shown(role)}"
        )
    for refused in ("audio", "function_call"):
        if message.get(refused) is not None:
            raise InvalidRequestError(f"{where}.{refused}: not supported{_instead(refused)}")
    _check_tool_calls(message.get("tool_calls"), f"{where}.tool_calls")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        content = ""
    return {**message, "content": _join_text(content, f"{where}.content")}


def _instead(field: str) -> str:
    return "; use tool_calls" if field == "function_call" else "; this model reads text only"


def _check_tool_calls(tool_calls: Any, where: str) -> None:
    if tool_calls is None:
        return
    is_calls = isinstance(tool_calls, list | tuple) and all(
        isinstance(call, Mapping) for call in tool_calls
    )
    if not is_calls:
        raise InvalidRequestError(f"{where}: expected a list of maps, got {_shown(tool_calls)}")


def _join_text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise InvalidRequestError(
            f"{where}: expected text or a list of text parts, got {_shown(content)}"
        )
    return "\n".join(_part_text(part, f"{where}[{i}]") for i, part in enumerate(content))


def _part_text(part: Any, where: str) -> str:
    if isinstance(part, Mapping):
        kind, text = part.get("type", "text"), part.get("text")
        if kind != "text":
            raise InvalidRequestError(
                f"{where}: parts of type {_shown(kind)} are not supported; "
                "this model reads text only"
            )
        extra = set(part) - {"type", "text"}
        if extra:
            raise InvalidRequestError(f"{where}: unknown field {_shown(min(extra, key=str))}")
        part = text
    if not isinstance(part, str):
        raise InvalidRequestError(f"{where}: expected a text part, got {_shown(part)}")
    return part


def _shown(value: Any) -> str:
    """``value`` for an error text: short, whatever it is."""
    if isinstance(value, list | tuple | Mapping):
        return f"{type(value).__name__} of {len(value)}"
    shown = repr(value) if isinstance(value, str | bool | type(None)) else type(value).__name__
    return shown if len(shown) <= 80 else f"{shown[:80]}..."


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Give a message's thinking under the names that templates read, as transformers does."""
    given = (message[name] for name in _REASONING_FIELDS if message.get(name) is not None)
    reasoning = next(given, None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _with_parsed_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """Replace the arguments of tool calls, JSON text in OpenAI's form, by what they say."""
    tool_calls = message.get("tool_calls")
    if not tool_calls:
        return message
    return {**message, "tool_calls": [_parse_arguments(call) for call in tool_calls]}


def _parse_arguments(tool_call: Mapping[str, Any]) -> dict[str, Any]:
    parsed = dict(tool_call)
    if isinstance(parsed.get("function"), Mapping):
        parsed["function"] = _parse_arguments(parsed["function"])
    arguments = parsed.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed["arguments"] = json.loads(arguments)
        except (ValueError, RecursionError):
            raise InvalidRequestError(
                f"tool_calls: arguments are not JSON: {_shown(arguments)}"
            ) from None
    return parsed


# --------------------------------------------------------------------------------------
# templates


class ChatTemplate:
    """One template of a checkpoint, compiled.

    Raises:
        CheckpointError: the template is not valid Jinja; names its file and line.
    """

    def __init__(self, source: str, *, origin: str) -> None:
        try:
            self._template = SandboxedTemplate(source)
        except TemplateError as error:
            raise CheckpointError(f"{origin}: chat template: {error}") from None
        self._source = source
        self._variables = self._template.variables
        # Templates that know both forms of arguments say so; the others write what they get
        # as JSON, and JSON text would become a JSON string of it.
        self._takes_json_arguments = _TESTS_ARGUMENTS.search(source) is not None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        template_kwargs: Mapping[str, Any],
        special_tokens: Mapping[str, str],
    ) -> str:
        """The prompt text of ``messages`` (see ``check_messages``), ready for the answer.

        Raises:
            InvalidRequestError: messages or names that the template does not take, an error
                that it raised, or more text or work than ``template_sandbox.py`` allows.
        """
        checked = [_with_reasoning(message) for message in check_messages(messages)]
        if not self._takes_json_arguments:
            checked = [_with_parsed_arguments(message) for message in checked]
        checked = [self._with_known_role(message) for message in checked]
        self._check_kwargs(template_kwargs)
        names = {
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            **special_tokens,
            **template_kwargs,
        }
        try:
            text = self._template.render({**names, "messages": checked})
        except TemplateError as error:
            raise InvalidRequestError(f"messages: chat template: {error}") from None
        self._check_roles_shown(checked, text)
        return text

    def _check_kwargs(self, template_kwargs: Mapping[str, Any]) -> None:
        for name, value in template_kwargs.items():
            if not isinstance(name, str):
                raise InvalidRequestError(f"chat_template_kwargs: {_shown(name)} is no name")
            if name in REFUSED_KWARGS:
                raise InvalidRequestError(f"chat_template_kwargs.{name}: {REFUSED_KWARGS[name]}")
            # What asks for nothing need not be understood: no tools, no thinking.
            if name not in self._variables and value:
                known = sorted(self._variables - {"messages", "add_generation_prompt"})
                raise InvalidRequestError(
                    f"{'' if name == 'tools' else 'chat_template_kwargs.'}{name}: "
                    f"this model's chat template does not read it{suggest(name, known)}"
                )

    def _with_known_role(self, message: dict[str, Any]) -> dict[str, Any]:
        if message["role"] == "developer" and "developer" not in self._source:
            return {**message, "role": "system"}  # OpenAI's newer name for it
        return message

    def _check_roles_shown(self, messages: Sequence[Mapping[str, Any]], text: str) -> None:
        """Templates pass over roles that they do not know: refuse what got lost that way."""
        for i, message in enumerate(messages):
            is_standard = message["role"] in _STANDARD_ROLES
            if not is_standard and message["content"].strip() not in text:
                raise InvalidRequestError(
                    f"messages[{i}].role: this model's chat template does not know "
                    f"{_shown(message['role'])}"
                )
