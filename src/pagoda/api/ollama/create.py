"""POST /api/create and /api/copy: the served model under more names, each with a system prompt and parameters."""

from __future__ import annotations

import re
import time
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pagoda.api.http.body import parse, read_body
from pagoda.api.http.errors import JSON, to_json
from pagoda.api.ollama.options import NotSupported, message_of, resolve, sampling_fields, unknown_options
from pagoda.api.ollama.protocol import OLLAMA, OllamaCopyBody, OllamaCreateBody, OllamaStatus, line
from pagoda.api.serving.access import check_may_change
from pagoda.api.serving.derived import Derived
from pagoda.api.serving.server import Server
from pagoda.api.turn.bodies import ChatBody
from pagoda.api.turn.sampling import sampling_params
from pagoda.errors import BadRequest, NotFound

_NAME = re.compile(r"[\w][\w.\-]*(/[\w][\w.\-]*){0,3}(:[\w][\w.\-]*)?", re.ASCII)
MAX_NAME_CHARS = 200
_NO_FILES = "this server takes no model files, it serves the one it was started with"
_FILES_CURE = "Put the file on the server's machine and type pagoda serve FILE.gguf"


async def create(server: Server, request: Request) -> Response:
    body, ignored = parse(await read_body(request), OllamaCreateBody)
    name = _new_name(server, body.model or body.name, "model")
    _refuse(server, body)
    parent = resolve(server, body.from_)
    before = _derived(server, parent)
    messages = before.messages if body.messages is None else [_message(i, m) for i, m in enumerate(body.messages)]
    options = {**before.options, **{key: value for key, value in (body.parameters or {}).items() if value is not None}}
    params = _params(server, options)
    texts = [body.license] if isinstance(body.license, str) else body.license
    made = Derived(
        name=name,
        parent=parent,
        adapter=before.adapter,
        created=time.time(),
        system=before.system if body.system is None else body.system,
        messages=messages,
        options=options,
        params=params,
        license=before.license if texts is None else "\n".join(texts),
    )
    server.derived.put(made)
    done = OllamaStatus(status="success")
    lines = line(OllamaStatus(status=f"{parent} under the name {name}")) + line(done)
    reply = Response(lines, media_type=OLLAMA.media_type) if body.stream else Response(to_json(done), 200, {}, JSON)
    server.dress(reply, [*ignored, *(f"parameters.{key}" for key in unknown_options(body.parameters))])
    return reply


async def copy(server: Server, request: Request) -> Response:
    body, ignored = parse(await read_body(request), OllamaCopyBody)
    name = _new_name(server, body.destination, "destination")
    made = _derived(server, resolve(server, body.source))
    server.derived.put(msgspec.structs.replace(made, name=name, created=time.time()))
    reply = Response(status_code=200)
    server.dress(reply, ignored)
    return reply


async def has_blob(server: Server, request: Request) -> Response:
    raise NotFound("no file with this digest is here")


async def take_blob(server: Server, request: Request) -> Response:
    raise NotSupported(_NO_FILES, remedy=_FILES_CURE)


async def push(server: Server, request: Request) -> Response:
    raise NotSupported(
        "models are not pushed from here to a registry", remedy="Upload the model's folder with the hub's own tools"
    )


def _params(server: Server, options: dict[str, Any]) -> dict[str, Any]:
    """The parameters as defaults of sampling. Raises BadRequest for what every request would be refused for."""
    try:
        fields = sampling_fields(options, server.max_model_len)
        sampling_params(ChatBody(messages=[], **fields), {}, server.vocab_size)
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


def _refuse(server: Server, body: OllamaCreateBody) -> None:
    if body.files:
        raise BadRequest(f"files: {_NO_FILES}", remedy=_FILES_CURE, param="files")
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
