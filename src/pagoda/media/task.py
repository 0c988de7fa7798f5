"""What is asked of the decoder of pictures, and what it gives; it may run in a process of its own."""

from __future__ import annotations

import importlib.util

import msgspec

from pagoda.errors import ConfigError
from pagoda.media.size import Sizing

TOO_MUCH = "it takes too long or too much memory to decode"
MAX_FRAMES = 128
"""Of one video."""
FRAMES_PER_S = 2.0
"""At which videos are looked at, and which frames without times are taken to have."""


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What to decode: one picture; or a video, as frames that are a picture each, or as one animation."""

    parts: list[bytes]
    sizing: Sizing
    video: bool = False


class Pixels(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """RGB, uint8, [frames, height, width, 3]. `source_pixels`: how many were decoded to make them.

    `digest` is over the kind, the shape and the pixels. `repeated`: of the last frames, how many only fill up a group.
    `tiles`: rows and columns that a picture was cut into, which are frames then; behind several comes the whole.
    """

    data: bytes
    digest: bytes
    frames: int
    height: int
    width: int
    source_pixels: int
    repeated: int = 0
    tiles: tuple[int, int] = (1, 1)


class Failed(msgspec.Struct, frozen=True, tag=True):
    """What is wrong with a picture, in our own words: a decoder's may hold paths and addresses."""

    error: str


def need_pillow() -> None:
    """Raise ConfigError where Pillow is not installed."""
    if importlib.util.find_spec("PIL") is None:
        raise ConfigError(
            "this model sees pictures, and Pillow, which decodes them, is not installed",
            remedy="Run: pip install 'pagoda-llm[vision]'",
        )
