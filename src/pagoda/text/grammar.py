"""What an output must match, from schema, expression, choice or grammar to one text in llguidance's language.

A part is one grammar of that text: {"json_schema": ...}, {"lark_grammar": ...}, or {"gbnf": ...}, which whoever
compiles it translates first. `document` puts reasoning before it and makes the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pagoda.errors import BadRequest
from pagoda.text.tokenizer import Tokenizer

Part = dict[str, Any]

MAX_TEXT_BYTES = 256 << 10
MAX_DEPTH = 64
MAX_NODES = 10_000
MAX_CHOICES = 2_000
# One blank, or one line end with its indentation: small models fill pages with blank space where they may.
_WHITESPACE = r" |\n[ \t]{0,32}"
_OPENS = frozenset("additionalProperties patternProperties unevaluatedProperties $ref allOf anyOf oneOf not".split())
_VALUES = frozenset(("enum", "const", "default", "examples"))
_NAMED = frozenset(("properties", "$defs", "definitions", "patternProperties", "dependentSchemas"))
ANYTHING = r"/(.|\n)*/"


def json_part(schema: Any, *, strict: bool = False, closed: bool = True, whitespace: str | None = None) -> Part:
    """JSON that a schema describes. `strict`: what cannot be enforced is an error, else it is left out.

    `closed`: objects that name their properties have no others, unless the schema speaks of them.
    """
    if isinstance(schema, str):
        schema = decoded(schema)
    if not isinstance(schema, bool | dict):
        raise BadRequest("a JSON schema must be an object")
    check_schema(schema)
    if closed and '"allOf"' not in json.dumps(schema):  # its members describe one object together
        schema = close(schema)
    options: dict[str, Any] = {"coerce_one_of": True, "lenient": not strict}
    options |= {"whitespace_flexible": False} if whitespace == "" else {"whitespace_pattern": whitespace or _WHITESPACE}
    whole = {"allOf": [schema]} if isinstance(schema, bool) else schema
    return {"json_schema": {**whole, "x-guidance": options}}


def object_part(whitespace: str | None = None) -> Part:
    """Any JSON object."""
    return json_part({"type": "object"}, whitespace=whitespace)


def regex_part(pattern: Any) -> Part:
    """Text that an expression matches as a whole, whether it says so with ^ and $ or not."""
    if not isinstance(pattern, str) or not pattern:
        raise BadRequest("a regular expression must be a string, and not empty")
    _check_size(pattern)
    return {"lark_grammar": f"start: {regex(pattern)}"}


def choice_part(choices: Any) -> Part:
    if not isinstance(choices, list) or not choices or not all(isinstance(one, str) and one for one in choices):
        raise BadRequest("a choice must be a list of strings, none of them empty")
    if len(choices) > MAX_CHOICES:
        raise BadRequest(f"a choice may have at most {MAX_CHOICES} strings")
    text = "start: " + " | ".join(map(quoted, dict.fromkeys(choices)))
    _check_size(text)
    return {"lark_grammar": text}


def grammar_part(text: Any) -> Part:
    """A grammar that a client wrote: Lark, or GBNF (`root ::= ...`)."""
    if not isinstance(text, str) or not text.strip():
        raise BadRequest("a grammar must be a text in Lark's or in GBNF's notation")
    _check_size(text)
    return {"gbnf": text} if "::=" in text else {"lark_grammar": text}


def tags_part(structures: Sequence[Mapping[str, Any]], triggers: Sequence[str], tokenizer: Tokenizer) -> Part:
    """Free text in which what follows a trigger must be one of the structures: begin, JSON, end."""
    rules: list[str] = []
    for index, trigger in enumerate(triggers):
        bodies = []
        for structure in structures:
            begin, end = structure.get("begin"), structure.get("end")
            if not isinstance(begin, str) or not isinstance(end, str):
                raise BadRequest("each structure needs begin and end, which are strings")
            if begin.startswith(trigger):
                schema = inline(json_part(structure.get("schema", {})))
                bodies.append(" ".join((literal(begin[len(trigger) :], tokenizer), schema, literal(end, tokenizer))))
        if not bodies:
            raise BadRequest(f"the trigger {trigger[:64]!r} begins none of the structures")
        rules += [*begun_by(f"begin{index}", trigger, tokenizer), f"tag{index}: begin{index} ({' | '.join(bodies)})"]
    if not rules:
        raise BadRequest("a structural tag needs structures, and triggers that they begin with")
    any_tag = " | ".join(f"tag{index}" for index in range(len(triggers)))
    return {"lark_grammar": "\n".join((f"start: ({any_tag})* rest", *rules, f"rest: {ANYTHING}"))}


def begun_by(name: str, mark: str, tokenizer: Tokenizer) -> list[str]:
    """Rules for free text up to a mark, and the mark."""
    if _special(mark, tokenizer):
        return [f"{name}: {name}_text {literal(mark, tokenizer)}", f"{name}_text: {ANYTHING}"]
    return [f"{name}[lazy]: {ANYTHING} {quoted(mark)}"]


def document(main: Sequence[str], *parts: Part) -> str:
    """The whole text: rules, of which `start` is first, and the parts that they name @part0, @part1, ..."""
    named = [{"name": f"part{index}", **part} for index, part in enumerate(parts)]
    return json.dumps({"grammars": [{"name": "main", "lark_grammar": "\n".join(main)}, *named]}, ensure_ascii=False)


def inline(part: Part) -> str:
    """A part of JSON inside a rule."""
    return "%json " + json.dumps(part["json_schema"], ensure_ascii=False)


def regex(pattern: str) -> str:
    """An expression in a rule."""
    escaped = re.sub(r"\\.|/", lambda found: r"\/" if found[0] == "/" else found[0], pattern, flags=re.DOTALL)
    return "/" + escaped.replace("\n", r"\n") + "/"


def quoted(text: str) -> str:
    """A text in a rule."""
    return json.dumps(text, ensure_ascii=False)


def literal(text: str, tokenizer: Tokenizer) -> str:
    """A text in a rule in which special tokens stand for themselves; "" for no text."""
    pattern = tokenizer.special_pattern
    if pattern is None:
        return quoted(text) if text else ""
    ids = {tokenizer.token_text(i): i for i in tokenizer.special_ids}
    pieces, start = [], 0
    for found in pattern.finditer(text):
        pieces += [quoted(text[start : found.start()])] if found.start() > start else []
        pieces.append(f"<[{ids[found[0]]}]>")
        start = found.end()
    return " ".join([*pieces, quoted(text[start:])] if start < len(text) else pieces)


def _special(text: str, tokenizer: Tokenizer) -> bool:
    pattern = tokenizer.special_pattern
    return pattern is not None and pattern.search(text) is not None


def close(schema: Any) -> Any:
    """The same schema, whose objects have no properties but those they name, where nothing is said of others."""
    if isinstance(schema, list):
        return [close(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: _close_below(key, value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and _OPENS.isdisjoint(schema):
        kept["additionalProperties"] = False
    return kept


def _close_below(key: str, value: Any) -> Any:
    if key in _VALUES:
        return value
    if key in _NAMED and isinstance(value, dict):
        return {name: close(each) for name, each in value.items()}
    return close(value)


def decoded(text: str) -> Any:
    """The JSON in a text, where some clients put a schema."""
    _check_size(text)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadRequest("the text does not hold JSON") from None


def _check_size(text: str) -> None:
    if len(text.encode("utf-8", "replace")) > MAX_TEXT_BYTES:
        raise BadRequest(f"it is larger than {MAX_TEXT_BYTES >> 10} KiB")


def check_schema(schema: Any) -> None:
    """Refuse what is too large or lies elsewhere, before anybody recurses into it."""
    level, nodes = [schema], 0
    for _ in range(MAX_DEPTH):
        nodes += len(level)
        if nodes > MAX_NODES:
            raise BadRequest(f"the schema has more than {MAX_NODES} parts")
        following: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                target = item.get("$ref")
                if isinstance(target, str) and not target.startswith("#"):
                    raise BadRequest(f"$ref {target[:64]!r} is not inside the schema, and nothing is fetched for it")
                following += item.values()
            elif isinstance(item, list):
                following += item
        if not following:
            _check_size(json.dumps(schema))
            return
        level = following
    raise BadRequest(f"the schema is nested deeper than {MAX_DEPTH} levels")
