"""Templates that try to escape, to run for ever or to fill the memory; and what templates may use."""

from __future__ import annotations

import random
import resource
import time

import pytest

from llama.text.sandbox import MAX_TEMPLATE_CHARS, Template, TemplateError

DOUBLING = "{% set ns = namespace(l=[1]) %}{% for i in range(40) %}"
GROWING = "{% set ns = namespace(x='a', n=3, l=[1]) %}{% for i in range(1000) %}"
REFUSED = {
    "loops": "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive loop": "{% for x in range(1000) recursive %}{{ loop(range(90000)) }}{% endfor %}",
    "product": "{{ 'a' * 1000000000 }}",
    "list": "{{ 1000000000 * [1] }}",
    "power": "{{ 10 ** 1000000000 }}",
    "squares": GROWING + "{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "sums": GROWING + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "lists": GROWING + "{% set ns.l = ns.l + ns.l %}{% endfor %}",
    "concatenation": GROWING + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "blocks": GROWING + "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    "joined": GROWING + "{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
    "replaced": GROWING + "{% set ns.x = ns.x.replace('a', 'aaaa') %}{% endfor %}",
    "center": "{{ 'a' | center(1000000000) }}",
    "ljust": "{{ 'a'.ljust(1000000000) }}",
    "tabs": "{{ ('\\t' * 100000).expandtabs(100000) }}",
    "translate": "{{ ('a' * 99999).translate({97: 'b' * 99999}) }}",
    "json": "{{ range(90000) | list | tojson(indent=99999) }}",
    "nested json": GROWING + "{% set ns.l = [1, ns.l] %}{% endfor %}{{ ns.l | tojson(indent=99999) }}",
    "nested list": DOUBLING + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
    "nested dict": DOUBLING + "{% set ns.l = {'a': ns.l, 'b': ns.l} %}{% endfor %}{{ ns.l }}",
    "nested namespace": DOUBLING + "{% set ns.l = namespace(a=ns.l, b=ns.l) %}{% endfor %}{{ ns.l }}{{ 1 // 0 }}",
    "slices": "{% set t = 'a' * 4000000 %}{% for x in range(90000) %}{% set y = t[1:] %}{% endfor %}",
    "searches": "{% set t = 'a' * 4000000 %}{% for x in range(90000) %}{{ 'b' in t }}{% endfor %}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "many widths": "{{ ('%(a)9999d' * 90000) % {'a': 1} }}",
    "bytes": "{{ '%1000000000d'.encode() % 1 }}",
    "star": "{{ '%*d' % (1000000000, 1) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format_map": "{{ '{:{w}}'.format_map({'w': 1000000000}) }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "lipsum": "{{ lipsum(n=100000) }}",
    "class": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ raise_exception.__globals__['json'] }}",
    "change": "{{ messages.append(1) }}",
    "import": "{% include 'a' %}",
    "division": "{{ 1 // 0 }}",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_escape_or_never_end_is_refused_soon(name: str) -> None:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(TemplateError, match=r"^the chat template must take the messages, got its error: "):
        Template(REFUSED[name]).render(messages=[])
    assert time.process_time() - start < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


@pytest.mark.parametrize("source", ["{% for", "{{ a b }}", "{% endfor %}", "{{ " + "(" * 5000 + ")" * 5000 + " }}"])
def test_what_is_no_template_is_refused(source: str) -> None:
    with pytest.raises(TemplateError):
        Template(source)


