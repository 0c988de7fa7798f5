"""Puts pictures into a prompt: each placeholder of the chat template becomes what its model is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import msgspec

from pagoda.errors import BadRequest
from pagoda.media.size import Sizing
from pagoda.media.task import FRAMES_PER_S, Pixels
from pagoda.types import Image

Tokens = Callable[[Image], list[int]]
"""Of a picture those that its vectors take the places of, and those between them."""
Show = Callable[[Image], Iterable[Image | list[int]]]
"""The parts that a picture or a video is shown as, and the tokens around them."""


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
        tiles=pixels.tiles,
    )


class Ends(NamedTuple):
    """What a picture stands between: these two tokens, and a blank line around them."""

    begin: int
    end: int
    encode: Callable[[str], list[int]]


def place(
    ids: Sequence[int],
    images: Sequence[Image],
    image_token_id: int,
    video_token_id: int | None,
    tokens: Tokens,
    show: Show | None = None,
    ends: Ends | None = None,
) -> tuple[list[int], list[Image]]:
    """The prompt with room for each picture, and the pictures, or the parts that they are shown as, with their places.

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
    breaks = _breaks(ends) if ends is not None and images else {}
    for token in ids:
        if token not in kinds:
            if ends is not None and token in breaks and out and out[-1] in breaks and placed:
                _add_breaks(out, breaks[token], breaks, ends)
            else:
                out.append(token)
            continue
        image = next(left)
        if ends is not None:
            placed.append(_add_between(out, image, breaks, ends, tokens))
            continue
        for part in [image] if show is None else show(image):
            if isinstance(part, Image):
                placed.append(msgspec.structs.replace(part, start=len(out)))
                out += tokens(part)
            else:
                out += part
    return out, placed


_MOST_BREAKS = 31


def _breaks(ends: Ends) -> dict[int, int]:
    """The tokens that are line breaks alone, and how many each is."""
    found = {count: ends.encode("\n" * count) for count in range(1, _MOST_BREAKS + 1)}
    return {ids[0]: count for count, ids in found.items() if len(ids) == 1}


def _add_between(out: list[int], image: Image, breaks: dict[int, int], ends: Ends, tokens: Tokens) -> Image:
    """The picture with its place, and its tokens between its ends and line breaks."""
    _add_breaks(out, 2, breaks, ends)
    out.append(ends.begin)
    placed = msgspec.structs.replace(image, start=len(out))
    out += [*tokens(image), ends.end]
    _add_breaks(out, 2, breaks, ends)
    return placed


def _add_breaks(out: list[int], count: int, breaks: dict[int, int], ends: Ends) -> None:
    """So many line breaks more, cut into tokens together with those that stand there."""
    while out and out[-1] in breaks:
        count += breaks[out.pop()]
    out += ends.encode("\n" * count)
