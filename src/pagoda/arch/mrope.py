"""Where the tokens of a prompt with images stand: their temporal, height and width positions (arXiv 2409.12191)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pagoda.arch.vision_spec import Vision
from pagoda.types import Image, Int32


def rope_positions(length: int, images: Sequence[Image], vision: Vision) -> tuple[Int32, int]:
    """The positions [3, length] of a prompt, and what later tokens add to their place for all three.

    Text counts on by one. An image stands behind the text before it: its tokens lie `second_per_grid` apart in time,
    and one in height and width. What follows begins behind the largest position so far, as the models were trained;
    transformers since 5.3 begins behind height and width alone, which after a video of some length is less.
    """
    out = np.empty((3, length), np.int32)
    place, position = 0, 0
    for image in images:
        before = image.start - place
        out[:, place : image.start] = position + np.arange(before)
        place, position = image.start + image.tokens, position + before
        inside = position + _inside(image, vision)
        out[:, image.start : place] = inside
        position = int(inside.max()) + 1
    out[:, place:] = position + np.arange(length - place)
    return out, position - place


def _inside(image: Image, vision: Vision) -> Int32:
    """Positions [3, tokens] of an image's tokens relative to its first."""
    frames, height, width = image.grid[0], image.grid[1] // vision.merge_size, image.grid[2] // vision.merge_size
    if image.tokens != frames * height * width:
        raise ValueError(f"an image of {frames} x {height} x {width} vectors cannot fill {image.tokens} tokens")
    apart = 1.0 if vision.tokens_per_second is None else vision.tokens_per_second * image.second_per_grid
    times = (np.arange(frames, dtype=np.float32) * np.float32(apart)).astype(np.int32)
    grid = np.meshgrid(times, np.arange(height), np.arange(width), indexing="ij")
    return np.stack(grid).reshape(3, -1).astype(np.int32)
