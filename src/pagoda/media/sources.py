"""Pictures and videos among the parts of messages, in all the forms that clients send them."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes

from pagoda.errors import BadRequest
from pagoda.media.task import MAX_FRAMES

_PICTURES = ("image_url", "input_image", "image")
_VIDEOS = ("video_url", "video")
MEDIA = (*_PICTURES, *_VIDEOS)
_VALUES = ("image_url", "video_url", "image", "video", "url", "base64", "data")
_MAX_PLAIN_CHARS = 1 << 16
_BLANKS = b" \t\n\r\v\f"
_FORMS = "a data: URI with base64, or an http(s) URL"


@dataclass(frozen=True, slots=True)
class Source:
    """One picture, or one video: where to get it, or its bytes; the frames of a video may be several of these.

    `where` is its place in the request. `low`: little detail is asked for.
    """

    where: str
    parts: tuple[str | bytes, ...]
    video: bool = False
    low: bool = False


def take_sources(messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[Source]]:
    """The messages with bare parts in the places of pictures and videos, and these, in their order."""
    sources: list[Source] = []
    out = []
    for m, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        if not isinstance(content, list):
            out.append(message)
            continue
        parts = []
        for p, part in enumerate(content):
            source = _source(f"messages[{m}].content[{p}]", part)
            if source is not None:
                sources.append(source)
                part = {"type": "video" if source.video else "image"}
            parts.append(part)
        out.append({**message, "content": parts})
    return [dict(message) if isinstance(message, Mapping) else message for message in out], sources


def has_media(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a picture or a video is among the parts."""
    contents = [message.get("content") for message in messages if isinstance(message, Mapping)]
    return any(_is_media(part) for content in contents if isinstance(content, list) for part in content)


def _is_media(part: object) -> bool:
    return isinstance(part, Mapping) and part.get("type") in MEDIA


def _source(where: str, part: Any) -> Source | None:
    if not _is_media(part):
        return None
    kind = part["type"]
    video = kind in _VIDEOS
    value, detail = _value(part), part.get("detail")
    if isinstance(value, Mapping):
        detail = value.get("detail", detail)
        value = _value(value) if kind != "image" or "source" not in part else _anthropic(where, value)
    if video and isinstance(value, list):
        if not value:
            raise BadRequest(f"{where}: the list of frames is empty", param="messages")
        _check_frames(where, len(value))
        return Source(where, tuple(_one(where, _inner(each)) for each in value), True, detail == "low")
    found = _one(where, value)
    if isinstance(found, str) and _is_data(found):
        return Source(where, tuple(from_data_uri(where, found, frames=video)), video, detail == "low")
    return Source(where, (found,), video, detail == "low")


def _value(part: Mapping[str, Any]) -> Any:
    source = part.get("source")
    if source is not None:
        return source
    return next((part[name] for name in _VALUES if part.get(name) is not None), None)


def _inner(value: Any) -> Any:
    """A frame may be written as a URL, or as a part."""
    return _inner(_value(value)) if isinstance(value, Mapping) else value


def _anthropic(where: str, source: Mapping[str, Any]) -> Any:
    kind = source.get("type")
    if kind == "base64" and isinstance(source.get("data"), str):
        return from_base64(where, source["data"])
    if kind == "url":
        return source.get("url")
    raise BadRequest(
        f'{where}.source must be {{"type": "base64", "media_type": ..., "data": ...}} or {{"type": "url", "url": ...}}',
        param="messages",
    )


def _one(where: str, value: Any) -> str | bytes:
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value.strip():
        raise BadRequest(f"{where} must hold {_FORMS}", param="messages")
    return value.strip()


def _is_data(url: str) -> bool:
    return url[:5].lower() == "data:"


def resolve_data(where: str, part: str | bytes) -> str | bytes:
    """The bytes of a data: URI; what is something else stays as it is."""
    return from_data_uri(where, part)[0] if isinstance(part, str) and _is_data(part) else part


def from_data_uri(where: str, uri: str, *, frames: bool = False) -> list[bytes]:
    """The bytes in a data: URI. With `frames`, those of video/jpeg are several pictures with commas between."""
    head, comma, data = uri[5:].partition(",")
    if not comma:
        raise BadRequest(f"{where}: a data: URI is written data:image/png;base64,...", param="messages")
    if not head.lower().endswith(";base64"):
        if len(data) > _MAX_PLAIN_CHARS:  # many escapes take long
            raise BadRequest(f"{where}: a data: URI as large as this must be in base64", param="messages")
        return [unquote_to_bytes(data)]
    parts = [data]
    if frames and head.lower().startswith("video/jpeg"):
        _check_frames(where, data.count(",") + 1)
        parts = data.split(",")
    return [from_base64(where, each) for each in parts]


def _check_frames(where: str, count: int) -> None:
    """Before any of them is fetched or decoded."""
    if count > MAX_FRAMES:
        raise BadRequest(f"{where} holds {count} frames; at most {MAX_FRAMES} are taken", param="messages")


def from_base64(where: str, text: str) -> bytes:
    """The bytes; line breaks and missing padding are forgiven, anything else is not."""
    packed = text.encode("ascii", "replace").translate(None, _BLANKS)
    packed += b"=" * (-len(packed) % 4)
    try:
        data = base64.b64decode(packed, altchars=b"-_" if b"-" in packed or b"_" in packed else None, validate=True)
    except (binascii.Error, ValueError):
        raise BadRequest(f"{where} is not valid base64", param="messages") from None
    if not data:
        raise BadRequest(f"{where} is empty", param="messages")
    return data
