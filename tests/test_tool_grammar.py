"""What a grammar of calls allows, that family's reader reads: walks at random through the grammar of each format."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from pagoda.text.matcher import Vocabulary
from pagoda.text.parts import Part, join_parts
from pagoda.text.reply import ReplyFormat, ReplyReader
from pagoda.text.reply_grammar import forced_calls, reply_grammar, wanted_calls
from pagoda.text.tools import ToolFormat, find_tool_format

SCHEMAS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 20},
            "days": {"type": "integer", "minimum": 1, "maximum": 14},
            "unit": {"enum": ["C", "F"]},
            "exact": {"type": "boolean"},
            "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "maxItems": 2},
        },
        "required": ["city", "unit"],
        "$defs": {"tag": {"type": "string", "enum": ["sun", "rain"]}},
    },
    "now": {"type": "object", "properties": {}},
    "place": {"type": "object", "properties": {"at": {"type": "object", "properties": {"x": {"type": "number"}}}}},
}
KINDS = {"city": str, "days": int, "unit": str, "exact": bool, "tags": list}


NAMES = (
    "hermes qwen3_coder glm45 mistral mistral_args llama3_json pythonic llama4_pythonic lfm2 deepseek_v3 deepseek_v31 "
    "kimi_k2 minimax_m2 functiongemma gemma4 granite jamba phi4_mini_json openai"
).split()


def format_of(name: str) -> ToolFormat:
    found = find_tool_format("", name)
    assert found is not None
    return found


class Letters:
    """One token per byte, `</s>` and the marks of a format as special ones."""

    def __init__(self, marks: Sequence[str]) -> None:
        self.table = [bytes([i]) for i in range(256)] + [text.encode() for text in ("</s>", *marks)]
        self.special_ids = frozenset(range(256, len(self.table)))
        self.special_pattern = re.compile("|".join(re.escape(text) for text in ("</s>", *marks)))

    def token_text(self, i: int) -> str:
        return self.table[i].decode("utf-8", "replace")


def walk(letters: Letters, text: str, seed: int, end: str) -> str:
    """An output that the grammar allows: strings end soon, free text with `end`."""
    matcher = Vocabulary(letters.table, sorted(letters.special_ids), [256]).compile(text)
    chance = random.Random(seed)
    out: list[int] = []
    for _ in range(3000):
        allowed = np.flatnonzero(np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")).tolist()
        assert allowed, matcher.error
        likely = [i for i in allowed if i >= 256 or i in b'"<,}])']
        if len(allowed) > 60:
            allowed = [i for i in allowed if 32 <= i < 127 or i >= 256]
        if end and len(allowed) > 90 and chance.random() < 0.2:
            out += end.encode()
            matcher.advance(list(end.encode()))
            continue
        token = chance.choice(likely if likely and chance.random() < 0.3 else allowed)
        if token == 256:
            break
        out.append(token)
        if matcher.advance([token]):
            break
    else:
        pytest.fail("the walk does not end")
    return b"".join(letters.table[i] for i in out).decode("utf-8", "replace")


def read(form: ToolFormat, text: str) -> list[Part]:
    reader = ReplyReader(ReplyFormat(None, form), schemas=SCHEMAS)
    return join_parts([*reader.feed(text), *reader.finish()])


def check(parts: list[Part], text: str) -> int:
    """Each call is of a known function and fits its schema; gives their number."""
    calls = [part.text for part in parts if part.kind == "call"]
    arguments = [json.loads(part.text) for part in parts if part.kind == "arguments"]
    assert len(calls) == len(arguments), text
    for name, given in zip(calls, arguments, strict=True):
        assert given.keys() <= SCHEMAS[name]["properties"].keys(), text
        assert given.keys() >= set(SCHEMAS[name].get("required", [])), text
        if name == "get_weather":
            assert all(type(value) is KINDS[key] for key, value in given.items()), text
            assert given["unit"] in ("C", "F") and set(given.get("tags", [])) <= {"sun", "rain"}, text
    return len(calls)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_forced_calls_are_read_as_calls(name: str, special: bool) -> None:
    form = format_of(name)
    letters = Letters(form.marks if special else ())
    reply, end = ReplyFormat(None, form), form.written.end
    end = "" if special and end in form.marks else end
    counts = set()
    for seed in range(6):
        rules = forced_calls(form, SCHEMAS, letters, parallel=seed % 2 == 0)
        text = walk(letters, reply_grammar(reply, letters, calls=rules, thinks=False), seed, end)
        parts = read(form, text)
        assert {part.kind for part in parts} <= {"call", "arguments"}, text
        count = check(parts, text)
        assert count == 1 or (count > 1 and seed % 2 == 0), text
        counts.add(count)
    only = {"now": SCHEMAS["now"]}
    rules = forced_calls(form, only, letters, parallel=False)
    text = walk(letters, reply_grammar(reply, letters, calls=rules, thinks=False), 1, "")
    (call, arguments) = read(form, text)
    assert call == Part("call", "now") and json.loads(arguments.text) == {}, text


@pytest.mark.parametrize("name", [name for name in NAMES if name != "openai"])
def test_what_begins_like_a_call_becomes_one(name: str) -> None:
    form = format_of(name)
    letters = Letters(form.marks)
    rules = wanted_calls(form, SCHEMAS, letters, parallel=True)
    text = reply_grammar(ReplyFormat(None, form), letters, calls=rules, free=True, thinks=False)
    vocabulary = Vocabulary(letters.table, sorted(letters.special_ids), [256])
    plain = vocabulary.compile(text)
    assert not plain.advance(list(b"Just some words.")) and not plain.error
    assert plain.mask()[8] & 1, "it may end here"
    begun = vocabulary.compile(text)
    mark = form.mark
    start = (list(b"Let me see. ") if mark else []) + ([letters.table.index(mark.encode())] if mark else [])
    rest = form.written.start[len(mark or "") :].encode()
    begun.advance([*start, *rest] if not any(m in form.written.start[len(mark or "") :] for m in form.marks) else start)
    assert not begun.error
    assert not begun.mask()[8] & 1, "a call that was begun has to be ended"


@pytest.mark.parametrize("name", ["pythonic", "qwen3_coder", "hermes"])
def test_schemas_of_any_kind_make_a_grammar_in_no_time(name: str) -> None:
    """Functions that refer to themselves ten times over, values where lists belong, names with signs in them."""
    itself = {"type": "object", "properties": {f"p{i}": {"$ref": "#"} for i in range(10)}}
    odd = {
        "properties": {"a": {"enum": 5}, "b": {"type": [{}, "null"]}, "c": {"anyOf": 1}, "d": {"type": None}, "e": 1}
    }
    letters = Letters(())
    for schemas in ({"f": itself}, {'g"h\n</s>': odd}):
        rules = forced_calls(format_of(name), schemas, letters, parallel=True)
        assert len("".join(rules)) < 20_000


def test_arguments_in_python_may_refer_to_themselves() -> None:
    tree = {"type": "object", "properties": {"t": {"$ref": "#/$defs/t"}}, "required": ["t"]}
    tree["$defs"] = {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}
    letters = Letters(())
    rules = forced_calls(format_of("pythonic"), {"f": tree}, letters, parallel=False)
    text = reply_grammar(ReplyFormat(None, format_of("pythonic")), letters, calls=rules, thinks=False)
    matcher = Vocabulary(letters.table, [256], [256]).compile(text)
    assert matcher.advance(list(b"[f(t=[[], [[]]])]")) and not matcher.error
