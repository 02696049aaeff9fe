"""Chat messages to prompt text: a checkpoint's Jinja template, rendered in a bounded sandbox.

The names a template can use are those that transformers gives it, so that the same template
gives the same text. The only file that imports jinja2.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.compiler
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

from ember_pp.errors import CheckpointError, InvalidRequestError
from ember_pp.sampling_params import suggest

MAX_TEXT_CHARS = 64 * 1024 * 1024
"""Longest text that a template may make, the prompt included."""
MAX_WORK = 2**30
"""Work of one rendering, in characters handled; a prompt of a megabyte takes about 1% of it."""
_WORK_PER_STEP = 256
"""What one pass through a block of the template counts as, in characters."""
_MAX_WIDTH = 100_000
"""Largest number that a template may hand to a function that pads or repeats."""

_STANDARD_ROLES = ("system", "user", "assistant", "tool")
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
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
# the sandbox


class _CountingCodeGenerator(jinja2.compiler.CodeGenerator):
    """Compiles templates so that every block that runs, and every ``~``, is accounted for."""

    def blockvisit(self, nodes: Any, frame: jinja2.compiler.Frame) -> None:
        self.writeline(f"environment.spend({_WORK_PER_STEP})")
        super().blockvisit(nodes, frame)

    def visit_Concat(  # noqa: N802  jinja2's name
        self, node: jinja2.nodes.Concat, frame: jinja2.compiler.Frame
    ) -> None:
        self.write("environment.concat_texts((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}...{% endgeneration %}`` marks answers for training; renders its body."""

    tags = {"generation"}  # noqa: RUF012  jinja2's interface

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class TemplateLimitError(Exception):
    """A template made more text, or did more work, than one rendering may."""


class BoundedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """jinja2's sandbox, with a bound on the text and the work of one rendering.

    jinja2 keeps templates from reaching Python; it does not keep them from running for ever
    or filling the memory, and a template comes with the checkpoint. So every block that runs
    and every text that is made (``~ + * %``, calls, filters, output) is paid for with
    ``spend``, repetition before it happens. One thread renders at a time.
    """

    code_generator_class = _CountingCodeGenerator
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        self._work_left = 0
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
            finalize=self._account_output,
        )
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.filters["tojson"] = _tojson
        for name in ("batch", "center", "format", "indent", "join", "replace", "slice", "tojson"):
            self.filters[name] = self._bounded_filter(name, self.filters[name])
        self.reset()

    def reset(self) -> None:
        """Start the account of a new rendering."""
        self._work_left = MAX_WORK

    def spend(self, work: int) -> None:
        """Take ``work`` characters off the account; ``TemplateLimitError`` when it is empty."""
        self._work_left -= work
        if self._work_left < 0:
            raise TemplateLimitError("the template does not come to an end")

    def account(self, value: Any) -> Any:
        """Pay for ``value``, text or a container that was just made, and return it."""
        size = self.text_size(value)
        if size > MAX_TEXT_CHARS:
            raise TemplateLimitError(f"the template makes more than {MAX_TEXT_CHARS} characters")
        self.spend(size)
        return value

    def text_size(self, value: Any) -> int:
        """About the length of ``str(value)``; spends work for each container inside."""
        if isinstance(value, str):
            return len(value)
        if isinstance(value, Mapping):
            self.spend(_WORK_PER_STEP + len(value))
            return sum(self.text_size(k) + self.text_size(v) for k, v in value.items())
        if isinstance(value, list | tuple):
            self.spend(_WORK_PER_STEP + len(value))
            return len(value) + sum(self.text_size(item) for item in value)
        return 8

    def concat_texts(self, parts: Sequence[Any]) -> str:
        """``a ~ b ~ c``."""
        self.account(parts)
        return jinja2.runtime.str_join(parts)

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        if operator == "**":
            _refuse_wide((left, right), 1024)
        elif operator == "*":
            self._account_repeat(left, right)
        elif operator == "%" and isinstance(left, str):
            self._account_call("format", left, right if isinstance(right, tuple) else (right,))
        elif isinstance(left, str | list | tuple):
            self.account((left, right) if isinstance(left, str) else (*left, right))
        return super().call_binop(context, operator, left, right)

    def call(  # jinja2's odd names: keyword arguments of the template must not meet ours
        __self,  # noqa: N805
        __context: jinja2.runtime.Context,
        __obj: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        __self.spend(_WORK_PER_STEP)
        subject = getattr(__obj, "__self__", None)
        if isinstance(subject, str):
            __self._account_call(__obj.__name__, subject, (*args, *kwargs.values()))
        result = super().call(__context, __obj, *args, **kwargs)
        return __self.account(result) if isinstance(result, str) else result

    def _account_output(self, value: Any) -> Any:
        return self.account(value)

    def _account_repeat(self, left: Any, right: Any) -> None:
        for text, count in ((left, right), (right, left)):
            if isinstance(text, str | list | tuple) and isinstance(count, int):
                self.spend(_WORK_PER_STEP)
                if self.text_size(text) * count > MAX_TEXT_CHARS:
                    raise TemplateLimitError(f"the template repeats something {count} times")
                self.spend(self.text_size(text) * max(count, 0))
            elif isinstance(text, int) and text.bit_length() > 1024:
                raise TemplateLimitError("the template multiplies without end")

    def _account_call(self, name: str, subject: Any, args: Sequence[Any]) -> None:
        """Pay for the text that method or filter ``name`` of ``subject`` may make at most."""
        _refuse_wide(args, _MAX_WIDTH)
        size, given = self.text_size(subject), [self.text_size(arg) for arg in args]
        widest = max((arg for arg in args if isinstance(arg, int)), default=0)
        if name == "replace" and len(args) >= 2:
            size += (size // max(given[0], 1) + 1) * given[1]
        elif name == "join":
            size += sum(given) + max(_length(subject), *map(_length, args), 0) * (
                size if isinstance(subject, str) else sum(given)
            )
        elif name in ("format", "format_map"):
            if isinstance(subject, str) and _WIDE_FORMAT.search(subject):
                raise TemplateLimitError("the template formats with a width of six digits")
            size += (subject.count("{") + 1) * sum(given) if isinstance(subject, str) else 0
        elif name in ("indent", "expandtabs"):
            size += (size + 1) * max(widest, 4)
        else:
            size += widest
        if size > MAX_TEXT_CHARS:
            raise TemplateLimitError(f"the template makes {size} characters with {name}")
        self.spend(size)

    def _bounded_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        num_injected = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)  # with the mark that makes jinja2 inject its argument
        def bounded(*args: Any, **kwargs: Any) -> Any:
            injected, (subject, *rest) = args[:num_injected], args[num_injected:]
            if isinstance(subject, types.GeneratorType):
                subject = list(subject)
            self._account_call(name, subject, (*rest, *kwargs.values()))
            result = function(*injected, subject, *rest, **kwargs)
            return self.account(result) if isinstance(result, str) else result

        return bounded


_WIDE_FORMAT = re.compile(r"\d{6}")


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list | tuple | Mapping) else 0


