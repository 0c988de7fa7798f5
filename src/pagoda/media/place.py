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


class Frame(NamedTuple):
    """How a model is shown a picture: its tokens; with `ends` between these two, and a blank line around them."""

    tokens: Callable[[Image], list[int]]
    ends: tuple[int, int] | None
    encode: Callable[[str], list[int]]


def place(
    ids: Sequence[int],
    images: Sequence[Image],
    image_token_id: int,
    video_token_id: int | None,
    times: Times | None = None,
    frame: Frame | None = None,
) -> tuple[list[int], list[Image]]:
    """The prompt with room for each picture, and the pictures with their places.

    Raises BadRequest unless the template has shown each of them once, and in their order.
    """
    kinds = {image_token_id: False} | ({} if video_token_id is None else {video_token_id: True})
    shown = [kinds[token] for token in ids if token in kinds]
    if shown != [image.video for image in images]:
        raise BadRequest(
            f"the model's chat template has places for {len(shown)} pictures, but {len(images)} were sent",
            remedy="Send pictures in messages of the user",
            param="messages",
        )
    out: list[int] = []
    placed: list[Image] = []
    left = iter(images)
    breaks = _breaks(frame) if frame is not None and frame.ends is not None and images else {}
    for token in ids:
        if token not in kinds:
            if token in breaks and out and out[-1] in breaks and placed:
                _add_breaks(out, breaks[token], breaks, frame)
            else:
                out.append(token)
            continue
        image = next(left)
        if frame is not None and not image.video:
            placed.append(_add_framed(out, image, breaks, frame))
            continue
        if not image.video or times is None:
            placed.append(msgspec.structs.replace(image, start=len(out)))
            out += [token] * image.tokens
            continue
        for time_s, group in _groups(image, times.together):
            out += [*times.encode(f"<{time_s:.1f} seconds>"), times.begin]
            placed.append(msgspec.structs.replace(group, start=len(out)))
            out += [token] * group.tokens + [times.end]
    return out, placed


_MOST_BREAKS = 31


def _breaks(frame: Frame) -> dict[int, int]:
    """The tokens that are line breaks alone, and how many each is."""
    found = {count: frame.encode("\n" * count) for count in range(1, _MOST_BREAKS + 1)}
    return {ids[0]: count for count, ids in found.items() if len(ids) == 1}


def _add_framed(out: list[int], image: Image, breaks: dict[int, int], frame: Frame) -> Image:
    """The picture with its place, and its tokens; between its ends and line breaks where it has ends."""
    if frame.ends is not None:
        _add_breaks(out, 2, breaks, frame)
        out.append(frame.ends[0])
    placed = msgspec.structs.replace(image, start=len(out))
    out += frame.tokens(image)
    if frame.ends is not None:
        out.append(frame.ends[1])
        _add_breaks(out, 2, breaks, frame)
    return placed


def _add_breaks(out: list[int], count: int, breaks: dict[int, int], frame: Frame | None) -> None:
    """So many line breaks more, cut into tokens together with those that stand there."""
    while out and out[-1] in breaks:
        count += breaks[out.pop()]
    out += frame.encode("\n" * count) if frame is not None else []


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
