"""POST /api/create and /api/copy: models made of the served one, or of files, with a system prompt and parameters."""

from __future__ import annotations

import asyncio
import re
import time
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pagoda.api.http.body import parse, read_body
from pagoda.api.http.errors import JSON, to_json
from pagoda.api.ollama.blobs import TEMPLATE, files_of
from pagoda.api.ollama.options import NotSupported, message_of, resolve, sampling_fields, unknown_options
from pagoda.api.ollama.protocol import OLLAMA, OllamaCopyBody, OllamaCreateBody, OllamaStatus, line
from pagoda.api.serving.access import check_may_change
from pagoda.api.serving.derived import Derived
from pagoda.api.serving.server import Server
from pagoda.api.turn.bodies import ChatBody
from pagoda.api.turn.sampling import sampling_params
from pagoda.errors import BadRequest

_NAME = re.compile(r"[\w][\w.\-]*(/[\w][\w.\-]*){0,3}(:[\w][\w.\-]*)?", re.ASCII)
MAX_NAME_CHARS = 200
_ANY_LENGTH = 1 << 31  # of a model that is not loaded: what does not fit is said when it is served


async def create(server: Server, request: Request) -> Response:
    body, ignored = parse(await read_body(request), OllamaCreateBody)
    name = _new_name(server, body.model or body.name, "model")
    _refuse(body)
    if body.files:
        lines = await _of_files(server, name, body)
    else:
        _check_from(server, body)
        parent = resolve(server, body.from_)
        server.derived.put(_made(server, name, body, _derived(server, parent)))
        lines = [f"{parent} under the name {name}"]
    done = OllamaStatus(status="success")
    told = b"".join(line(OllamaStatus(status=text)) for text in lines) + line(done)
    reply = Response(told, media_type=OLLAMA.media_type) if body.stream else Response(to_json(done), 200, {}, JSON)
    server.dress(reply, [*ignored, *(f"parameters.{key}" for key in unknown_options(body.parameters))])
    return reply


async def _of_files(server: Server, name: str, body: OllamaCreateBody) -> list[str]:
    """Keep the files under the name; what the model begins with counts when it is served. Gives what to tell."""
    if server.hub is None:
        raise NotSupported("this server keeps no models")
    if server.served.has(name):
        raise BadRequest(
            f"{name!r} is a model that is served here", remedy="Take another name, or delete that one", param="model"
        )
    files = await asyncio.to_thread(files_of, server, body.files or {})
    if body.template:
        await asyncio.to_thread(server.hub.check_template, body.template)
    made = _made(server, name, body, Derived(name="", parent="", created=time.time()))
    texts = {TEMPLATE: body.template} if body.template else {}
    root = await asyncio.to_thread(server.hub.keep, name, files, texts)
    server.derived.keep(made, root)
    return ["reading GGUF", f"to serve it in place of this server's model: pagoda serve {name}"]


def _made(server: Server, name: str, body: OllamaCreateBody, before: Derived) -> Derived:
    """What the body says on top of what there was."""
    messages = before.messages if body.messages is None else [_message(i, m) for i, m in enumerate(body.messages)]
    options = {**before.options, **{key: value for key, value in (body.parameters or {}).items() if value is not None}}
    limits = (_ANY_LENGTH, _ANY_LENGTH) if body.files else (server.max_model_len, server.vocab_size)
    params = _params(options, *limits)
    texts = [body.license] if isinstance(body.license, str) else body.license
    return Derived(
        name=name,
        parent=before.name,
        adapter=before.adapter,
        created=time.time(),
        system=before.system if body.system is None else body.system,
        messages=messages,
        options=options,
        params=params,
        license=before.license if texts is None else "\n".join(texts),
    )


async def copy(server: Server, request: Request) -> Response:
    body, ignored = parse(await read_body(request), OllamaCopyBody)
    name = _new_name(server, body.destination, "destination")
    made = _derived(server, resolve(server, body.source))
    server.derived.put(msgspec.structs.replace(made, name=name, created=time.time()))
    reply = Response(status_code=200)
    server.dress(reply, ignored)
    return reply


async def push(server: Server, request: Request) -> Response:
    raise NotSupported(
        "models are not pushed from here to a registry", remedy="Upload the model's folder with the hub's own tools"
    )


def _params(options: dict[str, Any], max_model_len: int, vocab_size: int) -> dict[str, Any]:
    """The parameters as defaults of sampling. Raises BadRequest for what every request would be refused for."""
    try:
        fields = sampling_fields(options, max_model_len)
        sampling_params(ChatBody(messages=[], **fields), {}, vocab_size)
    except BadRequest as error:
        message = f"parameters: {error.message.removeprefix('options.')}"
        raise BadRequest(message, remedy=error.remedy, param="parameters") from None
    return {key: value for key, value in fields.items() if value is not None}


def _derived(server: Server, name: str) -> Derived:
    """The model of this name as one to make others of."""
    adapter = server.adapters.get(name)
    own = "" if adapter is None else name
    return server.derived.get(name) or Derived(name=name, parent=name, adapter=own, created=time.time())


def _new_name(server: Server, name: str, field: str) -> str:
    check_may_change(server)
    name = name.removesuffix(":latest")
    if len(name) > MAX_NAME_CHARS or not _NAME.fullmatch(name):
        raise BadRequest(
            f"{field} must be a name of letters, digits, '.', '-' and '_', such as my-model or me/my-model:v1",
            param=field,
        )
    return name


def _refuse(body: OllamaCreateBody) -> None:
    if body.files and body.from_:
        raise BadRequest("a model is made from another one or of files, not both", param="files")
    if body.adapters:
        raise BadRequest(
            "adapters: this server takes no files of LoRA adapters",
            remedy="Start it with --lora-modules NAME=PATH, and make models from NAME",
            param="adapters",
        )
    if body.quantize:
        raise BadRequest(
            "quantize: the served model keeps its weights",
            remedy="Start the server with --quantization int8 or int4, or serve a GGUF file of the type you want",
            param="quantize",
        )


def _check_from(server: Server, body: OllamaCreateBody) -> None:
    if not body.from_:
        names = ", ".join(server.served.names)
        raise BadRequest(f"from must name a model that is served here: {names}", param="from")
    own = "" if server.chat_template is None else server.chat_template.source
    if body.template and body.template.strip() != own.strip():
        raise BadRequest(
            "template: a model keeps its own chat template",
            remedy="Leave template out, or start the server with --chat-template FILE (Jinja)",
            param="template",
        )


def _message(index: int, given: dict[str, Any]) -> dict[str, Any]:
    message = message_of(given)
    if message.get("role") not in ("system", "user", "assistant") or not isinstance(message.get("content"), str):
        raise BadRequest(
            f"messages[{index}] needs a role (system, user or assistant) and a content that is a string",
            param="messages",
        )
    return message