def _refuse_wide(numbers: Sequence[Any], limit: int) -> None:
    for number in numbers:
        if isinstance(number, int) and abs(number) > limit:
            raise TemplateLimitError(f"the template asks for a width or power of {number}")


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers' templates expect it: no HTML escapes, no ASCII escapes."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


# --------------------------------------------------------------------------------------
# templates


class ChatTemplate:
    """One template of a checkpoint, compiled.

    Raises:
        CheckpointError: the template is not valid Jinja; names its file and line.
    """

    def __init__(self, source: str, *, origin: str) -> None:
        self._environment = BoundedEnvironment()
        try:
            self._template = self._environment.from_string(source)
            names = jinja2.meta.find_undeclared_variables(self._environment.parse(source))
        except (jinja2.TemplateSyntaxError, TemplateLimitError, RecursionError) as error:
            line = getattr(error, "lineno", None)
            place = f", line {line}" if line else ""
            raise CheckpointError(f"{origin}: chat template{place}: {error}") from None
        self._source = source
        self.variables = frozenset(names)
        """The names that it reads from outside."""
        # Templates that know both forms of arguments say so; the others write what they get
        # as JSON, and JSON text would become a JSON string of it.
        self._takes_json_arguments = "is string" in source and "arguments" in source

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        template_kwargs: Mapping[str, Any],
        special_tokens: Mapping[str, str],
    ) -> str:
        """The prompt text of ``messages`` (see ``check_messages``), ready for the answer.

        Raises:
            InvalidRequestError: messages or names that the template does not take, an error
                that it raised, or more text or work than ``MAX_TEXT_CHARS``, ``MAX_WORK``.
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
        text = self._render_bounded({**names, "messages": checked})
        self._check_roles_shown(checked, text)
        return text

    def _render_bounded(self, names: dict[str, Any]) -> str:
        self._environment.reset()
        pieces: list[str] = []
        num_chars = 0
        try:
            for piece in self._template.generate(names):
                num_chars += len(piece)
                if num_chars > MAX_TEXT_CHARS:
                    raise TemplateLimitError(
                        f"the template makes more than {MAX_TEXT_CHARS} characters"
                    )
                pieces.append(piece)
        except Exception as error:  # noqa: BLE001  a template can raise anything
            raise InvalidRequestError(f"messages: chat template: {_reason(error)}") from None
        return "".join(pieces)

    def _check_kwargs(self, template_kwargs: Mapping[str, Any]) -> None:
        for name, value in template_kwargs.items():
            if name in REFUSED_KWARGS:
                raise InvalidRequestError(f"chat_template_kwargs.{name}: {REFUSED_KWARGS[name]}")
            # What asks for nothing need not be understood: no tools, no thinking.
            if name not in self.variables and value:
                known = sorted(self.variables - {"messages", "add_generation_prompt"})
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


def _reason(error: Exception) -> str:
    if isinstance(error, jinja2.TemplateError | TemplateLimitError):
        return str(error)
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return f"{type(error).__name__}: {error}"
