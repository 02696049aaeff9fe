"""The template sandbox: transformers' names, no way out, and an end to every rendering."""

import time

import pytest

from ember_pp import template_sandbox
from ember_pp.template_sandbox import SandboxedTemplate, TemplateError


def render(source, **names):
    return SandboxedTemplate(source).render(names)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% if true %}\n  a\n  {% endif %}\nb", "  a\nb"),
        ("{{ {'é': '<&>', 'n': none} | tojson }}", '{"é": "<&>", "n": null}'),
        ("{{ [1, 2] | tojson(indent=2) }}", "[\n  1,\n  2\n]"),
        (
            "{{ {'b': 1, 'a': 'é'} | tojson(ensure_ascii=true, sort_keys=true) }}",
            '{"a": "\\u00e9", "b": 1}',
        ),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        (
            "{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}",
            "02",
        ),
        ("a{% generation %}b{% set c = 1 %}{% endgeneration %}{{ c is defined }}", "abFalse"),
        ("{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}", "2"),
        ("{{ dict(a=1).a }}{{ '<b>' }}", "1<b>"),
        ("{% macro m(x) %}[{{ x }}]{% endmacro %}{{ m('a') ~ m(2) }}", "[a][2]"),
        (
            "{{ '%s-%03d' % ('a', 7) }}{{ '{}{}'.format('b', 1) }}{{ '%s!' | format('c') }}",
            "a-007b1c!",
        ),
        (
            "{{ 'a,b'.split(',') | join('+') }}{{ 'x' * 3 }}{{ 'aXb' | replace('X', '-') }}",
            "a+bxxxa-b",
        ),
        ("{{ 'a\nb' | indent(2) }}{{ [1, 2] + [3] }}{{ 2 ** 5 }}{{ 7 % 4 }}", "a\n  b[1, 2, 3]323"),
        (
            "{{ ['a', 'b'] | map('upper') | join }}{{ [1, 2, 3] | batch(2) | list }}",
            "AB[[1, 2], [3]]",
        ),
        ("{{ x | selectattr('k') | list | length }}{{ undefined_name }}", "1"),
    ],
)
def test_renders_like_any_jinja(source, expected):
    assert render(source, x=[{"k": 1}, {"k": 0}]) == expected


def test_strftime_now_is_the_date_of_today():
    before, after = time.strftime("%Y-%m-%d"), time.strftime("%Y-%m-%d")
    assert before <= render("{{ strftime_now('%Y-%m-%d') }}") <= max(after, before)


def test_variables_are_the_names_read_from_outside():
    template = SandboxedTemplate("{% set a = 1 %}{{ a ~ b }}{% for c in d %}{{ c }}{% endfor %}")
    assert template.variables == {"b", "d"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "^roles must alternate$"),
        ("{{ a.b.c }}", "undefined"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ {}.x.y }}", "has no attribute"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "nested too deeply|come to an end"),
        ("{% include 'other' %}", "no loader"),
    ],
)
def test_an_error_of_the_template_is_told(source, message):
    with pytest.raises(TemplateError, match=message):
        render(source)


@pytest.mark.parametrize("source", ["{% for %}", "a\n{{ 1 + }}", "{{ x | no_such_filter }}"])
def test_invalid_templates_are_refused_when_made(source):
    with pytest.raises(TemplateError, match=r"line \d"):
        SandboxedTemplate(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ x.append(1) }}",
        "{{ x.__init__.__globals__ }}",
        "{% set n = namespace(__class__=x) %}",
        "{% set n = namespace() %}{% set n.__class__ = x %}",
        "{{ dict.__globals__.x }}",
        "{{ (x | attr('__class__')).x }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% set n = namespace() %}{{ n.__class__.__init__.__globals__ }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ strftime_now.__globals__.x }}",
    ],
)
def test_python_cannot_be_reached(source):
    with pytest.raises(TemplateError, match=r"unsafe|not safely callable"):
        render(source, x=[])


@pytest.mark.parametrize(
    "name", ["secret.txt", "{folder}/secret.txt", "../secret.txt", "/etc/hostname"]
)
@pytest.mark.parametrize(
    "source",
    [
        "{{% include '{name}' %}}",
        "{{% extends '{name}' %}}",
        "{{% import '{name}' as m %}}{{{{ m }}}}",
        "{{% from '{name}' import m %}}{{{{ m }}}}",
        "{{% include ['{name}', 'secret.txt'] %}}",
    ],
)
def test_no_file_can_be_read(source, name, tmp_path, monkeypatch):
    """Not even one beside it: there is nothing that loads."""
    (tmp_path / "secret.txt").write_text("precious")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TemplateError, match="no loader"):
        render(source.format(name=name.format(folder=tmp_path)))


@pytest.mark.parametrize(
    "name", ["open", "__import__", "eval", "exec", "input", "breakpoint", "os"]
)
def test_nothing_of_python_has_a_name_here(name):
    with pytest.raises(TemplateError, match="undefined"):
        render(f"{{{{ {name}('secret.txt') }}}}")


