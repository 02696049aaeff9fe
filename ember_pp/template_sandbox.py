"""Jinja templates that cannot reach Python, run for ever or fill the memory.

The names that a template finds are those that transformers gives to chat templates, so that
the same template makes the same text. The only file that imports jinja2.
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
import jinja2.exceptions
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

MAX_TEXT_CHARS = 64 * 1024 * 1024
"""Longest text that a template may make."""
MAX_WORK = 2**30
"""Work of one rendering, in characters handled; a prompt of a megabyte takes about 1% of it."""
_WORK_PER_STEP = 512
"""What one pass through a block of the template counts as, in characters."""
_WORK_PER_ITEM = 64
"""What looking at one item of a list or map counts as, in characters."""
_BYTES_PER_ITEM = 8
"""What one item of a new list counts as, in characters."""
_MAX_WIDTH = 100_000
"""Largest number that a template may hand to a function that pads or repeats."""


class TemplateError(Exception):
    """A template is not valid, raised an error, or hit a limit; the text says which."""


class SandboxedTemplate:
    """A compiled template.

    Raises:
        TemplateError: ``source`` is not valid Jinja; names the line.
    """

    def __init__(self, source: str) -> None:
        self._environment = BoundedEnvironment()
        try:
            self._template = self._environment.from_string(source)
            names = jinja2.meta.find_undeclared_variables(self._environment.parse(source))
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"line {error.lineno}: {error.message}") from None
        except (jinja2.TemplateError, TemplateLimitError, RecursionError) as error:
            raise TemplateError(_reason(error)) from None
        self.variables = frozenset(names)
        """The names that it reads from outside."""

    def render(self, names: Mapping[str, Any]) -> str:
        """The text of the template with ``names``; one thread at a time.

        Raises:
            TemplateError: the template raised, or did more than ``MAX_TEXT_CHARS`` and
                ``MAX_WORK`` allow.
        """
        self._environment.reset()
        pieces: list[str] = []
        num_chars = 0
        try:
            for piece in self._template.generate(names):
                num_chars += len(piece)
                if num_chars > MAX_TEXT_CHARS:
                    raise TemplateLimitError(_TOO_LONG)
                pieces.append(piece)
        except Exception as error:  # noqa: BLE001  a template can raise anything
            raise TemplateError(_reason(error)) from None
        return "".join(pieces)


_TOO_LONG = f"makes more than {MAX_TEXT_CHARS} characters"


def _reason(error: Exception) -> str:
    if isinstance(error, jinja2.TemplateError | TemplateLimitError):
        return str(error)
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return f"{type(error).__name__}: {error}"


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


class _Namespace(jinja2.utils.Namespace):
    """``namespace(...)`` without names such as ``__class__``, which would mislead the sandbox."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        names = dict(*args, **kwargs)
        for name in names:
            _refuse_underscore(name)
        super().__init__(names)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"{name} is unsafe as a name in a namespace")


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """``dict(...)`` in templates, without the type and its attributes."""
    return dict(*args, **kwargs)


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
        self.globals["dict"] = _dict
        self.globals["namespace"] = _Namespace
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.filters["tojson"] = _tojson
        for name in _TEXT_FILTERS:
            self.filters[name] = self._bounded_filter(name, self.filters[name])
        self.reset()

    def reset(self) -> None:
        """Start the account of a new rendering."""
        self._work_left = MAX_WORK

    def spend(self, work: int) -> None:
        """Take ``work`` characters off the account; ``TemplateLimitError`` when it is empty."""
        self._work_left -= work
        if self._work_left < 0:
            raise TemplateLimitError("does not come to an end")

    def account(self, value: Any) -> Any:
        """Pay for ``value``, text or a container that was just made, and return it."""
        size = self.text_size(value)
        if size > MAX_TEXT_CHARS:
            raise TemplateLimitError(_TOO_LONG)
        self.spend(size)
        return value

    def text_size(self, value: Any) -> int:
        """About the length of ``str(value)``; spends work for each container inside."""
        if isinstance(value, str):
            return len(value)
        if isinstance(value, Mapping):
            self.spend(_WORK_PER_STEP + _WORK_PER_ITEM * len(value))
            return sum(self.text_size(k) + self.text_size(v) for k, v in value.items())
        if isinstance(value, list | tuple):
            self.spend(_WORK_PER_STEP + _WORK_PER_ITEM * len(value))
            return len(value) + sum(map(self.text_size, value))
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
        elif isinstance(left, str):
            self.account((left, right))
        elif isinstance(left, list | tuple) and isinstance(right, list | tuple):
            self._account_list(len(left) + len(right))
        return super().call_binop(context, operator, left, right)

    def call(  # jinja2's odd names: keyword arguments of the template must not meet ours
        __self,  # noqa: N805
        __context: jinja2.runtime.Context,
        __obj: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        __self.spend(_WORK_PER_STEP)
        method = getattr(__obj, "__wrapped__", __obj)  # jinja2 wraps str.format
        subject = getattr(method, "__self__", None)
        if isinstance(subject, str):
            __self._account_call(method.__name__, subject, (*args, *kwargs.values()))
        result = super().call(__context, __obj, *args, **kwargs)
        return __self.account(result) if isinstance(result, str) else result

    def _account_output(self, value: Any) -> Any:
        return self.account(value)

    def _account_list(self, length: int) -> None:
        if length * _BYTES_PER_ITEM > MAX_TEXT_CHARS:
            raise TemplateLimitError(f"makes a list of {length} items")
        self.spend(length * _BYTES_PER_ITEM)

    def _account_repeat(self, left: Any, right: Any) -> None:
        for value, count in ((left, right), (right, left)):
            if isinstance(value, int) and value.bit_length() > 1024:
                raise TemplateLimitError("multiplies without end")
            if not isinstance(count, int):
                continue
            if isinstance(value, list | tuple):
                self._account_list(len(value) * max(count, 0))
            elif isinstance(value, str):
                if len(value) * count > MAX_TEXT_CHARS:
                    raise TemplateLimitError(_TOO_LONG)
                self.spend(len(value) * max(count, 0))

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
                raise TemplateLimitError("formats with a width of six digits")
            size += (subject.count("{") + 1) * sum(given) if isinstance(subject, str) else 0
        elif name in ("indent", "expandtabs"):
            size += (size + 1) * max(widest, 4)
        elif name == "wordwrap":
            size += (size + 1) * sum(given)
        else:
            size += widest
        if size > MAX_TEXT_CHARS:
            raise TemplateLimitError(f"makes {size} characters with {name}")
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


_TEXT_FILTERS = (
    *("batch", "capitalize", "center", "e", "escape", "forceescape", "format", "indent", "join"),
    *("lower", "pprint", "replace", "safe", "slice", "string", "striptags", "title", "tojson"),
    *("trim", "truncate", "upper", "urlencode", "urlize", "wordcount", "wordwrap", "xmlattr"),
)
"""Filters that make text of what they get, or repeat it."""
_WIDE_FORMAT = re.compile(r"\d{6}")


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list | tuple | Mapping) else 0


def _refuse_wide(numbers: Sequence[Any], limit: int) -> None:
    for number in numbers:
        if isinstance(number, int) and abs(number) > limit:
            raise TemplateLimitError(f"asks for a width or power of {number}")


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
