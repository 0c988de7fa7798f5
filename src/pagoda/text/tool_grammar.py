"""Grammars of tool calls: how a family writes its calls, made into rules that allow nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pagoda.text.grammar import ANYTHING, begun_by, check_schema, inline, json_part, literal, quoted, regex
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

    Around all of them stand `opening` and `closing`. Arguments are an object of JSON, keywords of Python, tags (for
    each of those `key`, its name, `value`, the value, `end`), or bare names with values, whose strings are `marked`:
    they stand between two of `end`.
    """

    before: str
    between: str
    after: str
    opening: str = ""
    separator: str = "\n"
    closing: str = ""
    arguments: Literal["json", "python", "tags", "marked"] = "json"
    key: str = ""
    value: str = ""
    end: str = ""

    @property
    def start(self) -> str:
        return self.opening + self.before


@dataclass(slots=True)
class _Rules:
    """Rules as they are made for the function `name`, in whose schema references are looked up."""

    form: CallForm
    tokenizer: Tokenizer
    name: str = ""
    schema: Mapping[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    referred: dict[str, str] = field(default_factory=dict)

    def text(self, text: str) -> str:
        return literal(text, self.tokenizer)

    @property
    def marked(self) -> bool:
        return self.form.arguments == "marked"

    @property
    def comma(self) -> str:
        return '","' if self.marked else '", "'

    def kinds(self) -> Mapping[str, str]:
        """How values of the simple types are written."""
        if not self.marked:
            return _PYTHON
        self.add(begun_by("marked", self.form.end, self.tokenizer))
        words = {"boolean": '("true" | "false")', "null": '"null"'}
        return {**_PYTHON, **words, "string": f"{self.text(self.form.end)} marked"}

    def add(self, lines: Sequence[str]) -> None:
        if lines[0] not in self.lines:
            self.lines += lines

    def key(self, name: str) -> str:
        """A name in an object inside the arguments."""
        return quoted(f"{name}:" if self.marked else f"{_shown(name)}: ")

    def shown(self, value: Any) -> str:
        """A certain value."""
        if not self.marked:
            return quoted(_shown(value))
        if isinstance(value, str):
            return f"{self.text(self.form.end)} {quoted(value)} {self.text(self.form.end)}"
        return quoted(json.dumps(value, separators=(",", ":")))


def call_rules(
    form: CallForm, schemas: Mapping[str, Mapping[str, Any]], tokenizer: Tokenizer, *, parallel: bool, cut: str = ""
) -> list[str]:
    """Rules of which `calls` is one call of these functions or, if `parallel`, several. `cut`: its start, left out."""
    rules = _Rules(form, tokenizer)
    names = []
    for index, (name, schema) in enumerate(schemas.items()):
        rules.name, rules.schema, rules.referred = f"function{index}", _object(schema), {}
        check_schema(rules.schema)
        names.append(rules.name)
        shown = json.dumps(name, ensure_ascii=False)[1:-1] if form.arguments == "json" else name
        inner = {"json": _json, "python": _python, "tags": _tags, "marked": _python}[form.arguments](rules)
        begun = f"{quoted(shown)} {rules.text(form.between)} {inner} {rules.text(form.after)}"
        rules.lines.append(f"{rules.name}: {begun}")
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


def _json(rules: _Rules) -> str:
    return inline(json_part(rules.schema))


def _tags(rules: _Rules) -> str:
    out = []
    for index, (key, schema, needed) in enumerate(_properties(rules.schema)):
        name = f"{rules.name}_{index}"
        begin = " ".join((rules.text(rules.form.key), quoted(key), rules.text(rules.form.value)))
        rules.lines.append(f"{name}: {begin} {_tagged(rules, schema, name)}")
        out.append(name if needed else f"{name}?")
    return " ".join(out)


def _tagged(rules: _Rules, schema: Mapping[str, Any], name: str) -> str:
    """A value up to its end mark: text as it is, all else as JSON."""
    resolved = _resolve(schema, rules.schema)
    end, choices = rules.text(rules.form.end), resolved.get("enum")
    if isinstance(choices, list) and choices and all(isinstance(each, str) for each in choices):
        return f"({' | '.join(map(quoted, choices))}) {end}"
    if resolved.get("type") == "string" and choices is None and "const" not in resolved:
        rules.lines += begun_by(f"{name}_text", rules.form.end, rules.tokenizer)
        return f"{name}_text"
    defs = {key: rules.schema[key] for key in ("$defs", "definitions") if key in rules.schema}
    return f"{inline(json_part({**schema, **defs}))} {end}"


def _python(rules: _Rules) -> str:
    equals = ":" if rules.marked else "="
    members = [
        (f"{quoted(key + equals)} {_literal(rules, schema)}", needed)
        for key, schema, needed in _properties(rules.schema)
    ]
    return _listed(members, rules.comma)


def _listed(members: Sequence[tuple[str, bool]], comma: str) -> str:
    """Members with commas between them; those that are not needed may be left out."""
    needed = [text for text, must in members if must]
    others = [text for text, must in members if not must]
    if needed:
        return f" {comma} ".join(needed) + "".join(f" ({comma} {text})?" for text in others)
    firsts = [
        text + "".join(f" ({comma} {more})?" for more in others[place + 1 :]) for place, text in enumerate(others)
    ]
    return f"({' | '.join(firsts)})?" if firsts else ""


def _literal(rules: _Rules, given: Any) -> str:
    """A value as Python writes it. What is referred to is a rule of its own, so that it may refer to itself."""
    target = given.get("$ref") if isinstance(given, dict) else None
    if isinstance(target, str):
        name = rules.referred.get(target)
        if name is None:
            name = rules.referred[target] = f"{rules.name}_ref{len(rules.referred)}"
            rules.lines.append(f"{name}: {_literal(rules, _resolve(given, rules.schema))}")
        return name
    schema = given if isinstance(given, dict) else {}
    if "const" in schema or isinstance(schema.get("enum"), list):
        values = [schema["const"]] if "const" in schema else schema["enum"]
        return "(" + " | ".join(map(rules.shown, values)) + ")"
    some = schema.get("anyOf") or schema.get("oneOf")
    if isinstance(some, list):
        return "(" + " | ".join(_literal(rules, each) for each in some) + ")"
    kinds = schema.get("type")
    return (
        "("
        + " | ".join(_of_type(rules, schema, kind) for kind in (kinds if isinstance(kinds, list) else [kinds]))
        + ")"
    )


def _of_type(rules: _Rules, schema: Mapping[str, Any], given: Any) -> str:
    kind = given if isinstance(given, str) else "any"
    kinds = rules.kinds()
    if kind in kinds:
        return kinds[kind]
    if kind == "array":
        item = _literal(rules, schema.get("items"))
        return f'"[" ({item} ({rules.comma} {item})*)? "]"'
    if kind == "object" and isinstance(schema.get("properties"), dict):
        members = [(f"{rules.key(key)} {_literal(rules, each)}", must) for key, each, must in _properties(schema)]
        return f'"{{" {_listed(members, rules.comma)} "}}"'
    name = r'/[A-Za-z_][A-Za-z0-9_]*/ ":"' if rules.marked else f'{kinds["string"]} ": "'
    rules.add(
        [
            f"any_value: {' | '.join(kinds.values())} | any_list | any_dict",
            f'any_list: "[" (any_value ({rules.comma} any_value)*)? "]"',
            f'any_dict: "{{" (any_item ({rules.comma} any_item)*)? "}}"',
            f"any_item: {name} any_value",
        ]
    )
    return "any_dict" if kind == "object" else "any_value"


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
