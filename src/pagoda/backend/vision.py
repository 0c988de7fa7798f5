"""From the pixels of an image to what a vision encoder is fed: patches, their order, their windows, their angles."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from pagoda.arch.vision_spec import ROPE_BASE, Vision
from pagoda.types import Float32, Image, Int32, PlannedImage

Index = npt.NDArray[np.intp]

MID_EPS = 1e-5
"""Of the norm between the products of a gated merge."""
WHOLE_S = 1e6
"""Longer than any image takes."""


class Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


V = TypeVar("V", bound=Sized)


@dataclass(frozen=True, slots=True)
class Layout:
    """The N patches of an image on their way through the encoder: rows stand in the order of windows.

    The patches that become one token are neighbours always; `order` [N / merge²] says which token's patches stand at
    each place. Patches attend to those of their segment: `frames` and `windows` are where segments begin, and the
    end; without windows both are the same. `places` [3, N] are the group of frames, the row and the column of each
    patch. A class token is the last row, in row and column -1.
    """

    order: Index
    frames: Int32
    windows: Int32
    places: Int32

    @property
    def patches(self) -> int:
        """Rows that are patches."""
        return int((self.places[1] >= 0).sum())

    def turns(self, vision: Vision) -> tuple[Float32, Float32]:
        """cos and sin [N, head size / 2] of the pairs (i, i + head size / 2) of queries and keys.

        The first half of the pairs turns by the row of a patch, the second by its column.
        """
        freq = frequencies(vision)
        half = len(freq) // 2
        angles = np.concatenate([np.outer(self.places[1], freq[:half]), np.outer(self.places[2], freq[half:])], axis=1)
        return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def frequencies(vision: Vision) -> npt.NDArray[np.float64]:
    """[head size / 2] of the pairs that turn by the row, and behind them of those that turn by the column."""
    pairs = vision.head_dim // 2
    if vision.rope is None:
        return np.zeros(pairs)
    every = np.power(ROPE_BASE, -np.arange(pairs, dtype=np.float64) / pairs)
    return np.concatenate([every[::2], every[1::2] if vision.rope == "alternating" else every[::2]])


def vectors_taken(part: PlannedImage, vision: Vision) -> tuple[Index, Index]:
    """The token rows of a step that take vectors of an image, and which ones."""
    places = vision.vector_places(part.image.grid)[part.first : part.first + part.count]
    taken = np.flatnonzero(places >= 0)
    return part.row + taken, places[taken].astype(np.intp)


def patches(image: Image, vision: Vision) -> Float32:
    """The normalized patches [t * h * w, patch values] of an image, those of one token side by side."""
    mean, spread = scaling(vision)
    cut = patch_bytes(image, vision)
    normal = (cut.reshape(len(cut), 3, -1) - mean[:, None]) / spread[:, None]
    return np.asarray(normal, np.float32).reshape(cut.shape)


def grid_taps(place: Layout, grid: tuple[int, int, int], side: int) -> tuple[Index, Float32]:
    """Of a square table of positions with `side` rows and columns: the four that each patch [N, 4] is between, and what
    share it has of each."""
    ends, shares = [], []
    for at, size in zip(place.places[1:, : place.patches], grid[1:], strict=True):
        where = at.astype(np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
        low = np.minimum(where.astype(np.intp), side - 1)
        share = (where - low).astype(np.float32)
        ends.append(np.stack([low, np.minimum(low + 1, side - 1)], axis=1))
        shares.append(np.stack([1 - share, share], axis=1))
    taps = ends[0][:, :, None] * side + ends[1][:, None, :]
    weights = shares[0][:, :, None] * shares[1][:, None, :]
    return taps.reshape(-1, 4), weights.reshape(-1, 4)


def cubic_shares(size: int, side: int) -> Float32:
    """[size, side]: of each of `size` points that are spread over a row of `side` values, the share that it has of each
    of these by cubic convolution (Keys 1981, with a = -0.75); those at the ends go on."""
    at = (np.arange(size) + 0.5) * side / size - 0.5
    low = np.floor(at).astype(np.intp)
    part, a = at - low, -0.75
    out = np.zeros((size, side), np.float32)
    for tap in range(-1, 3):
        x = np.abs(part - tap)
        near = ((a + 2) * x - (a + 3)) * x * x + 1
        far = (((x - 5) * x + 8) * x - 4) * a
        np.add.at(out, (np.arange(size), np.clip(low + tap, 0, side - 1)), np.where(x <= 1, near, far))
    return out


def cubic_positions(table: Float32, place: Layout, grid: tuple[int, int, int]) -> Float32:
    """The positions [N, hidden] of a square table that is spread over a picture."""
    side, wide = math.isqrt(len(table)), table.shape[1]
    rows, columns = cubic_shares(grid[1], side), cubic_shares(grid[2], side)
    spread = columns @ (rows @ table.reshape(side, -1)).reshape(grid[1], side, wide)
    return np.ascontiguousarray(spread[place.places[1], place.places[2]])


def scaling(vision: Vision) -> tuple[Float32, Float32]:
    """Mean and spread [3] of the values of each channel, which are 0 to 255."""
    mean, spread = (np.asarray(x, np.float32) * np.float32(255) for x in (vision.mean, vision.std))
    return mean, spread


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
    places = _places(frame[order], row[order], column[order], merge)
    if vision.class_token:  # of one frame, as all pictures of such a model are
        frames = windows = np.array([0, h * w + 1], np.int32)
        places = np.concatenate([places, np.array([[0], [-1], [-1]], np.int32)], axis=1)
    return Layout(order, frames, windows, places)


def _places(frame: Index, row: Index, column: Index, merge: int) -> Int32:
    """[3, N] of the patches of tokens in a group of frames, a row and a column of tokens."""
    out = np.empty((3, len(row), merge, merge), np.int32)
    inside = np.arange(merge)
    out[0] = frame[:, None, None]
    out[1] = row[:, None, None] * merge + inside[:, None]
    out[2] = column[:, None, None] * merge + inside
    return out.reshape(3, -1)


def in_one_go(go_on: Callable[[float], V | None]) -> V:
    """What comes of encoding an image that was begun."""
    while (vectors := go_on(WHOLE_S)) is None:
        pass
    return vectors


class Encoded(Generic[V]):
    """The vectors of images that were encoded lately, by digest: at most so many bytes, but the last one always.

    `begin` takes an image and gives what goes on with encoding it, for about so many seconds: None, and in the end its
    vectors. One image is encoded at a time; one that is begun in between makes it begin anew.
    """

    def __init__(self, most_bytes: int, begin: Callable[[Image], Callable[[float], V | None]]) -> None:
        self._most_bytes, self._begin = most_bytes, begin
        self._held: OrderedDict[bytes, V] = OrderedDict()
        self._begun: tuple[bytes, Callable[[float], V | None]] | None = None

    def ready(self, image: Image, most_s: float) -> bool:
        """Whether the vectors of an image are here, after encoding it for about so long, if they were not."""
        if image.digest in self._held or most_s <= 0:
            return image.digest in self._held
        begun, self._begun = self._begun, None  # nothing, should it fail
        if begun is None or begun[0] != image.digest:
            begun = image.digest, self._begin(image)
        vectors = begun[1](most_s)
        if vectors is None:
            self._begun = begun
            return False
        self._held[image.digest] = vectors
        while len(self._held) > 1 and sum(held.nbytes for held in self._held.values()) > self._most_bytes:
            self._held.popitem(last=False)
        return True

    def vectors(self, image: Image) -> V:
        self.ready(image, WHOLE_S)
        self._held.move_to_end(image.digest)
        return self._held[image.digest]

    def abandon(self) -> None:
        """What was begun begins anew."""
        self._begun = None

    def clear(self) -> None:
        self._held.clear()
        self.abandon()
