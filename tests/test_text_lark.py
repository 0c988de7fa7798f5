"""Lark's grammars as expressions: what they take is what lark itself would, and the rest is left alone."""

from __future__ import annotations

import re
import time
import tracemalloc

import pytest

from pagoda.text.lark_expression import lark_expression

PATCH = """\
start: begin_patch hunk+ end_patch
begin_patch: "*** Begin Patch" LF
end_patch: "*** End Patch" LF?

hunk: add_hunk | delete_hunk | update_hunk
add_hunk: "*** Add File: " filename LF add_line+
delete_hunk: "*** Delete File: " filename LF
update_hunk: "*** Update File: " filename LF change?

filename: /(.+)/
add_line: "+" /(.*)/ LF -> line

change: (change_context | change_line)+ eof_line?
change_context: ("@@" | "@@ " /(.+)/) LF
change_line: ("+" | "-" | " ") /(.*)/ LF
eof_line: "*** End of File" LF

%import common.LF
"""
GOOD = '*** Begin Patch\n*** Add File: a/b.py\n+x = "1"\n+\n*** Update File: c\n@@ def\n-a\n+b\n*** End Patch\n'


def test_what_would_be_a_million_times_as_long_is_refused_at_once() -> None:
    doubled = "\n".join(f"r{n}: r{n + 1} r{n + 1}" for n in range(8))
    tracemalloc.start()
    try:
        assert lark_expression(f'start: {"|".join(["r0"] * 1000)}\n{doubled}\nr8: "{"x" * 99}"\n') is None
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()


def test_the_grammar_of_a_patch() -> None:
    made = re.compile(lark_expression(PATCH) or "")
    assert made.fullmatch(GOOD)
    for old, new in (("*** Begin", "** Begin"), ("+x", "x"), ("*** End Patch\n", ""), ("@@ def\n", "@ def\n")):
        assert not made.fullmatch(GOOD.replace(old, new)), new


@pytest.mark.parametrize(
    ("grammar", "takes", "refuses"),
    [
        ('start: "a.b" | "c\\n"', ["a.b", "c\n"], ["axb", "c", ""]),
        ('start: "select"i [" *"]', ["SELECT", "select *"], ["select*", "selects"]),
        ('start: (DIGIT~2..3 "-")~2\n%import common.DIGIT', ["12-345-"], ["1-23-", "12-", "1234-12-"]),
        ('start: a "," a\na.2: "x".."z"\n', ["x,z"], ["a,x", "x,x,x"]),
        (
            "// a comment\n?start: NUM // another\n  | WORD\nNUM: /[0-9]+/\n%import common (WORD, WS)",
            ["12", "ab"],
            ["a1"],
        ),
        ("start: /a\\/b/i", ["A/b"], ["ab"]),
    ],
)
def test_what_is_taken(grammar: str, takes: list[str], refuses: list[str]) -> None:
    made = re.compile(lark_expression(grammar) or "nothing")
    assert all(made.fullmatch(text) for text in takes) and not any(made.fullmatch(text) for text in refuses)


@pytest.mark.parametrize(
    "grammar",
    [
        'start: "(" start ")" | "x"', 'start: a\na: b\nb: a | "x"', "start: missing", 'other: "x"', "", "start: (",
        'start: "x"\n%ignore WS', 'start: "x"\n%import other.thing', 'start: "x"\n%import common.NO_SUCH',
        'start: _list{"x"}\n_list{item}: item ("," item)*', 'start[lazy]: "x"', 'start: %json {"type": "object"}',
        'start: "\\q"', "start: " + "(" * 5000, "start: " + "a " * 5000 + "\na: " + '"x" ' * 5000,
        "\n".join(f"a{i}: a{i + 1}" for i in range(3000)) + '\nstart: a0\na3000: "x"', "start: /" + "x" * 70_000 + "/",
    ],
)  # fmt: skip
def test_what_no_expression_can_say(grammar: str) -> None:
    started = time.thread_time()
    assert lark_expression(grammar) is None
    assert time.thread_time() - started < 2
