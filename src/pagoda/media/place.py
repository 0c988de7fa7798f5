"""Puts pictures into a prompt: each placeholder of the chat template becomes as many tokens as its picture takes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import msgspec

from pagoda.errors import BadRequest
from pagoda.media.size import Sizing
from pagoda.media.task import FRAMES_PER_S, Pixels
from pagoda.types import Image


def image_of(pixels: Pixels, sizing: Sizing, *, video: bool) -> Image:
    """As the model takes it, without a place yet."""
    grid = sizing.grid(pixels.width, pixels.height, pixels.frames)
    return Image(
        start=-1,
        tokens=sizing.tokens(grid),
        grid=grid,
        pixels=pixels.data,
        digest=pixels.digest,
        video=video,
        second_per_grid=sizing.temporal_patch_size / FRAMES_PER_S if video else 1.0,
        repeated=pixels.repeated,
    )


class Times(NamedTuple):
    """How a model is shown a video: groups of so many frames between two tokens, each behind its time as text."""

    together: int
    begin: int
    end: int
    encode: Callable[[str], list[int]]


def place(
    ids: Sequence[int], images: Sequence[Image], image_token_id: int, video_token_id: int, times: Times | None = None
) -> tuple[list[int], list[Image]]:
    """The prompt with room for each picture, and the pictures with their places.

    Raises BadRequest unless the template has shown each of them once, and in their order.
    """
    kinds = {image_token_id: False, video_token_id: True}
    shown = [kinds[token] for token in ids if token in kinds]
    if shown != [image.video for image in images]:
        raise BadRequest(
            f"the model's chat template has places for {len(shown)} pictures, but {len(images)} were sent",
            remedy="Send pictures in messages of the user",
            param="messages",
        )
    out: list[int] = []
    placed = []
    left = iter(images)
    for token in ids:
        if token not in kinds:
            out.append(token)
            continue
        image = next(left)
        if not image.video or times is None:
            placed.append(msgspec.structs.replace(image, start=len(out)))
            out += [token] * image.tokens
            continue
        for time_s, group in _groups(image, times.together):
            out += [*times.encode(f"<{time_s:.1f} seconds>"), times.begin]
            placed.append(msgspec.structs.replace(group, start=len(out)))
            out += [token] * group.tokens + [times.end]
    return out, placed


def _groups(video: Image, together: int) -> Iterator[tuple[float, Image]]:
    """Each group of frames as a video of its own, and the middle of the times that it is shown at."""
    count, rows, columns = video.grid
    each, last = len(video.pixels) // count, count * together - 1 - video.repeated
    for i in range(count):
        first = i * together
        middle = (first + min(first + together - 1, last)) / 2
        group = msgspec.structs.replace(
            video,
            tokens=video.tokens // count,
            grid=(1, rows, columns),
            pixels=video.pixels[i * each : (i + 1) * each],
            digest=hashlib.blake2b(video.digest + i.to_bytes(4, "little"), digest_size=16).digest(),
            repeated=0,
        )
        yield middle * video.second_per_grid / together, group
