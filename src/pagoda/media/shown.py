"""How models are shown what has parts: the frames of a video, the tiles of a picture, and the texts around them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import msgspec

from pagoda.media.place import Show
from pagoda.types import Image

Encode = Callable[[str], list[int]]


def parts(image: Image) -> Iterator[Image]:
    """Each group of frames, or each tile, alone."""
    count, rows, columns = image.grid
    each = len(image.pixels) // count
    for i in range(count):
        yield msgspec.structs.replace(
            image,
            tokens=image.tokens // count,
            grid=(1, rows, columns),
            pixels=image.pixels[i * each : (i + 1) * each],
            digest=hashlib.blake2b(image.digest + i.to_bytes(4, "little"), digest_size=16).digest(),
            repeated=0,
            tiles=(1, 1),
        )


def timed(together: int, begin: int, end: int, encode: Encode) -> Show:
    """Videos as groups of so many frames between two tokens, each behind the middle of the times it is shown at."""

    def show(image: Image) -> Iterator[Image | list[int]]:
        if not image.video:
            yield image
            return
        last = image.grid[0] * together - 1 - image.repeated
        for i, group in enumerate(parts(image)):
            first = i * together
            middle = (first + min(first + together - 1, last)) / 2
            yield [*encode(f"<{middle * image.second_per_grid / together:.1f} seconds>"), begin]
            yield group
            yield [end]

    return show


def glm(time_format: str, encode: Encode) -> Show:
    """Groups of frames as pictures, each with the time of its first frame behind it."""
    begin, end = encode("<|begin_of_image|>"), encode("<|end_of_image|>")

    def show(image: Image) -> Iterator[Image | list[int]]:
        if not image.video:
            yield image
            return
        for i, group in enumerate(parts(image)):
            yield begin
            yield group
            yield [*end, *encode(time_format.format(i * image.second_per_grid))]

    return show


def internvl(encode: Encode) -> Show:
    """Tiles side by side between two tokens; the frames of a video as pictures that are counted."""
    begin, end = encode("<img>"), encode("</img>")

    def show(image: Image) -> Iterator[Image | list[int]]:
        if not image.video:
            yield begin
            yield from parts(image)
            yield end
            return
        for i, frame in enumerate(parts(image)):
            yield [*encode(f"{chr(10) if i else ''}Frame{i + 1}: "), *begin]
            yield msgspec.structs.replace(frame, video=False)
            yield end

    return show


def idefics(encode: Encode) -> Show:
    """Tiles behind their row and column, by lines; behind a blank line the whole picture."""
    around, whole = encode("<fake_token_around_image>"), encode("<global-img>")

    def show(image: Image) -> Iterator[Image | list[int]]:
        tiles = list(parts(image))
        rows, columns = image.tiles
        for i, tile in enumerate(tiles[:-1]):
            row, column = divmod(i, columns)
            yield [*around, *encode(f"<row_{row + 1}_col_{column + 1}>")]
            yield tile
            if column == columns - 1:
                yield encode("\n\n" if row == rows - 1 else "\n")
        yield [*around, *whole]
        yield tiles[-1]
        yield around

    return show
