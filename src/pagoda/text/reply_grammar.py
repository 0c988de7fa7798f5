"""The grammar of a whole answer: the reasoning of a model that thinks, then what the request asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pagoda.text.grammar import Part, begun_by, document, literal
from pagoda.text.reply import ReplyFormat
from pagoda.text.tokenizer import Tokenizer
from pagoda.text.tool_grammar import call_rules, free_rules
from pagoda.text.tools import ToolFormat

_HARMONY_THOUGHT = "<|channel|>analysis<|message|>", "<|end|>", "<|start|>assistant"
_HARMONY_ANSWER = "<|channel|>final<|message|>"


def reply_grammar(
    form: ReplyFormat,
    tokenizer: Tokenizer,
    *,
    answer: Part | None = None,
    calls: Sequence[str] = (),
    free: bool = False,
    opened: bool = False,
    thinks: bool = True,
) -> str:
    """`answer` is what the content must be, `calls` are the rules of the calls that may be made instead of it.

    `free`: the rules are those of an answer with calls in it. `opened`: the answer begins as reasoning; `thinks`: it
    may. Reasoning is free text up to its closing mark.
    """
    bodies = ["free"] if free else ["calls"] if calls else []
    if answer is not None:
        bodies.append(f"{literal(_HARMONY_ANSWER, tokenizer)} @part0" if form.is_harmony else "@part0")
    before, rules = _reasoning(form, tokenizer, opened) if opened or thinks else ("", [])
    main = [f"start: {before} reply", f"reply: {' | '.join(bodies)}", *rules, *calls]
    return document(main, *([] if answer is None else [answer]))


def _reasoning(form: ReplyFormat, tokenizer: Tokenizer, opened: bool) -> tuple[str, list[str]]:
    """What stands before the answer, and its rules."""
    if form.is_harmony:
        start, end, again = _HARMONY_THOUGHT
        rules = begun_by("thoughts", end, tokenizer)
        return "thought*", [f"thought: {literal(start, tokenizer)} thoughts {literal(again, tokenizer)}", *rules]
    if form.reasoning is None:
        return "", []
    rules = [*begun_by("thought", form.reasoning.end, tokenizer), r"blank: /[ \n]{1,8}/"]
    if opened:
        return "thought blank?", rules
    return f"(blank? {literal(form.reasoning.start, tokenizer)} thought blank?)?", rules


def forced_calls(
    form: ToolFormat, schemas: Mapping[str, Mapping[str, Any]], tokenizer: Tokenizer, *, parallel: bool
) -> list[str]:
    """Rules of an answer that is nothing but calls of these functions."""
    return call_rules(form.written, schemas, tokenizer, parallel=parallel)


def wanted_calls(
    form: ToolFormat, schemas: Mapping[str, Mapping[str, Any]], tokenizer: Tokenizer, *, parallel: bool
) -> list[str]:
    """Rules of an answer in which the model may call, and then does it right."""
    return free_rules(form.written, form.mark, schemas, tokenizer, parallel=parallel)
