"""The pictures of one request: fetched, decoded and sized; shared by all routes, so that their limits are too."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any

from pagoda.api.http.room import Place, Room
from pagoda.engine.picture_reader import PictureReader
from pagoda.engine.seeing import MAX_SOURCE_PIXELS, Seeing
from pagoda.errors import BadRequest
from pagoda.media.fetch import fetch
from pagoda.media.sources import Source, resolve_data
from pagoda.media.task import Pixels
from pagoda.types import Image

MAX_FETCHED_BYTES = 64 << 20
"""Of one picture or, with all its frames, one video."""
MAX_READ_BYTES = 1 << 30
"""Of the decoded pictures of all requests of which not all are decoded yet; then they are counted as accepted."""
MAX_FETCHES = 32
FETCHES_S = 120.0
"""For all that one request has fetched: its client may be gone."""


class Pictures:
    """Reads what requests show, by the rules of `seeing`."""

    def __init__(self, seeing: Seeing, reader: PictureReader | None = None) -> None:
        self.seeing = seeing
        self._reader = reader or PictureReader()
        self._room = Room(MAX_READ_BYTES)
        self._places = asyncio.Semaphore(MAX_FETCHES)

    async def read(self, sources: Sequence[Source], asked: Mapping[str, Any], limit: int) -> list[Image]:
        """Raises BadRequest that names the part which is wrong. `limit`: the context's length in tokens."""
        self.seeing.check_count(sources)
        self.seeing.sizing.lowered(asked)
        with self._room.place() as place:
            return await self._read(sources, asked, limit, place)

    async def _read(self, sources: Sequence[Source], asked: Mapping[str, Any], limit: int, place: Place) -> list[Image]:
        images: list[Image] = []
        source_pixels = 0
        until = asyncio.get_running_loop().time() + FETCHES_S
        for source in sources:
            pixels = await self._pixels(source, asked, until)
            source_pixels += pixels.source_pixels
            if source_pixels > MAX_SOURCE_PIXELS:
                raise BadRequest(
                    f"the pictures have more than {MAX_SOURCE_PIXELS // 1_000_000} million pixels together",
                    param="messages",
                )
            images.append(self.seeing.image(source, pixels))
            place.take(len(images[-1].pixels))
            self.seeing.check_taken(images, len(sources), limit)
        return images

    async def _pixels(self, source: Source, asked: Mapping[str, Any], until: float) -> Pixels:
        async with AsyncExitStack() as held:
            parts = [resolve_data(source.where, part) for part in source.parts]
            whole = [part for part in parts if isinstance(part, bytes)]
            if len(whole) < len(parts):  # what was fetched is in memory until it is decoded
                whole = await self._fetched(source.where, parts, until, held)
            try:
                return await self._reader.read(self.seeing.task(source, whole, asked))
            except BadRequest as error:
                message = f"{source.where}: the picture can't be used: {error.message}"
                raise BadRequest(message, param="messages") from None

    async def _fetched(
        self, where: str, parts: Sequence[str | bytes], until: float, held: AsyncExitStack
    ) -> list[bytes]:
        """All parts, with what is elsewhere fetched; `held` holds its place among those that fetch."""
        whole: list[bytes] = []
        size_bytes = 0
        try:
            async with asyncio.timeout_at(until):
                await held.enter_async_context(self._places)
                for part in parts:
                    data = await fetch(where, part, self.seeing.permission) if isinstance(part, str) else part
                    whole.append(data)
                    size_bytes += len(data)
                    if size_bytes > MAX_FETCHED_BYTES:
                        most = f"{MAX_FETCHED_BYTES >> 20} MiB"
                        raise BadRequest(f"{where}: its frames are larger than {most} together", param="messages")
        except TimeoutError:
            raise BadRequest(
                f"{where}: the URL cannot be fetched: those of one request may take {FETCHES_S:g} s together",
                remedy="Send the pictures themselves, as data: URIs",
                param="messages",
            ) from None
        return whole

    def close(self) -> None:
        self._reader.close()