def test_a_template_has_a_size() -> None:
    with pytest.raises(TemplateError, match=f"must have at most {MAX_TEMPLATE_CHARS} characters, got "):
        Template("a" * (MAX_TEMPLATE_CHARS + 1))


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("  {% if true %}\n  a\n  {% endif %}\nb", "  a\nb"),  # lstrip_blocks and trim_blocks
        ("{% for x in [1, 2, 3] %}{% if x == 2 %}{% continue %}{% endif %}{{ x }}{% endfor %}", "13"),
        ("{% for x in 'abc' %}{{ loop.index0 }}{{ loop.last }}{{ loop.length }}{% break %}{% endfor %}", "0False3"),
        ("{% for x in 'ab' %}{{ loop.previtem }}{{ loop.nextitem }}{% endfor %}", "ba"),
        ("{% for x in [] %}{% else %}none{% endfor %}", "none"),
        ("{{ {'b': 'é<', 'a': 1} | tojson }}", '{"b": "é<", "a": 1}'),
        ("{{ [1] | tojson(indent=1) }}", "[\n 1\n]"),
        ("{% generation %}said{% endgeneration %}!", "said!"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ [1, [2]] }}{{ {'a': (3,)}['a'][0] }}{{ 'b' in 'abc' }}{{ [1, 2, 3][1:] }}", "[1, [2]]3True[2, 3]"),
        ("{% for a, b in {'x': 1}.items() %}{{ a }}{{ b }}{% endfor %}{{ 1700000000 % 7 }}", "x16"),
        ("{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}", "123"),
        ("{{ [{'a': 1}, {'a': 2}] | selectattr('a', 'equalto', 2) | map(attribute='a') | join }}", "2"),
        ("{{ 1 ~ 'a' ~ none ~ nothing }}", "1aNone"),
        ("{{ '%s-%02d' % ('a', 7) }}{{ '{}'.format(3) }}", "a-073"),
        ("{{ nothing }}{% for x in nothing %}{% endfor %}{{ nothing is defined }}", "False"),
        ("{% set ns = namespace(n=1) %}{% for i in range(3) %}{% set ns.n = ns.n * 2 %}{% endfor %}{{ ns.n }}", "8"),
    ],
)
def test_what_templates_use_is_there(source: str, text: str) -> None:
    assert Template(source).render(messages=[], none=None) == text


def test_a_long_dialog_is_within_the_budget() -> None:
    messages = [{"role": "user", "content": "word " * 2000} for _ in range(100)]  # a megabyte
    source = "{% for m in messages %}{{ '<' + m.role + '>' + m.content | trim | replace('x', 'yz') }}{% endfor %}"
    assert len(Template(source).render(messages=messages)) > 999_000
    last = "{% for m in messages %}{% if loop.index == messages | length %}{{ m.content }}{% endif %}{% endfor %}"
    assert Template(last).render(messages=messages * 4) == messages[0]["content"]
    many = [{"role": "user", "content": "a"}] * 5000
    assert Template(source).render(messages=many).count("<user>") == 5000


def test_one_budget_is_one_renderings() -> None:
    template = Template("{% for i in range(20000) %}{{ i }}{% endfor %}")
    for _ in range(20):
        assert len(template.render()) == 88890


FEATURES = """
{%- macro turn(m, last=false) %}{{ m.role | upper }}: {{ m.content | capitalize }}{{ '' if last else '\\n' }}{% endmacro %}
{%- set ns = namespace(last_query=messages | length - 1) %}
{%- for m in messages[::-1] %}
    {%- if m.role == "user" and m.content is string and not m.content.startswith('<') %}
        {%- set ns.last_query = messages | length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}{{ turn(m, loop.last) }}{% if loop.index > 5 %}{% break %}{% endif %}{% endfor %}
{%- for role, ms in messages | groupby('role') %}{{ role }}={{ ms | length }};{% endfor %}
{%- for k, v in messages[0].items() %}{{ k ~ '=' ~ v }}{% endfor %}{{ ns.last_query }}{{ messages[0] }}
{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join(', ') }}{{ messages | tojson(indent=2) }}
{{ '%s|%5d|%-4s' % (messages[0].role, 7, 'x') }}{{ 3 * 'ab' }}{{ [1, 2] + [3] }}{{ 2 ** 5 }}{{ 7 // 2 }}{{ (1, 2)[0] }}
{{ 'user' in messages | map(attribute='role') }}{{ dict(a=1, b=[2]) }}{{ '{:>8}|{}'.format('a', 5) }}{{ range(5) | batch(2) | list }}
{{ messages[-1]['content'].split('</think>')[-1].lstrip('\\n') }}{{ messages[-1].content[:3] }}{{ 5 is odd }}{{ messages | map('length') | sum }}
"""  # noqa: E501


def test_a_rendering_is_transformers() -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    ours, theirs, rng = Template(FEATURES), utils._compile_jinja_template(FEATURES), random.Random(0)
    for _ in range(100):
        roles = ["system"] * rng.randint(0, 1) + ["user", "assistant"] * rng.randint(0, 4) + ["user"]
        parts = ["a", "B ", " \n", "é", "</think>", "<", "{{", "%s", "日", "12345"]
        messages = [{"role": role, "content": "".join(rng.choices(parts, k=rng.randint(0, 9)))} for role in roles]
        assert ours.render(messages=messages) == theirs.render(messages=messages)
