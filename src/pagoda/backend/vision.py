"""From the pixels of an image to what a vision encoder is fed: patches, their order, their windows, their angles."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from pagoda.arch.vision_spec import Vision
from pagoda.types import Float32, Image, Int32

Index = npt.NDArray[np.intp]

ROPE_BASE = 10000.0


class Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


V = TypeVar("V", bound=Sized)


@dataclass(frozen=True, slots=True)
class Layout:
    """The N patches of an image on their way through the encoder: rows stand in the order of windows.

    The patches that become one token are neighbours always; `order` [N / merge²] says which token's patches stand at
    each place. Patches attend to those of their segment: `frames` and `windows` are where segments begin, and the
    end; without windows both are the same. `cos` and `sin` [N, head size / 2] turn the pairs (i, i + head size / 2)
    of queries and keys: the first half of the pairs by the row of a patch, the second by its column.
    """

    order: Index
    frames: Int32
    windows: Int32
    cos: Float32
    sin: Float32


def patches(image: Image, vision: Vision) -> Float32:
    """The normalized patches [t * h * w, patch values] of an image, those of one token side by side."""
    mean, std = (np.asarray(x, np.float32)[:, None] * np.float32(255) for x in (vision.mean, vision.std))
    cut = patch_bytes(image, vision)
    normal = (cut.reshape(len(cut), 3, -1) - mean) / std
    return np.asarray(normal, np.float32).reshape(cut.shape)


def patch_bytes(image: Image, vision: Vision) -> npt.NDArray[np.uint8]:
    """The same as they are stored, 0 to 255."""
    t, h, w = image.grid
    size, merge, together = vision.patch_size, vision.merge_size, vision.temporal_patch_size
    pixels = np.frombuffer(image.pixels, np.uint8).reshape(-1, h * size, w * size, 3)
    frames = pixels[np.minimum(np.arange(t * together), len(pixels) - 1)]  # the last one fills its group
    cut = frames.reshape(t, together, h // merge, merge, size, w // merge, merge, size, 3)
    # tokens by row and column, their patches by row and column; in a patch: channel, frame, row, column
    return np.ascontiguousarray(cut.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)).reshape(t * h * w, vision.patch_values)


def layout(grid: tuple[int, int, int], vision: Vision) -> Layout:
    t, h, w = grid
    merge = vision.merge_size
    rows, columns = h // merge, w // merge
    frame, row, column = (a.ravel() for a in np.meshgrid(*map(np.arange, (t, rows, columns)), indexing="ij"))
    frames = np.arange(t + 1, dtype=np.int32) * np.int32(h * w)
    order, windows = np.arange(t * rows * columns), frames
    if vision.window_size:
        side = vision.window_size // (vision.patch_size * merge)
        down, across = -(-rows // side), -(-columns // side)
        window = (frame * down + row // side) * across + column // side
        order = np.argsort(window, kind="stable")
        windows = np.concatenate([[0], np.cumsum(np.bincount(window))]).astype(np.int32) * np.int32(merge**2)
    angles = _angles(row[order], column[order], vision)
    return Layout(order, frames, windows, np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32))


def _angles(row: Index, column: Index, vision: Vision) -> npt.NDArray[np.float64]:
    """[N, head size / 2] of the patches of tokens in a row and column of tokens."""
    merge, dim = vision.merge_size, vision.head_dim // 2
    inside = np.arange(merge)
    rows = (row[:, None, None] * merge + inside[:, None]).repeat(merge, axis=2).ravel()
    columns = (column[:, None, None] * merge + inside[None, :]).repeat(merge, axis=1).ravel()
    freq = np.power(ROPE_BASE, -np.arange(0, dim, 2, dtype=np.float64) / dim)
    return np.concatenate([np.outer(rows, freq), np.outer(columns, freq)], axis=1)


class Encoded(Generic[V]):
    """The vectors of images that were encoded lately, by digest: at most so many bytes, but the last one always."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._held: OrderedDict[bytes, V] = OrderedDict()

    def vectors(self, image: Image, encode: Callable[[Image], V]) -> V:
        """What was kept of the image, else what `encode` makes of it."""
        if image.digest not in self._held:
            self._held[image.digest] = encode(image)
        self._held.move_to_end(image.digest)
        while len(self._held) > 1 and sum(held.nbytes for held in self._held.values()) > self._most_bytes:
            self._held.popitem(last=False)
        return self._held[image.digest]

    def clear(self) -> None:
        self._held.clear()
