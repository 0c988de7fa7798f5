"""Grammars are tried before the engine sees them: hostile ones end in a reason, quickly, and nobody else waits."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from api_fake import EOS, SPECIAL, VOCAB, ByteTokenizer

from pagoda.engine.grammar_check import GrammarCheck, Words
from pagoda.errors import BadRequest, Overloaded
from pagoda.text import grammar

START = ("start: @part0",)


def words() -> Words:
    return [ByteTokenizer().token_bytes(i) for i in range(VOCAB)], sorted(SPECIAL), [EOS]


def lark(rules: str) -> dict[str, Any]:
    return {"lark_grammar": rules}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def judge(*parts: dict[str, Any]) -> list[str]:
    """What is said of each, "" for a good one; all by one checker."""

    async def go() -> list[str]:
        check = GrammarCheck(words)
        said = []
        for part in parts:
            try:
                await check.check(grammar.document(START, part))
                said.append("")
            except BadRequest as error:
                said.append(error.message)
        check.close()
        return said

    return asyncio.run(go())


def test_good_ones_pass_and_wrong_ones_are_explained() -> None:
    good = [grammar.json_part(nested(10)), grammar.regex_part("a+"), grammar.grammar_part('root ::= "a" | "b" root')]
    wrong = [lark("start: nobody"), lark("start: /(/"), grammar.json_part({"type": "x"}), {"gbnf": "root ::= ("}]
    said = judge(*good, *wrong)
    assert said[: len(good)] == [""] * len(good)
    for text, word in zip(said[len(good) :], ("nobody", "regex", "x", "GBNF"), strict=True):
        assert word in text and "\n" not in text and len(text) < 500


def test_the_hostile_end_in_a_reason_and_the_next_is_served() -> None:
    slow = {"type": "integer", "multipleOf": 999983}
    eight = range(8)
    hostile = [
        grammar.json_part(slow),
        lark("start: /" + "(" * 30_000 + "a" + ")" * 30_000 + "/"),
        lark(f"start: /{'(a|b|ab){1,900}' * 40}{'.{0,900}' * 300}/"),
        grammar.json_part({"enum": [f"value {i}" for i in range(9000)]}),
        grammar.json_part({"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {}}} for j in eight]} for i in eight]}),
        {"gbnf": "root ::= " + "(" * 30_000},
    ]
    start = time.process_time()
    said = judge(*hostile, grammar.json_part(slow), grammar.regex_part("a+"))
    assert said[0] == said[-2] == "it takes too long or too much memory to compile"
    assert all(said[i] for i in (1, 4, 5)) and said[-1] == ""
    assert time.process_time() - start < 5


def test_it_may_refer_to_itself() -> None:
    tree = {"$ref": "#/$defs/t", "$defs": {"t": {"type": "object", "properties": {"l": {"$ref": "#/$defs/t"}}}}}
    assert judge(grammar.json_part(tree)) == [""]
    endless = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
    assert judge(grammar.json_part(endless), grammar.regex_part("a+"))[1] == ""


@pytest.mark.parametrize(
    ("make", "words_"),
    [
        (lambda: grammar.json_part(nested(70)), "nested deeper"),
        (lambda: grammar.json_part({"enum": list(range(50_000))}), "more than 10000 parts"),
        (lambda: grammar.json_part({"enum": ["x" * 300_000]}), "larger than 256 KiB"),
        (lambda: grammar.json_part({"$ref": "http://example.com/s.json"}), "nothing is fetched"),
        (lambda: grammar.json_part("[" * 100_000), "does not hold JSON"),
        (lambda: grammar.json_part([]), "must be an object"),
        (lambda: grammar.regex_part("a" * 300_000), "larger than"),
        (lambda: grammar.choice_part([str(i) for i in range(5000)]), "at most 2000"),
        (lambda: grammar.choice_part(["a", ""]), "none of them empty"),
        (lambda: grammar.grammar_part(""), "Lark"),
    ],
)
def test_too_large_ones_are_not_even_tried(make: Callable[[], Any], words_: str) -> None:
    with pytest.raises(BadRequest, match=words_):
        make()


def test_the_loop_goes_on_while_a_hostile_one_is_tried() -> None:
    async def go() -> tuple[int, list[Any]]:
        check = GrammarCheck(words)
        bad = asyncio.create_task(check.check(grammar.document(START, grammar.json_part({"multipleOf": 999983}))))
        turns = 0
        while not bad.done():
            await asyncio.sleep(0.01)
            turns += 1
        next_one = check.check(grammar.document(START, lark('start: "a"')))
        good = await asyncio.gather(bad, next_one, return_exceptions=True)
        check.close()
        return turns, good

    turns, (bad, good) = asyncio.run(go())
    assert turns > 10 and isinstance(bad, BadRequest) and json.loads(good)["grammars"]


def test_who_leaves_while_it_is_tried_disturbs_nobody() -> None:
    async def go() -> str:
        check = GrammarCheck(words)
        leaving = asyncio.create_task(check.check(grammar.document(START, grammar.json_part({"multipleOf": 999983}))))
        await asyncio.sleep(0.3)
        leaving.cancel()
        text = await check.check(grammar.document(START, lark('start: "a"')))
        check.close()
        return text

    assert "part0" in asyncio.run(go())


def test_known_grammars_pass_those_that_are_slow_and_new_ones_wait_so_long_only() -> None:
    async def go() -> None:
        check = GrammarCheck(words, turn_s=0.05)
        known = await check.check(grammar.document(START, lark("start: /a+/")))
        slow = {"type": "integer", "multipleOf": 999983}
        busy = asyncio.create_task(check.check(grammar.document(START, grammar.json_part(slow))))
        await asyncio.sleep(0)
        assert await check.check(known) == known and not busy.done()
        with pytest.raises(Overloaded, match="wait to be compiled"):
            await check.check(grammar.document(START, lark("start: /b+/")))
        with pytest.raises(BadRequest, match="too long"):
            await busy
        await check.check(grammar.document(START, lark("start: /b+/")))
        check.close()

    asyncio.run(go())


def test_closed_while_the_vocabulary_is_read() -> None:
    async def go() -> None:
        def closing() -> Words:
            loop.call_soon_threadsafe(check.close)
            return words()

        loop, check = asyncio.get_running_loop(), GrammarCheck(closing)
        with pytest.raises(BadRequest):
            await check.check(grammar.document(START, grammar.regex_part("a+")))

    asyncio.run(go())


def test_streams_go_on_while_the_vocabulary_is_read() -> None:
    async def go() -> float:
        def slow() -> Words:
            time.sleep(0.3)  # as 50,000 tokens take on a busy machine
            return words()

        check = GrammarCheck(slow)
        asked = asyncio.create_task(check.check(grammar.document(START, grammar.regex_part("a+"))))
        longest_s, before = 0.0, time.monotonic()
        while not asked.done():
            await asyncio.sleep(0.005)
            longest_s, before = max(longest_s, (now := time.monotonic()) - before), now
        await asked
        check.close()
        return longest_s

    assert asyncio.run(go()) < 0.2
