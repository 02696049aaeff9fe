"""The tables of docs/config.md, from ember_pp/config.py: every setting, its type, default, meaning.

    python scripts/config_docs.py            prints the page
    python scripts/config_docs.py --write    writes docs/config.md, below its mark

``tests/test_config.py`` fails when the page and the code differ.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
from pathlib import Path
from typing import Any

from ember_pp import config
from ember_pp.sampling_params import SamplingParams

PAGE = Path(__file__).resolve().parent.parent / "docs" / "config.md"

MARK = "<!-- From here on made by scripts/config_docs.py --write; do not edit. -->"


def main() -> None:
    text = render()
    if "--write" in sys.argv[1:]:
        PAGE.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


def render() -> str:
    """The whole page: its prose as it is, then the tables."""
    parts = [PAGE.read_text(encoding="utf-8").partition(MARK)[0] + MARK + "\n"]
    for name, job in config.JOBS.items():
        parts.append(_section(f"`job={name}`", job, "job", skip={"name"}))
    for field in dataclasses.fields(config.Config):
        if field.name != "job" and dataclasses.is_dataclass(_type_of(field.name)):
            parts.append(_section(f"`{field.name}`", _type_of(field.name), field.name))
    parts.append(_section("The rest", config.Config, ""))
    return "\n".join(parts)


def _type_of(name: str) -> Any:
    return type(getattr(config.Config(), name))


def _section(
    title: str, settings: Any, group: str, skip: frozenset[str] | set[str] = frozenset()
) -> str:
    rows = [
        f"| `{group + '.' if group else ''}{field.name}` | {_kind(field)} | {_default(field)} "
        f"| {_meaning(settings, field.name)} |"
        for field in dataclasses.fields(settings)
        if field.name not in skip and not (settings is config.Config and _is_group(field.name))
    ]
    table = (
        ["| key | type | default | meaning |", "|---|---|---|---|", *rows]
        if rows
        else ["No settings."]
    )
    return "\n".join([f"## {title}", "", _one_line(settings.__doc__), "", *table, ""])


def _is_group(name: str) -> bool:
    return dataclasses.is_dataclass(_type_of(name))


def _kind(field: dataclasses.Field[Any]) -> str:
    kind = str(field.type)
    if kind.startswith("Literal["):
        return ", ".join(f"`{option}`" for option in ast.literal_eval(kind[len("Literal") :]))
    names = {"int": "whole number", "float": "number", "str": "text", "bool": "true or false"}
    names |= {"Any": "see meaning", "dict[str, Any]": "map", "list[str]": "list of text"}
    names |= {"list[int]": "list of whole numbers"}
    is_optional = kind.endswith(" | None")
    kind = kind.removesuffix(" | None")
    return names[kind] + (" or null" if is_optional else "")


def _default(field: dataclasses.Field[Any]) -> str:
    value = (
        field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    )
    words = {None: "null", True: "true", False: "false"}
    text = f"`{words[value] if value is None or isinstance(value, bool) else value}`"
    if config.ON_GPUS in field.metadata:
        text += f", on GPUs `{field.metadata[config.ON_GPUS]}`"
    return text


def _meaning(settings: Any, name: str) -> str:
    """The string that stands under the field in the class body."""
    body = ast.parse(inspect.getsource(settings)).body[0].body  # type: ignore[attr-defined]
    for field, after in zip(body, [*body[1:], None], strict=True):
        is_field = isinstance(field, ast.AnnAssign) and ast.unparse(field.target) == name
        if is_field and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            return _one_line(after.value.value)
    return _meaning(SamplingParams, name) if settings is config.SamplingDefaults else ""


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("``", "`").replace("|", "\\|")


if __name__ == "__main__":
    main()
