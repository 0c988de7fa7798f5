"""From the bytes of a request to a typed struct: size, time, depth and type limits, with errors that name the field."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request

from pagoda.api.http.room import Place
from pagoda.errors import BadRequest, PagodaError, TooLarge

MAX_BODY_BYTES = 32 << 20
MAX_BODIES_BYTES = 1 << 30
"""Of all requests that are being read or worked on; those that stream are accepted by then, and counted apart."""
PLACE = "pagoda.place"
MAX_DEPTH = 64
MAX_KEYS = 10_000
FIRST_BYTE_S = 30.0
SLOWEST_BYTES_PER_S = 100_000.0
DROPPED_S, DROPPED_BYTES = 5.0, 256 << 20
"""How much of a body that is too large is still taken, and dropped."""

T = TypeVar("T", bound=msgspec.Struct)

_EXPECTED = re.compile(r"Expected `([^`]*)`, got `([^`]*)`(?: - at `\$\.?([^`]*)`)?")
_MISSING = re.compile(r"Object missing required field `([^`]*)`(?: - at `\$\.?([^`]*)`)?")
_WORDS = {
    "float": "a number",
    "int": "an integer",
    "str": "a string",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}


class RequestTimeout(PagodaError):
    """The client was too slow to send its request."""

    status = 408
    code = "request_timeout"
    type = "BadRequestError"


class ClientGone(Exception):
    """The client closed the connection; there is nobody left to answer."""


async def read_body(request: Request) -> bytes:
    """The whole body. Raises TooLarge, RequestTimeout or Overloaded as soon as one of them is certain."""
    place: Place | None = request.scope.get(PLACE)
    parts = []
    async for part in stream_body(request, MAX_BODY_BYTES):
        if place is not None:
            place.take(len(part))
        parts.append(part)
    return b"".join(parts)


async def stream_body(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """The body in parts, as they arrive."""
    claimed = request.headers.get("content-length", "")
    if claimed.isdigit() and (len(claimed) > 12 or int(claimed) > max_bytes):
        if len(claimed) <= 12 and int(claimed) <= DROPPED_BYTES and "expect" not in request.headers:
            await _drop(request)
        raise _too_large(max_bytes)
    size = 0
    start = asyncio.get_running_loop().time()
    while True:
        try:
            async with asyncio.timeout_at(start + FIRST_BYTE_S + size / SLOWEST_BYTES_PER_S):
                message = await request.receive()
        except TimeoutError:
            raise RequestTimeout("the request's body did not arrive in time") from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        size += len(part)
        if size > max_bytes:
            if message.get("more_body", False):
                await _drop(request)
            raise _too_large(max_bytes)
        yield part
        if not message.get("more_body", False):
            return


async def _drop(request: Request) -> None:
    """Take what still comes: most clients send all before they read, and a closed connection would hide the answer."""
    size = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(DROPPED_S):
            while size < DROPPED_BYTES:
                message = await request.receive()
                size += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(f"the request's body is over the limit of {max_bytes >> 20} MiB")


def parse(body: bytes, kind: type[T]) -> tuple[T, list[str]]:
    """The struct in `body`, and the names of the fields that `kind` does not know."""
    raw = _decode(body, kind)
    if not isinstance(raw, dict):
        raise BadRequest(f"the body must be a JSON object, got {_word(_json_type(raw))}")
    _check_nesting(raw)
    given = {name: value for name, value in raw.items() if value is not None}
    known = kind.__struct_encode_fields__
    try:
        parsed = _convert(given, kind)
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from None
    return parsed, [name for name in raw if name not in known]


def _convert(given: dict[str, Any], kind: type[T]) -> T:
    """The struct; numbers and booleans that a form or a template wrote as text ("0.7", "true") count, as for vLLM."""
    try:
        return msgspec.convert(given, kind, strict=True)
    except msgspec.ValidationError as error:
        try:
            return msgspec.convert(given, kind, strict=False)
        except msgspec.ValidationError:
            raise error from None


def _decode(body: bytes, kind: type[T]) -> Any:
    try:
        return msgspec.json.decode(body)
    except RecursionError:
        raise _too_deep() from None
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body is not valid UTF-8 at byte {error.start} of a string") from None
    except msgspec.ValidationError:
        pass
    except msgspec.DecodeError as error:
        raise BadRequest(f"the body is not valid JSON: {_malformed(body, str(error))}") from None
    # A number that no type can hold: only the typed decoder knows in which field it stood.
    try:
        msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        found = re.search(r"at `\$\.?([^`]*)`", str(error))
        name = _top(found.group(1)) if found else ""
        raise BadRequest(f"{name or 'a value'} holds a number that is out of range", param=name or None) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    raise BadRequest("the body holds a number that is out of range")


def _malformed(body: bytes, text: str) -> str:
    if not body.strip():
        return "it is empty"
    if body.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        return "it must be UTF-8 without a byte order mark"
    if "truncated" in text:
        return "it ends too early, or holds half of a surrogate pair"
    return text.removeprefix("JSON is malformed: ")


def _check_nesting(raw: dict[str, Any]) -> None:
    level: list[Any] = [raw]
    for _ in range(MAX_DEPTH):
        if any(type(item) is dict and len(item) > MAX_KEYS for item in level):
            raise BadRequest(f"an object in the body has more than {MAX_KEYS} keys")
        level = [
            child
            for item in level
            for child in (item.values() if type(item) is dict else item)
            if type(child) is dict or type(child) is list
        ]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> BadRequest:
    return BadRequest(f"the body is nested deeper than {MAX_DEPTH} levels")


def _explain(text: str) -> BadRequest:
    if found := _EXPECTED.match(text):
        wanted, got, path = found.groups()
        path = path or "the body"
        words = [_word(kind) for kind in wanted.split(" | ") if kind != "null"]
        return BadRequest(f"{path} must be {' or '.join(words)}, got {_word(got)}", param=_top(path))
    if found := _MISSING.match(text):
        name, path = found.groups()
        where = f"{path}.{name}" if path else name
        return BadRequest(f"{where} is required", param=_top(where))
    found = re.search(r"at `\$\.?([^`]*)`", text)
    name = _top(found.group(1)) if found else ""
    return BadRequest(f"{name or 'the body'} has a value that is not allowed", param=name or None)


def _word(kind: str) -> str:
    return _WORDS.get(kind, kind)


def _top(path: str) -> str:
    return re.split(r"[.\[]", path, maxsplit=1)[0]


def _json_type(value: Any) -> str:
    names = {bool: "bool", int: "int", float: "float", str: "str", list: "array", type(None): "null"}
    return names.get(type(value), "object")