def test_a_format_string_sees_nothing_of_python():
    assert render("{{ '[{0.__class__}]'.format(x) }}", x=[]) == "[]"


DOUBLING = "{% set ns = namespace(x='ab') %}{% for i in range(99) %}%s{% endfor %}"
ENDLESS = {
    "nested-loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
    "{% endfor %}",
    "range": "{{ range(1000000000) | list }}",
    "double-concat": DOUBLING.replace("%s", "{% set ns.x = ns.x ~ ns.x %}"),
    "double-plus": DOUBLING.replace("%s", "{% set ns.x = ns.x + ns.x %}"),
    "double-list": DOUBLING.replace("'ab'", "[1]").replace("%s", "{% set ns.x = ns.x + ns.x %}"),
    "double-times": DOUBLING.replace("%s", "{% set ns.x = ns.x * 2 %}"),
    "double-replace": DOUBLING.replace("%s", "{% set ns.x = ns.x.replace('a', ns.x) %}"),
    "double-filter": DOUBLING.replace("%s", "{% set ns.x = ns.x | replace('a', ns.x) %}"),
    "double-join": DOUBLING.replace("%s", "{% set ns.x = ns.x.join([ns.x, ns.x]) %}"),
    "double-join-filter": DOUBLING.replace("%s", "{% set ns.x = [ns.x, ns.x] | join(ns.x) %}"),
    "double-format": DOUBLING.replace("%s", "{% set ns.x = '{0}{0}'.format(ns.x) %}"),
    "double-percent": DOUBLING.replace("%s", "{% set ns.x = '%s%s' % (ns.x, ns.x) %}"),
    "double-block": DOUBLING.replace(
        "%s", "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"
    ),
    "nest-and-print": DOUBLING.replace("%s", "{% set ns.x = [ns.x, ns.x] %}") + "{{ ns.x }}",
    "nest-and-json": DOUBLING.replace("%s", "{% set ns.x = [ns.x, ns.x] %}")
    + "{{ ns.x | tojson }}",
    "nest-and-string": DOUBLING.replace("%s", "{% set ns.x = [ns.x, ns.x] %}")
    + "{% set s = ns.x | string %}",
    "times": "{% set x = 'a' * 10000000000 %}",
    "times-list": "{% set x = [1] * 10000000000 %}",
    "times-long-list": "{% set x = [1] * 20000000 %}",
    "add-lists": "{% set x = [1] * 1000000 %}{% for a in range(99999) %}{% set y = x + x %}"
    "{% endfor %}",
    "times-left": "{% set x = 10000000000 * 'a' %}",
    "power": "{{ 9 ** 9 ** 9 }}",
    "ljust": "{{ 'a'.ljust(10000000000) }}",
    "zfill": "{{ 'a'.zfill(10000000000) }}",
    "center": "{{ 'a' | center(10000000000) }}",
    "indent": "{{ ('\n' * 100000) | indent(100000) }}",
    "json-indent": "{{ [1] | tojson(indent=10000000000) }}",
    "slice": "{{ [1] | slice(10000000000) | list }}",
    "batch": "{{ [1] | batch(10000000000, 0) | list }}",
    "percent-width": "{{ '%10000000000d' % 1 }}",
    "percent-star": "{{ '%*d' % (10000000000, 1) }}",
    "format-width": "{{ '{:10000000000}'.format(1) }}",
    "format-argument": "{{ '{:{}}'.format(1, 10000000000) }}",
    "expandtabs": "{{ ('\t' * 100000).expandtabs(100000) }}",
    "wordwrap": "{{ ('a' * 100000) | wordwrap(1, wrapstring='b' * 100000) }}",
    "output": "{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
}


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_no_rendering_goes_on_for_ever_or_fills_the_memory(source):
    template = SandboxedTemplate(source)
    started = time.process_time()
    with pytest.raises(TemplateError) as failure:
        template.render({})
    assert "MemoryError" not in str(failure.value)  # refused, not run into the wall
    assert time.process_time() - started < 8


def test_each_rendering_has_an_account_of_its_own():
    template = SandboxedTemplate(
        "{% for a in range(n) %}{% for b in range(n) %}{% endfor %}{% endfor %}"
    )
    for _ in range(5):
        assert template.render({"n": 1000}) == ""


def test_a_long_chat_costs_a_small_part_of_the_account():
    source = (
        "{% for m in messages[::-1] %}{% if m.content.startswith('<') %}x{% endif %}{% endfor %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}"
        "{% endfor %}"
    )
    template = SandboxedTemplate(source)
    messages = [{"role": "user", "content": "x" * 1000}] * 1000
    template.render({"messages": messages})
    assert template._environment._work_left > 0.97 * template_sandbox.MAX_WORK
