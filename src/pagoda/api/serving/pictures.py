"""The pictures of one request: fetched, decoded and sized; shared by all routes, so that their limits are too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pagoda.engine.picture_reader import PictureReader
from pagoda.engine.seeing import MAX_SOURCE_PIXELS, Seeing
from pagoda.errors import BadRequest
from pagoda.media.fetch import fetch
from pagoda.media.sources import Source, resolve_data
from pagoda.media.task import Pixels
from pagoda.types import Image


class Pictures:
    """Reads what requests show, by the rules of `seeing`."""

    def __init__(self, seeing: Seeing, reader: PictureReader | None = None) -> None:
        self.seeing = seeing
        self._reader = reader or PictureReader()

    async def read(self, sources: Sequence[Source], asked: Mapping[str, Any], limit: int) -> list[Image]:
        """Raises BadRequest that names the part which is wrong. `limit`: the context's length in tokens."""
        self.seeing.check_count(sources)
        self.seeing.sizing.lowered(asked)
        images = []
        source_pixels = 0
        for source in sources:
            pixels = await self._pixels(source, asked)
            source_pixels += pixels.source_pixels
            if source_pixels > MAX_SOURCE_PIXELS:
                raise BadRequest(
                    f"the pictures have more than {MAX_SOURCE_PIXELS // 1_000_000} million pixels together",
                    param="messages",
                )
            images.append(self.seeing.image(source, pixels))
            self.seeing.check_taken(images, len(sources), limit)
        return images

    async def _pixels(self, source: Source, asked: Mapping[str, Any]) -> Pixels:
        parts = []
        for part in source.parts:
            found = resolve_data(source.where, part)
            parts.append(await fetch(source.where, found, self.seeing.permission) if isinstance(found, str) else found)
        try:
            return await self._reader.read(self.seeing.task(source, parts, asked))
        except BadRequest as error:
            raise BadRequest(f"{source.where}: the picture can't be used: {error.message}", param="messages") from None

    def close(self) -> None:
        self._reader.close()
