"""The images of one request: where its tokens stand, which vectors a step takes, what tells its blocks from others."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import numpy as np

from pagoda.arch.mrope import rope_positions
from pagoda.arch.vision_spec import Vision
from pagoda.types import BLOCK_SIZE, Image, Int32, PlannedImage, Request


class Sight:
    """`delta` is what tokens behind the prompt add to their place to get their three positions."""

    __slots__ = ("_images", "_prompt", "delta")

    def __init__(self, request: Request, vision: Vision) -> None:
        self._images = request.images
        self._prompt, self.delta = rope_positions(len(request.prompt_token_ids), request.images, vision)

    def positions(self, first: int, count: int) -> Int32:
        """[3, count] of the tokens from place `first` on."""
        prompt = self._prompt[:, first : first + count]
        behind = np.arange(first + prompt.shape[1], first + count, dtype=np.int32) + self.delta
        return np.concatenate([prompt, np.broadcast_to(behind, (3, len(behind)))], axis=1, dtype=np.int32)

    def planned(self, first: int, count: int, row: int) -> list[PlannedImage]:
        """Of a step that computes `count` tokens from place `first` on, the first of them in token row `row`."""
        found = []
        for image in self._images:
            begin, end = max(first, image.start), min(first + count, image.start + image.tokens)
            if begin < end:
                found.append(PlannedImage(image, row + begin - first, begin - image.start, end - begin))
        return found

    def next_image(self, first: int) -> Image | None:
        """The first that tokens from place `first` on are part of."""
        return next((image for image in self._images if image.start + image.tokens > first), None)

    def clear(self, first: int, count: int, ready: Callable[[Image], bool]) -> int:
        """How many of `count` tokens from place `first` on can be computed with the images that are encoded."""
        for image in self._images:
            if first < image.start + image.tokens and image.start < first + count and not ready(image):
                return max(0, image.start - first)
        return count


def seen_in_blocks(images: Sequence[Image], first: int) -> dict[int, bytes]:
    """For the block in which an image begins, counted from block `first` on: which image, and where it begins.

    Later blocks are told apart by those before them.
    """
    found: dict[int, bytes] = {}
    for image in images:
        number = image.start // BLOCK_SIZE - first
        if number >= 0:
            place = struct.pack("<q?d", image.start, image.video, image.second_per_grid)
            found[number] = found.get(number, b"") + place + image.digest
    return found
