"""The images of one request: where its tokens stand, which vectors a step takes, what tells its blocks from others."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

import numpy as np

from pagoda.arch.mrope import rope_positions
from pagoda.arch.vision_spec import Vision
from pagoda.types import BLOCK_SIZE, Image, Int32, PlannedImage, Request


class Sight:
    """`delta` is what tokens behind the prompt add to their place to get their three positions, where they have such.

    Where the tokens of an image see each other a step takes them up to the last.
    """

    __slots__ = ("_both_ways", "_images", "_prompt", "delta", "in_line")

    def __init__(self, request: Request, vision: Vision) -> None:
        self._images, self.in_line, self._both_ways = request.images, vision.in_line, vision.both_ways
        self._prompt, self.delta = np.empty((3, 0), np.int32), 0
        if not self.in_line:
            self._prompt, self.delta = rope_positions(len(request.prompt_token_ids), request.images, vision)

    def looks_ahead(self, first: int) -> bool:
        """Whether tokens from place `first` on may see others behind them."""
        return self._both_ways and self.next_image(first) is not None

    def last_seen(self, first: int, count: int) -> Int32:
        """[count] the last place that each token from place `first` on sees."""
        out = np.arange(first, first + count, dtype=np.int32)
        for image in self._images if self._both_ways else ():
            end = image.start + image.tokens
            out[max(0, image.start - first) : max(0, end - first)] = end - 1
        return out

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

    def clear(self, first: int, count: int, most: int, ready: Callable[[Image], bool]) -> int:
        """How many of about `count` tokens from place `first` on, at most `most`, can be computed with the images that
        are encoded."""
        for image in self._images:
            end = image.start + image.tokens
            if end <= first or first + count <= image.start:
                continue
            if not ready(image):
                return max(0, image.start - first)
            if self._both_ways and first + count < end:
                if image.start > first:
                    return image.start - first
                return end - first if end - first <= most else 0
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
