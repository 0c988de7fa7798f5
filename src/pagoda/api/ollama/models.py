"""Ollama's other routes: what is served, in its shapes, and clear errors for what a server of one model cannot do."""

from __future__ import annotations

import hashlib
import re
from typing import Any

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from pagoda.api.http.body import parse, read_body
from pagoda.api.http.errors import JSON, to_json
from pagoda.api.ollama.options import DEFAULTS, resolve
from pagoda.api.ollama.protocol import (
    OllamaDetails,
    OllamaModel,
    OllamaModels,
    OllamaNameBody,
    OllamaShow,
    OllamaVersion,
    timestamp,
)
from pagoda.api.serving.derived import Derived
from pagoda.api.serving.server import Server

FOR_EVER = "2318-01-01T00:00:00Z"
API_VERSION = "0.12.0"
"""The version of Ollama whose API this is: its clients compare it with the least they need."""

_OPTION_NAMES = {"repetition_penalty": "repeat_penalty", "max_tokens": "num_predict"}


async def version(server: Server, request: Request) -> Response:
    return _json(OllamaVersion(version=API_VERSION))


async def tags(server: Server, request: Request) -> Response:
    return _json(OllamaModels(models=[_model(server, name) for name in server.served.names]))


async def ps(server: Server, request: Request) -> Response:
    models = [_model(server, name) for name in server.served.names]
    for model in models:
        model.expires_at = FOR_EVER
        model.size_vram = 0
        model.context_length = server.max_model_len
    return _json(OllamaModels(models=models))


async def show(server: Server, request: Request) -> Response:
    body, ignored = parse(await read_body(request), OllamaNameBody)
    name = resolve(server, body.model or body.name)
    details, width = _details(server, name), server.engine.info.width
    made = server.derived.get(name)
    reply = OllamaShow(
        license="" if made is None else made.license,
        modelfile=_modelfile(name, made),
        parameters=_parameters(server, name),
        system=UNSET if made is None or not made.system else made.system,
        messages=UNSET if made is None or not made.messages else made.messages,
        template="" if server.chat_template is None else server.chat_template.source,
        details=details,
        model_info={
            "general.architecture": details.family,
            "general.basename": name,
            f"{details.family}.context_length": server.max_model_len,
            f"{details.family}.vocab_size": server.vocab_size,
            **({f"{details.family}.embedding_length": width} if width else {}),
        },
        capabilities=_capabilities(server),
        modified_at=timestamp(server.created if made is None else made.created),
    )
    return _dressed(server, _json(reply), ignored)


def tagged(name: str) -> str:
    """The name with a tag, as Ollama's clients expect it."""
    return name if ":" in name.rpartition("/")[2] else name + ":latest"


def _model(server: Server, name: str) -> OllamaModel:
    made = server.derived.get(name)
    return OllamaModel(
        name=tagged(name),
        model=tagged(name),
        modified_at=timestamp(server.created if made is None else made.created),
        size=server.engine.info.weight_bytes,
        digest=hashlib.sha256(f"{name}\0{server.root}".encode()).hexdigest(),
        details=_details(server, name),
        capabilities=_capabilities(server),
    )


def _details(server: Server, name: str) -> OllamaDetails:
    info, made = server.engine.info, server.derived.get(name)
    family = info.architecture.lower()
    size = re.search(r"(?<![0-9.])(\d+(?:\.\d+)?)([bm])(?![a-z])", name, re.IGNORECASE)
    return OllamaDetails(
        parent_model="" if made is None else made.parent,
        format="gguf" if server.root.endswith(".gguf") else "safetensors",
        family=family,
        families=[family],
        parameter_size=size.group(0).upper() if size else "",
        quantization_level=info.weight_types.partition(",")[0],
        context_length=server.max_model_len,
    )


def _capabilities(server: Server) -> list[str]:
    if server.engine.info.task != "generate":
        return ["embedding" if server.engine.info.task == "embed" else "rerank"]
    thinking = ["thinking"] if server.format.reasoning is not None else []
    tools = ["tools"] if server.format.tools is not None else []
    return ["completion", *tools, *thinking, *(["vision"] if server.pictures is not None else [])]


def _parameters(server: Server, name: str) -> str:
    """The sampling defaults, a line for each, in the names of Ollama's options."""
    values: dict[str, Any] = {**DEFAULTS, **server.defaults(name)}
    return "\n".join(
        f"{_OPTION_NAMES.get(key, key):<30} {_quoted(value)}" for key, given in values.items() for value in _each(given)
    )


def _modelfile(name: str, made: Derived | None) -> str:
    """What `ollama create` would make it from."""
    if made is None:
        return f"# Served by Pagoda\nFROM {tagged(name)}\n"
    lines = [f"FROM {tagged(made.parent or name)}"]
    lines += [f"PARAMETER {key} {_quoted(value)}" for key, given in made.options.items() for value in _each(given)]
    lines += [f"SYSTEM {_quoted(made.system)}"] if made.system else []
    lines += [f"MESSAGE {message['role']} {_quoted(message['content'])}" for message in made.messages]
    return "\n".join(lines) + "\n"


def _each(given: Any) -> list[Any]:
    """A parameter that has several values is written once for each."""
    return given if isinstance(given, list) else [given]


def _quoted(value: Any) -> str:
    if not isinstance(value, str):
        return str(value)
    return f'"""{value}"""' if "\n" in value or '"' in value else f'"{value}"'


def _json(reply: Any) -> Response:
    return Response(to_json(reply), media_type=JSON)


def _dressed(server: Server, reply: Response, ignored: list[str]) -> Response:
    server.dress(reply, ignored)
    return reply
