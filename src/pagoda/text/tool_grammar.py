"""Grammars of tool calls: how a family writes its calls, made into rules that allow nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pagoda.text.grammar import ANYTHING, begun_by, inline, json_part, literal, quoted, regex
from pagoda.text.tokenizer import Tokenizer

MAX_CALLS = 8
"""In one answer: a small model that may go on would go on for ever."""

_MAX_DEPTH = 8
_PYTHON = {
    "string": regex(r'"([^"\\\n]|\\["\\nt])*"'),
    "integer": "/-?(0|[1-9][0-9]{0,17})/",
    "number": r"/-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,17})?/",
    "boolean": '("True" | "False")',
    "null": '"None"',
}


@dataclass(frozen=True, slots=True)
class CallForm:
    """A call is `before` NAME `between` ARGUMENTS `after`; several have `separator` between them.

    Around all of them stand `opening` and `closing`. Arguments are an object of JSON, keywords of Python, or tags:
    for each of those `key`, its name, `value`, the value, `end`.
    """

    before: str
    between: str
    after: str
    opening: str = ""
    separator: str = "\n"
    closing: str = ""
    arguments: Literal["json", "python", "tags"] = "json"
    key: str = ""
    value: str = ""
    end: str = ""

    @property
    def start(self) -> str:
        return self.opening + self.before


@dataclass(slots=True)
class _Rules:
    """Rules as they are made; `schema` is the one that references are looked up in."""

    form: CallForm
    tokenizer: Tokenizer
    schema: Mapping[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def text(self, text: str) -> str:
        return literal(text, self.tokenizer)


def call_rules(
    form: CallForm, schemas: Mapping[str, Mapping[str, Any]], tokenizer: Tokenizer, *, parallel: bool, cut: str = ""
) -> list[str]:
    """Rules of which `calls` is one call of these functions or, if `parallel`, several. `cut`: its start, left out."""
    rules = _Rules(form, tokenizer)
    names = []
    for index, (name, schema) in enumerate(schemas.items()):
        names.append(f"function{index}")
        rules.schema = _object(schema)
        shown = json.dumps(name, ensure_ascii=False)[1:-1] if form.arguments == "json" else name
        inner = {"json": _json, "python": _python, "tags": _tags}[form.arguments](rules, f"function{index}")
        begun = f"{quoted(shown)} {rules.text(form.between)} {inner} {rules.text(form.after)}"
        rules.lines.append(f"function{index}: {begun}")
    call, before = f"({' | '.join(names)})", rules.text(form.before)
    more = f"({rules.text(form.separator)} {before} {call}){{0,{MAX_CALLS - 1}}}" if parallel else ""
    first = rules.text(form.start.removeprefix(cut))
    return [f"calls: {first} {call} {more} {rules.text(form.closing)}", *rules.lines]


def free_rules(
    form: CallForm,
    mark: str | None,
    schemas: Mapping[str, Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    parallel: bool,
) -> list[str]:
    """Rules of which `free` is an answer with calls, if the model wants any: what begins like a call is one."""
    if mark is None:
        first = form.start[0]
        return [
            f"free: calls | {regex(f'[^{chr(92)}{first}](.|{chr(92)}n)*')}",
            *call_rules(form, schemas, tokenizer, parallel=parallel),
        ]
    rules = call_rules(form, schemas, tokenizer, parallel=parallel, cut=mark)
    many = "*" if parallel and not form.closing else "?"
    return [f"free: (mark calls){many} rest", *begun_by("mark", mark, tokenizer), f"rest: {ANYTHING}", *rules]


def _object(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments; one that says nothing has none."""
    return {"type": "object", **(schema or {"properties": {}})}


def _json(rules: _Rules, name: str) -> str:
    return inline(json_part(rules.schema))


