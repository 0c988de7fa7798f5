"""What a request asks of the form of its answer, under all the names that clients use for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pagoda.api.serving.server import Server
from pagoda.api.turn.bodies import SamplingFields
from pagoda.errors import BadRequest
from pagoda.text.grammar import Part, document, grammar_part, json_part, object_part, regex_part
from pagoda.text.structured import part_of_kind, structural_tag_part, structured_part
from pagoda.text.tokenizer import Tokenizer

_FORMATS = "text, json_object, json_schema, structural_tag, regex or grammar"
_OLD_NAMES = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_json_object")


def answer_part(body: SamplingFields, tokenizer: Tokenizer) -> tuple[str, Part] | None:
    """The field that says what the answer must be, and that; None where it may be anything."""
    found = [(name, value) for name in _OLD_NAMES if (value := getattr(body, name)) not in (None, False)]
    given = body.structured_outputs
    if given is not None and not isinstance(given, Mapping):
        raise BadRequest("structured_outputs must be an object", param="structured_outputs")
    found += [] if given is None else [("structured_outputs", given)]
    if (body.response_format or {}).get("type", "text") != "text":
        found.append(("response_format", body.response_format))
    if not found:
        return None
    if len(found) > 1:
        names = " and ".join(name for name, _ in found)
        raise BadRequest(f"{names} each say what the answer must be: give one of them", param=found[0][0])
    name, value = found[0]
    try:
        return name, _part(name, value, body.guided_whitespace_pattern, tokenizer)
    except BadRequest as error:
        raise BadRequest(f"{name}: {error.message}", remedy=error.remedy, param=name) from None


def _part(name: str, value: Any, whitespace: str | None, tokenizer: Tokenizer) -> Part:
    if name == "response_format":
        return _response_format(value, tokenizer)
    if name == "structured_outputs":
        return structured_part(value, tokenizer)
    return part_of_kind(name.removeprefix("guided_"), value, tokenizer, whitespace=whitespace)


def _response_format(given: Mapping[str, Any], tokenizer: Tokenizer) -> Part:
    kind = given.get("type")
    if kind == "json_object":
        return object_part()
    if kind == "json_schema":
        asked = given.get("json_schema", given.get("schema"))
        if isinstance(asked, Mapping) and isinstance(asked.get("schema"), Mapping | str | bool):
            return json_part(asked["schema"], strict=asked.get("strict") is True)
        if asked is None or asked == {}:
            raise BadRequest('json_schema needs a schema: {"name": "...", "schema": {...}}')
        return json_part(asked)
    if kind == "structural_tag":
        return structural_tag_part(given, tokenizer)
    if kind == "regex":
        return regex_part(given.get("pattern", given.get("regex")))
    if kind == "grammar":
        return grammar_part(given.get("grammar"))
    raise BadRequest(f"its type must be {_FORMATS}")


@contextmanager
def called(field: str) -> Iterator[None]:
    """Errors about response_format under the name that a dialect has for it."""
    try:
        yield
    except BadRequest as error:
        if error.param != "response_format":
            raise
        message = error.message.removeprefix("response_format: ")
        raise BadRequest(f"{field}: {message}", remedy=error.remedy, param=field) from None


async def checked(server: Server, field: str, grammar: str) -> str:
    """The grammar as the engine takes it. Raises BadRequest, naming the field it came from."""
    try:
        return await server.grammars.check(grammar)
    except BadRequest as error:
        raise BadRequest(f"{field}: {error.message}", param=field) from None


async def plain_grammar(server: Server, body: SamplingFields) -> str:
    """The grammar of an answer that is nothing but text; "" where it may be anything."""
    found = answer_part(body, server.tokenizer)
    return "" if found is None else await checked(server, found[0], document(["start: @part0"], found[1]))
