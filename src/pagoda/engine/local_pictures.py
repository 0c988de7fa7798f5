"""Pictures for `LLM`: read in this process, also as objects of Pillow and numpy."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image as pil

from pagoda.engine.seeing import Seeing
from pagoda.errors import BadRequest
from pagoda.media.decode import decode, to_rgb
from pagoda.media.fetch import fetch
from pagoda.media.sources import MEDIA, Source, resolve_data, take_sources
from pagoda.types import Image

_KINDS = {"image": False, "video": True}


class LocalPictures:
    def __init__(self, seeing: Seeing) -> None:
        self._seeing = seeing

    def of_messages(
        self, messages: Sequence[Any], asked: Mapping[str, Any]
    ) -> tuple[list[dict[str, Any]], list[Image]]:
        """The messages with bare parts where pictures were, and these."""
        bare, sources = take_sources([_with_bytes(message) for message in messages])
        return bare, self._read(sources, asked)

    def of_data(
        self,
        data: Mapping[str, Any],
        asked: Mapping[str, Any],
        ids: Sequence[int],
        encode: Callable[[str], list[int]],
    ) -> list[Image]:
        """What vLLM calls `multi_modal_data`: pictures and videos by kind, in the order of their placeholders."""
        left = {}
        for kind, given in data.items():
            if kind not in _KINDS:
                raise BadRequest(f"multi_modal_data: {str(kind)[:40]} is not known; it holds image and video")
            left[kind] = _several(given, video=_KINDS[kind])
        sources = []
        kinds = {self._seeing.vision.placeholder_id: "image", self._seeing.video_id(encode): "video"}
        for token in ids:
            kind = kinds.get(token, "")
            if left.get(kind):
                given = left[kind].pop(0)
                parts = given if isinstance(given, list) else [given]
                sources.append(Source(f"multi_modal_data.{kind}", tuple(map(_as_bytes, parts)), kind == "video"))
        if any(left.values()):
            raise BadRequest("multi_modal_data holds more than the prompt has placeholders for", param="prompts")
        return self._read(sources, asked)

    def place(
        self, ids: list[int], images: Sequence[Image], limit: int, encode: Callable[[str], list[int]]
    ) -> tuple[list[int], list[Image]]:
        ids, placed = self._seeing.place(ids, images, encode)
        self._seeing.check_length(ids, placed, limit)
        return ids, placed

    def _read(self, sources: Sequence[Source], asked: Mapping[str, Any]) -> list[Image]:
        self._seeing.check_count(sources)
        images = []
        for source in sources:
            parts = [self._bytes(source.where, part) for part in source.parts]
            try:
                pixels = decode(self._seeing.task(source, parts, asked))
            except BadRequest as error:
                message = f"{source.where}: the picture can't be used: {error.message}"
                raise BadRequest(message, param="messages") from None
            images.append(self._seeing.image(source, pixels))
        return images

    def _bytes(self, where: str, part: str | bytes) -> bytes:
        found = resolve_data(where, part)
        if isinstance(found, bytes):
            return found
        with ThreadPoolExecutor(1) as pool:  # a notebook has a loop of its own in this thread
            return pool.submit(asyncio.run, fetch(where, found, self._seeing.permission)).result()


def _several(given: Any, *, video: bool) -> list[Any]:
    """The pictures, or the videos, each of which is an array or a list of frames."""
    if video:
        nested = isinstance(given, list | tuple) and given and isinstance(given[0], list | tuple)
        return [_frames(each) for each in (given if nested else [given])]
    return list(given) if isinstance(given, list | tuple) else [given]


def _frames(video: Any) -> list[Any]:
    """The frames of a video; one that is encoded is one part."""
    return [video] if isinstance(video, str | bytes) else list(video)


def _with_bytes(message: Any) -> Any:
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list):
        return message
    return {**message, "content": [_part(part) for part in content]}


def _part(part: Any) -> Any:
    """A part of a message with bytes in the place of objects."""
    if not isinstance(part, Mapping):
        return part
    if part.get("type") == "image_pil":
        return {"type": "image", "image": _as_bytes(part.get("image_pil"))}
    if part.get("type") not in MEDIA:
        return part
    kind = str(part["type"])
    value = part.get(kind)
    if isinstance(value, list | tuple):
        return {**part, kind: [_as_bytes(each) for each in value]}
    return {**part, kind: _as_bytes(value)} if kind in part else part


def _as_bytes(value: Any) -> Any:
    """Pictures of Pillow and numpy in a form without loss; what is something else stays."""
    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8 or value.ndim not in (2, 3):
            raise BadRequest("a picture given as an array must be uint8, [height, width, 3]", param="prompts")
        value = pil.fromarray(value)
    if not isinstance(value, pil.Image):
        return value
    out = io.BytesIO()
    to_rgb(value).save(out, "BMP")
    return out.getvalue()
