"""Puts pictures into a prompt: each placeholder of the chat template becomes as many tokens as its picture takes."""

from __future__ import annotations

from collections.abc import Sequence

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
    )


def place(
    ids: Sequence[int], images: Sequence[Image], image_token_id: int, video_token_id: int
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
        if token in kinds:
            image = next(left)
            placed.append(msgspec.structs.replace(image, start=len(out)))
            out += [token] * image.tokens
        else:
            out.append(token)
    return out, placed