def _tags(rules: _Rules, name: str) -> str:
    out = []
    for index, (key, schema, needed) in enumerate(_properties(rules.schema)):
        resolved = _resolve(schema, rules.schema)
        end = rules.text(rules.form.end)
        if resolved.get("type") == "string" and "enum" not in resolved and "const" not in resolved:
            rules.lines += begun_by(f"{name}_text{index}", rules.form.end, rules.tokenizer)
            value = f"{name}_text{index}"
        elif all(isinstance(each, str) for each in resolved.get("enum", [None])):
            value = f"({' | '.join(map(quoted, resolved['enum']))}) {end}"
        else:
            defs = {key: rules.schema[key] for key in ("$defs", "definitions") if key in rules.schema}
            value = f"{inline(json_part({**schema, **defs}))} {end}"
        rules.lines.append(
            f"{name}_{index}: {rules.text(rules.form.key)} {quoted(key)} {rules.text(rules.form.value)} {value}"
        )
        out.append(f"{name}_{index}" + ("" if needed else "?"))
    return " ".join(out)


def _python(rules: _Rules, name: str) -> str:
    members = [
        (f"{quoted(key + '=')} {_literal(rules, schema, 0)}", needed)
        for key, schema, needed in _properties(rules.schema)
    ]
    return _listed(members)


def _listed(members: Sequence[tuple[str, bool]]) -> str:
    """Members with commas between them; those that are not needed may be left out."""
    needed = [text for text, must in members if must]
    others = [text for text, must in members if not must]
    if needed:
        return ' ", " '.join(needed) + "".join(f' (", " {text})?' for text in others)
    firsts = [text + "".join(f' (", " {more})?' for more in others[place + 1 :]) for place, text in enumerate(others)]
    return f"({' | '.join(firsts)})?" if firsts else ""


def _literal(rules: _Rules, given: Any, depth: int) -> str:
    """A value as Python writes it."""
    schema = _resolve(given, rules.schema)
    if "const" in schema or isinstance(schema.get("enum"), list):
        values = [schema["const"]] if "const" in schema else schema["enum"]
        return "(" + " | ".join(quoted(_shown(value)) for value in values) + ")"
    some = schema.get("anyOf") or schema.get("oneOf")
    if isinstance(some, list) and depth < _MAX_DEPTH:
        return "(" + " | ".join(_literal(rules, each, depth + 1) for each in some) + ")"
    kinds = schema.get("type", "any")
    return (
        "("
        + " | ".join(_of_type(rules, schema, kind, depth) for kind in ([kinds] if isinstance(kinds, str) else kinds))
        + ")"
    )


def _of_type(rules: _Rules, schema: Mapping[str, Any], kind: Any, depth: int) -> str:
    if kind in _PYTHON:
        return _PYTHON[kind]
    if kind == "array" and depth < _MAX_DEPTH:
        item = _literal(rules, schema.get("items", {}), depth + 1)
        return f'"[" ({item} (", " {item})*)? "]"'
    if kind == "object" and isinstance(schema.get("properties"), dict) and depth < _MAX_DEPTH:
        members = [
            (f"{quoted(_shown(key) + ': ')} {_literal(rules, each, depth + 1)}", needed)
            for key, each, needed in _properties(schema)
        ]
        return f'"{{" {_listed(members)} "}}"'
    if "any_value" not in {line.partition(":")[0] for line in rules.lines}:
        simple = " | ".join(_PYTHON.values())
        rules.lines += [
            f"any_value: {simple} | any_list | any_dict",
            'any_list: "[" (any_value (", " any_value)*)? "]"',
            'any_dict: "{" (any_item (", " any_item)*)? "}"',
            f'any_item: {_PYTHON["string"]} ": " any_value',
        ]
    return {"array": "any_list", "object": "any_dict"}.get(kind, "any_value")


def _shown(value: Any) -> str:
    """A value of JSON as Python writes it, its strings in double quotes."""
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, list):
        return "[" + ", ".join(map(_shown, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_shown(key)}: {_shown(each)}" for key, each in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)


def _properties(schema: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], bool]]:
    properties, required = schema.get("properties"), schema.get("required")
    needed = required if isinstance(required, list) else []
    for key, each in (properties if isinstance(properties, dict) else {}).items():
        yield key, each if isinstance(each, dict) else {}, key in needed


def _resolve(given: Any, root: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema that a reference means; {} for one that leads nowhere or in a circle."""
    for _ in range(_MAX_DEPTH):
        if not isinstance(given, dict):
            return {}
        target = given.get("$ref")
        if not isinstance(target, str):
            return given
        found: Any = root
        for step in target.removeprefix("#").strip("/").split("/"):
            found = found.get(step) if isinstance(found, dict) else None
        given = found
    return {}
