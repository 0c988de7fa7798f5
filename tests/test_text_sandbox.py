"""Hostile chat templates: each ends soon, in one clear error, and leaves nothing behind."""

from __future__ import annotations

import resource
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from pagoda.errors import BadRequest
from pagoda.text.chat import ChatTemplate
from pagoda.text.deadline import Deadline, DeadlineExceeded

MESSAGES = [{"role": "user", "content": "Hi"}]
NS = "{% set ns = namespace(x='a', l=[], n=3) %}"
LOOP = "{% for i in range(100000) %}"

HOSTILE = {
    "endless loops": "{% set r = range(100000) %}{% for i in r %}{% for j in r %}{% for k in r %}{% endfor %}"
    "{% endfor %}{% endfor %}",
    "endless output": "{% set r = range(100000) %}{% for i in r %}{% for j in r %}some text{% endfor %}{% endfor %}",
    "many ranges": LOOP + "{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "a huge range": "{{ range(10**9)|list }}",
    "multiplied text": "{{ 'a' * 10**9 }}",
    "multiplied list": "{{ 10**9 * [0] }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "squares": NS + LOOP + "{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "doubled text": NS + LOOP + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "joined text": NS + LOOP + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubled block": NS + LOOP + "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    "doubled list": NS + LOOP + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
    "doubled dict": NS + LOOP + "{% set ns.l = {'a': ns.l, 'b': ns.l} %}{% endfor %}{{ ns.l }}",
    "doubled arguments": "{% macro m() %}{{ m(varargs, varargs) }}{% endmacro %}{{ m(1) }}",
    "doubled dict call": NS + LOOP + "{% set ns.l = dict(a=ns.l, b=ns.l) %}{% endfor %}",
    "many copies": NS + "{% set big = 'a' * 900000 %}" + LOOP + "{% set ns.l = ns.l + [big[i:]] %}{% endfor %}",
    "many results": NS + "{% set big = 'a' * 900000 %}" + LOOP + "{% set ns.x = big.upper() %}{% endfor %}",
    "many filtered": "{% set big = 'a' * 900000 %}{{ ([big] * 1)|map('upper')|list }}"
    + LOOP
    + "{{ big|upper }}{% endfor %}",
    "endless macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "wide %": "{{ '%999999999d' % 1 }}",
    "wide % from an argument": "{{ '%*d' % (999999999, 1) }}",
    "wide format filter": "{{ '%999999999d'|format(1) }}",
    "wide format": "{{ '{:>999999999}'.format(1) }}",
    "wide format from an argument": "{{ '{:{}}'.format(1, 999999999) }}",
    "repeated format": "{{ ('{0}' * 100000).format('a' * 900000) }}",
    "repeated %": "{{ ('%(x)s' * 100000) % {'x': 'a' * 900000} }}",
    "center": "{{ 'a'|center(10**9) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "expandtabs": "{{ '\\t'.expandtabs(10**9) }}",
    "replace": "{{ ('a' * 900000).replace('a', 'b' * 900000) }}",
    "replace filter": "{{ ('a' * 900000)|replace('a', 'b' * 900000) }}",
    "join": "{{ ('a' * 900000).join(['b'] * 10000) }}",
    "join filter": "{{ (['b'] * 10000)|join('a' * 900000) }}",
    "indent": "{{ ('\\n' * 900000)|indent(10**9) }}",
    "json indent": "{{ messages|tojson(indent=10**9) }}",
    "batch": "{{ [1]|batch(10**9, 0)|list }}",
    "slice": "{{ [1]|slice(10**9)|list }}",
    "date": "{{ strftime_now('%999999999Y') }}",
    "class": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "function": "{{ raise_exception.__globals__.os }}",
    "attr filter": "{{ (''|attr('__class__')).mro() }}",
    "map attribute": "{{ (messages|map(attribute='__class__')|first).mro() }}",
    "format escape": "{{ '{0.__class__.__mro__}'.format('') }}{{ ''.__class__() }}",
    "frame": "{{ (messages|map('upper')).gi_frame.f_back }}",
    "change": "{{ messages.append(1) }}",
    "update": "{{ messages[0].update(role='x') }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "bytes": "{{ 'a'.encode().hex() }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_in_a_bad_request(name: str) -> None:
    template = ChatTemplate(HOSTILE[name], deadline_s=0.2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    with pytest.raises(BadRequest, match=r"^the model's chat template"):
        template.render(MESSAGES)
    assert time.monotonic() - start < 15
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB
    assert MESSAGES == [{"role": "user", "content": "Hi"}]


def test_the_deadline_says_so() -> None:
    with pytest.raises(BadRequest, match=r"took longer than 0\.05 s"):
        ChatTemplate(HOSTILE["endless loops"], deadline_s=0.05).render(MESSAGES)


def test_large_honest_messages_pass() -> None:
    """The limits grow with the input: a long conversation is no attack."""
    source = (
        "{% set ns = namespace(n=0) %}{% for m in messages[1:] %}{% set text = m.content|trim + '\n' %}"
        "{{ '<' ~ m.role ~ '>' + text.replace('a', 'b') }}{% set ns.n = ns.n + 1 %}"
        "{% set previous = messages[loop.index0:][0] %}{% endfor %}{{ ns.n }}"
    )
    talk = [{"role": "user", "content": "a word or two " * 400} for _ in range(401)]
    text = ChatTemplate(source, deadline_s=10).render(talk)
    assert len(text) > 400 * 5000
    assert text.endswith("400")
    one = [{"role": "user", "content": "x" * 5_000_000}]
    assert len(ChatTemplate("{{ messages[0].content + '!' }}").render(one)) == 5_000_001


def test_nesting_without_end_is_refused() -> None:
    deep: Any = "x"
    for _ in range(100_000):
        deep = [deep]
    for messages, tools in (([MESSAGES[0] | {"extra": deep}], None), (MESSAGES, [deep])):
        with pytest.raises(BadRequest, match="nested too deeply"):
            ChatTemplate("x").render(messages, tools=tools)


HONEST = [
    ("{{ '%s-%02d' % ('a', 5) }}|{{ '%s'|format('x') }}|{{ '{}-{:>3}'.format('a', 'b') }}", "a-05|x|a-  b"),
    ("{{ ['a', 'b']|join(', ') }}|{{ ', '.join(['a', 'b']) }}", "a, b|a, b"),
    ("{{ [{'n': 1}, {'n': 2}]|join('-', 'n') }}", "1-2"),
    ("{{ 'a\nb'|indent(2) }}|{{ 'a\n\nb'|indent(2, true) }}", "a\n  b|  a\n\n  b"),
    ("{{ 'aXbX'|replace('X', '-', 1) }}{{ 'aXbX'.replace('X', '') }}", "a-bXab"),
    ("{% set ns = namespace(n=1) %}{% for i in range(3) %}{% set ns.n = ns.n * 2 %}{% endfor %}{{ ns.n }}", "8"),
    ("{% for a, b in {'x': 1}.items() %}{{ a ~ b }}{% endfor %}", "x1"),
    ("{{ [1, 2, 3][::-1] }}{{ 'abc'[1:] }}{{ messages[0]['content'][:1] }}", "[3, 2, 1]bcH"),
    ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "13"),
    ("{% macro m(a, b='y') %}<{{ a }}{{ b }}>{% endmacro %}{{ m('x') }}{{ '<'|e }}{{ '<b>'|safe }}", "<xy>&lt;<b>"),
    ("{{ messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|list|length }}", "1"),
    ("{{ 'Ab'.lower() }}{{ 'a b'.split() }}{{ 'x'.startswith('x') }}", "ab['a', 'b']True"),
    ("{{ 7 // 2 }}{{ 7 % 2 }}{{ 2 ** 3 }}{{ 7 / 2 }}{{ 'ab' * 2 }}", "3183.5abab"),
    ("{% macro wrap() %}[{{ caller() }}]{% endmacro %}{% call wrap() %}in{% endcall %}", "[in]"),
    ("{% generation %}in {{ messages[0].role }}{% endgeneration %}", "in user"),
    ("{% set x %}a{{ 1 }}{% endset %}{{ x }}{% filter upper %}b{% endfilter %}", "a1B"),
    ("a\n    {% if true %}\n  b\n    {% endif %}\nc", "a\n  b\nc"),
]


@pytest.mark.parametrize(("source", "expected"), HONEST)
def test_what_honest_templates_need_works(source: str, expected: str) -> None:
    assert ChatTemplate(source).render(MESSAGES) == expected


def test_many_renderings_at_once_keep_their_own_limits() -> None:
    slow = ChatTemplate(HOSTILE["endless loops"], deadline_s=0.15)
    fast = ChatTemplate("{{ messages[0].content }}")

    def run(i: int) -> str:
        if i % 4:
            return fast.render([{"role": "user", "content": str(i)}])
        with pytest.raises(BadRequest, match="took longer"):
            slow.render(MESSAGES)
        return str(i)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, range(40))) == [str(i) for i in range(40)]


def test_a_deadline_never_strikes_after_the_end() -> None:
    """Work that ends just when its time does: the result or the error, and nothing after it."""

    def spin(seconds: float) -> str:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass
        return "done"

    ends = {"done": 0, "late": 0}
    before = set(threading.enumerate())
    limit = Deadline(0.003)
    for i in range(150):
        try:
            ends[limit.run(partial(spin, 0.0015 + (i % 30) * 0.0001))] += 1
        except DeadlineExceeded:
            ends["late"] += 1
        for _ in range(200):
            pass
    assert sum(ends.values()) == 150
    time.sleep(0.1)
    assert set(threading.enumerate()) <= before, "the watcher outlives what it watches"


def test_one_deadline_watches_several_threads() -> None:
    limit = Deadline(0.1)

    def spin_for(seconds: float) -> str:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pass
        return "done"

    def ends(seconds: float) -> str:
        try:
            return limit.run(partial(spin_for, seconds))
        except DeadlineExceeded:
            return "late"

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ends, (0.0, 2.0, 0.001, 3.0))) == ["done", "late", "done", "late"]
    assert ends(0.0) == "done"


def test_a_deadline_passes_results_and_errors_on() -> None:
    assert Deadline(1.0).run(lambda: 5) == 5
    with pytest.raises(KeyError, match="k"):
        Deadline(1.0).run(lambda: dict[str, str]()["k"])
