"""What vLLM calls structured outputs: one of several ways to say what an output must be, as a grammar."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pagoda.errors import BadRequest
from pagoda.text.grammar import (
    Part,
    choice_part,
    decoded,
    document,
    grammar_part,
    json_part,
    object_part,
    regex_part,
    tags_part,
)
from pagoda.text.tokenizer import Tokenizer

_KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


def chosen(given: Mapping[str, Any]) -> list[str]:
    """The ways that are used."""
    return [kind for kind in _KINDS if given.get(kind) not in (None, False)]


def part_of_kind(kind: str, value: Any, tokenizer: Tokenizer, **options: Any) -> Part:
    makers: dict[str, Callable[[], Part]] = {
        "json": lambda: json_part(value, **options),
        "regex": lambda: regex_part(value),
        "choice": lambda: choice_part(value),
        "grammar": lambda: grammar_part(value),
        "json_object": lambda: object_part(options.get("whitespace")),
        "structural_tag": lambda: structural_tag_part(value, tokenizer),
    }
    return makers[kind]()


def structured_part(given: Mapping[str, Any], tokenizer: Tokenizer) -> Part:
    kinds = chosen(given)
    if len(kinds) != 1:
        raise BadRequest(f"it may hold one of {', '.join(_KINDS)}, but holds {', '.join(kinds) or 'none'}")
    whitespace = "" if given.get("disable_any_whitespace") else given.get("whitespace_pattern")
    if whitespace is not None and not isinstance(whitespace, str):
        raise BadRequest("whitespace_pattern must be a string")
    return part_of_kind(kinds[0], given[kinds[0]], tokenizer, whitespace=whitespace)


def structural_tag_part(given: Any, tokenizer: Tokenizer) -> Part:
    if isinstance(given, str):
        given = decoded(given)
    if not isinstance(given, Mapping):
        raise BadRequest("a structural tag must be an object with structures and triggers")
    structures, triggers = given.get("structures"), given.get("triggers")
    if not isinstance(structures, list) or not all(isinstance(each, dict) for each in structures):
        raise BadRequest("a structural tag needs structures, a list of objects with begin, schema and end")
    if not isinstance(triggers, list) or not all(isinstance(each, str) and each for each in triggers):
        raise BadRequest("a structural tag needs triggers, a list of strings")
    return tags_part(structures, triggers, tokenizer)


def structured_grammar(given: Mapping[str, Any], tokenizer: Tokenizer) -> str:
    """The grammar of an output that is nothing else."""
    return document(["start: @part0"], structured_part(given, tokenizer))
