"""Ollama's requests as a ChatBody: names of its options, its defaults, its messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pagoda.api.ollama.protocol import OllamaCall
from pagoda.api.serving.server import Server
from pagoda.api.turn.bodies import ChatBody
from pagoda.api.turn.sampling import sampling_params
from pagoda.errors import BadRequest, ModelNotFound, PagodaError
from pagoda.types import SamplingParams

DEFAULTS = {"temperature": 0.8, "top_k": 40, "top_p": 0.9}
"""Ollama's own, for what the model's files say nothing about."""

_FLOATS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "min_p": "min_p",
    "repeat_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}
_INTEGERS = {"top_k": "top_k", "seed": "seed", "num_predict": "max_tokens"}
_OTHERS = ("stop", "num_ctx")


class NotSupported(PagodaError):
    """A route that clients know, for what this server cannot do."""

    status = 501
    code = "not_supported"
    type = "BadRequestError"


def resolve(server: Server, name: str | None) -> str:
    """The served name that is meant. Raises ModelNotFound in the words that Ollama's clients look for."""
    try:
        return server.served.resolve(name)
    except ModelNotFound:
        raise not_found(name or "", server.served.names) from None


def not_found(name: str, names: Sequence[str]) -> ModelNotFound:
    return ModelNotFound(f"model '{name[:200]}' not found, served here: {', '.join(names)}", param="model")


def chat_body(server: Server, call: OllamaCall, messages: list[dict[str, Any]], tools: Any = None) -> ChatBody:
    """The call as /v1/chat/completions would get it. Raises BadRequest for what cannot be honoured."""
    return ChatBody(
        model=call.model,
        messages=[message_of(message) for message in messages],
        tools=tools or None,
        think=call.think,
        reasoning_effort=call.think if isinstance(call.think, str) else None,
        response_format=_response_format(call.format),
        logprobs=call.logprobs or bool(call.top_logprobs),
        top_logprobs=call.top_logprobs,
        **sampling_fields(call.options or {}, server.max_model_len),
    )


def params_of(server: Server, body: ChatBody) -> SamplingParams:
    return sampling_params(body, {**DEFAULTS, **server.defaults(body.model)}, server.vocab_size)


def ignored_options(call: OllamaCall) -> list[str]:
    return [f"options.{name}" for name in unknown_options(call.options)]


def unknown_options(options: Mapping[str, Any] | None) -> list[str]:
    """Those that have a value and no effect here."""
    known = {*_FLOATS, *_INTEGERS, *_OTHERS}
    return [name for name, value in (options or {}).items() if value is not None and name not in known]


def sampling_fields(options: Mapping[str, Any], max_model_len: int) -> dict[str, Any]:
    """What a ChatBody calls them. Raises BadRequest for a value that is none."""
    values: dict[str, Any] = {}
    for name, ours in {**_FLOATS, **_INTEGERS}.items():
        if (given := _number(options, name)) is not None:
            values[ours] = int(given) if name in _INTEGERS else float(given)
    if values.get("max_tokens", 1) <= 0:  # -1 and -2: as many as there is room for
        del values["max_tokens"]
    if values.get("seed", 0) < 0:
        del values["seed"]
    stop = options.get("stop")
    if stop is not None and not _is_stop(stop):
        raise BadRequest("options.stop must be a string or a list of strings", param="options")
    num_ctx = _number(options, "num_ctx")
    if num_ctx is not None and num_ctx > max_model_len:
        raise BadRequest(
            f"options.num_ctx asks for {num_ctx:g} tokens of context, but this server has {max_model_len}",
            remedy="Send a smaller one or none, or start the server with a larger --max-model-len",
            param="options",
        )
    return {**values, "stop": stop}


def _number(options: Mapping[str, Any], name: str) -> float | None:
    given = options.get(name)
    if given is None:
        return None
    if isinstance(given, bool) or not isinstance(given, int | float):
        raise BadRequest(f"options.{name} must be a number", param="options")
    if name not in _FLOATS and (given != given // 1 or abs(given) >= 2**64):
        raise BadRequest(f"options.{name} must be an integer", param="options")
    return given


def _is_stop(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(each, str) for each in value))


def _response_format(given: str | dict[str, Any] | None) -> dict[str, Any] | None:
    if not given:
        return None
    if isinstance(given, dict):
        return {"type": "json_schema", "json_schema": {"name": "format", "schema": given}}
    if given != "json":
        raise BadRequest('format must be "json" or a JSON schema', param="format")
    return {"type": "json_object"}


def message_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """One message without what only Ollama knows. The name of a tool is called `name` elsewhere."""
    message = {name: value for name, value in given.items() if name not in ("images", "tool_name")}
    if isinstance(given.get("tool_name"), str):
        message.setdefault("name", given["tool_name"])
    if given.get("images"):
        message["content"] = _with_images(given["images"], message.get("content"))
    return message


def _with_images(images: Any, content: Any) -> list[Any]:
    """The content's parts behind those of its pictures, which come as base64, or as a data: URI or a URL."""
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise BadRequest("images must be a list of pictures in base64", param="images")
    urls = [image if ":" in image[:8] else f"data:;base64,{image}" for image in images]
    parts = [{"type": "image_url", "image_url": url} for url in urls]
    return [*parts, *(content if isinstance(content, list) else [{"type": "text", "text": content or ""}])]
