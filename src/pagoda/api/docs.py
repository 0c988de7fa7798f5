"""The API described for machines (OpenAPI 3.1) and for people (one page of HTML), both from the route table."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.responses import Response

from pagoda.api.http.errors import JSON
from pagoda.api.serving.endpoint import Endpoint

_REF = "#/components/schemas/{name}"
_STYLE = """
:root{color-scheme:light dark;font:16px/1.5 system-ui,sans-serif}body{max-width:56rem;margin:2rem auto;padding:0 1rem}
code,pre{font-family:ui-monospace,monospace;font-size:.9em}summary{cursor:pointer;padding:.35rem 0}
table{border-collapse:collapse;margin:.5rem 0 1rem 1rem}td{padding:.1rem .8rem .1rem 0;vertical-align:top}
.verb{display:inline-block;min-width:3.5rem;font-weight:600}.dim{opacity:.7}
"""


def openapi(endpoints: Sequence[Endpoint], version: str) -> dict[str, Any]:
    """The whole description; every schema is the struct that the server itself decodes or encodes."""
    used = [kind for each in endpoints for kind in (each.body, each.reply, each.event) if kind is not None]
    errors = [each.dialect.error_kind for each in endpoints]
    kinds: list[Any] = [*dict.fromkeys([*used, *errors])]
    schemas, components = msgspec.json.schema_components(kinds, ref_template=_REF)
    schema_of = dict(zip(kinds, schemas, strict=True))
    paths: dict[str, Any] = {}
    for each in endpoints:
        for method in each.methods:
            paths.setdefault(each.shown, {})[method.lower()] = _operation(each, method, schema_of)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Pagoda", "version": version, "summary": "LLM inference over the OpenAI API"},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def _operation(each: Endpoint, method: str, schema_of: dict[Any, dict[str, Any]]) -> dict[str, Any]:
    good: dict[str, Any] = {"description": "The answer"}
    if each.reply is not None:
        good["content"] = {JSON: {"schema": schema_of[each.reply]}}
    if each.event is not None:
        kind = each.dialect.media_type.partition(";")[0]
        good.setdefault("content", {})[kind] = {"schema": schema_of[each.event]}
    for kind in each.media:
        good.setdefault("content", {})[kind] = {}
    bad = {"description": "What is wrong", "content": {JSON: {"schema": schema_of[each.dialect.error_kind]}}}
    name = re.sub(r"\W+", "_", each.path.replace(":path", "")).strip("_") or "root"
    operation: dict[str, Any] = {
        "operationId": f"{method.lower()}_{name}",
        "summary": each.summary,
        "responses": {"200": good, "default": bad},
    }
    if each.body is not None:
        operation["requestBody"] = {"required": True, "content": {JSON: {"schema": schema_of[each.body]}}}
    if each.form:
        operation["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": dict(each.form)}}}
    in_path = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)", each.path)
    ]
    in_query = [{"name": name, "in": "query", "schema": dict(schema)} for name, schema in each.query.items()]
    if in_path or in_query:
        operation["parameters"] = [*in_path, *in_query]
    if each.public:
        operation["security"] = []
    return operation


def openapi_response(description: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(description), media_type=JSON)


def page(description: dict[str, Any]) -> bytes:
    """The description as a page without scripts."""
    schemas = description["components"]["schemas"]
    rows = "".join(
        _section(path, method, operation, schemas)
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
    )
    text = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Pagoda API</title><style>{_STYLE}</style>"
        f"<h1>Pagoda API</h1><p>Every path also works without <code>/v1</code>. For programs: "
        f'<a href="openapi.json">openapi.json</a>. Try it: <a href="./">chat</a>.</p>{rows}</html>'
    )
    return text.encode()


def _section(path: str, method: str, operation: dict[str, Any], schemas: dict[str, Any]) -> str:
    content = operation.get("requestBody", {}).get("content", {})
    title = (
        f"<span class=verb>{method.upper()}</span> <code>{html.escape(path)}</code> "
        f"<span class=dim>{html.escape(operation['summary'])}</span>"
    )
    if not content:
        return f"<p>{title}</p>"
    (described,) = content.values()
    schema = described["schema"]
    schema = schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    required = schema.get("required", [])
    fields = "".join(
        f"<tr><td><code>{html.escape(name)}</code><td>{html.escape(_kind(value))}"
        f"<td>{'required' if name in required else html.escape(json.dumps(value.get('default')))}"
        for name, value in schema["properties"].items()
    )
    return f"<details><summary>{title}</summary><table>{fields}</table></details>"


def _kind(schema: dict[str, Any]) -> str:
    """The type of a field in a word or two."""
    if "anyOf" in schema:
        return " or ".join(_kind(option) for option in schema["anyOf"] if option.get("type") != "null")
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    kind = str(schema.get("type", "any"))
    return f"{kind} of {_kind(schema['items'])}" if kind == "array" and schema.get("items") else kind
