"""What the parts of a grammar allow and what not, on a vocabulary of bytes."""

from __future__ import annotations

from typing import Any

import pytest
from api_fake import EOS, SPECIAL, VOCAB, ByteTokenizer

from pagoda.text.grammar import choice_part, document, json_part, object_part, regex_part, tags_part
from pagoda.text.matcher import Vocabulary
from pagoda.text.reasoning import HARMONY
from pagoda.text.reply import ReplyFormat, find_format
from pagoda.text.reply_grammar import reply_grammar

TOKENIZER: Any = ByteTokenizer()
VOCABULARY = Vocabulary([TOKENIZER.token_bytes(i) for i in range(VOCAB)], sorted(SPECIAL), [EOS])
OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}}
TREE = {"$ref": "#/$defs/t", "$defs": {"t": {"type": "object", "properties": {"l": {"$ref": "#/$defs/t"}}}}}
BOTH = {"allOf": [{"properties": {"a": {"type": "integer"}}}, {"properties": {"b": {"type": "integer"}}}]}
MANY = {f"p{index}": {"type": "string"} for index in range(600)}
TAGS = tags_part(
    [
        {"begin": "<f>", "schema": {**OBJECT, "required": ["a"]}, "end": "</f>"},
        {"begin": "<|im_start|>g", "schema": True, "end": "."},
    ],
    ["<f", "<|im_start|>"],
    TOKENIZER,
)


def allows(text: str, wanted: str | list[int]) -> bool:
    matcher = VOCABULARY.compile(text)
    matcher.advance(list(wanted.encode()) if isinstance(wanted, str) else wanted)
    return not matcher.error and bool(matcher.mask()[EOS // 32] >> (EOS % 32) & 1)


@pytest.mark.parametrize(
    ("part", "good", "bad"),
    [
        (json_part(OBJECT), ['{"a":1}', '{"a": 1}', '{\n  "a": 1\n}', "{}"], ['{"a":1,"b":2}', '{"a":  1}']),
        (json_part(OBJECT, closed=False), ['{"a":1,"b":2}'], ["[]"]),
        (json_part({**OBJECT, "additionalProperties": True}), ['{"a":1,"b":2}'], ['"a"']),
        (json_part(OBJECT, whitespace=""), ['{"a":1}'], ['{"a": 1}']),
        (json_part(OBJECT, whitespace=r"\t"), ['{"a":\t1}'], ['{"a": 1}']),
        (json_part('{"enum": ["x", 1]}'), ['"x"', "1"], ["x"]),
        (json_part({"properties": MANY}), ['{"p3":"a","p599":"b"}'], ['{"p600":"a"}']),
        (json_part(TREE), ['{"l":{"l":{}}}'], ['{"m":{}}']),
        (json_part(BOTH), ['{"a":1,"b":2}'], ['{"a":"x"}']),
        (json_part({"type": "object", "properties": {"properties": OBJECT}}), ['{"properties":{"a":1}}'], ['{"a":1}']),
        (json_part({"type": "array", "uniqueItems": True}), ["[1]"], ["1"]),
        (object_part(), ['{"x": [1, {"y": null}]}'], ["[1]", "1"]),
        (regex_part(r"^a/b\/c\$$"), ["a/b/c$"], ["a/b/c", "xa/b/c$"]),
        (regex_part("a|bc"), ["a", "bc"], ["abc", "ac"]),
        (choice_part(["é\n\"x\"", "b", "b"]), ['é\n"x"', "b"], ["é", "bb"]),
        (TAGS, ["words <b> and", 'x <f>{"a": 1}</f> y <f>{"a":2}</f>'], ["x <f", '<f>{"a": 1}', "<f>x</f>"]),
    ],
)  # fmt: skip
def test_what_a_part_allows(part: dict[str, Any], good: list[str], bad: list[str]) -> None:
    text = document(["start: @part0"], part)
    assert [one for one in good if not allows(text, one)] == []
    assert [one for one in bad if allows(text, one)] == []


def test_marks_of_tags_may_be_special_tokens() -> None:
    text = document(["start: @part0"], TAGS)
    assert allows(text, [120, 258, *b"g[1]."]) and not allows(text, [120, 258, *b"g[1]"])


def test_strict_refuses_what_it_can_not_enforce() -> None:
    text = document(["start: @part0"], json_part({"type": "array", "uniqueItems": True}, strict=True))
    with pytest.raises(Exception, match="uniqueItems"):
        VOCABULARY.compile(text)


@pytest.mark.parametrize(
    ("opened", "thinks", "good", "bad"),
    [
        (True, True, ["Hm, <b>.\n</think>\n\n{}", "</think>{}"], ["{}", "<think>Hm</think>{}x"]),
        (False, True, ["<think>\nHm\n</think>\n\n{}", "{}"], ["Hm</think>{}", "<think>{}"]),
        (False, False, ["{}"], ["<think>\nHm\n</think>\n\n{}"]),
    ],
)
def test_the_grammar_begins_behind_the_reasoning(opened: bool, thinks: bool, good: list[str], bad: list[str]) -> None:
    form = find_format("<think></think>")
    text = reply_grammar(form, TOKENIZER, answer=json_part(OBJECT), opened=opened, thinks=thinks)
    assert [one for one in good if not allows(text, one)] == []
    assert [one for one in bad if allows(text, one)] == []


def test_gpt_oss_thinks_in_messages_of_their_own() -> None:
    text = reply_grammar(ReplyFormat(HARMONY, None), TOKENIZER, answer=json_part(OBJECT))
    thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    answer = "<|channel|>final<|message|>{}"
    assert allows(text, answer) and allows(text, thought + answer)
    assert not allows(text, thought) and not allows(text, "{}")
