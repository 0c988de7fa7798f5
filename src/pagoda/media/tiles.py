"""Cuts a picture into tiles of one size, with the whole of it behind them, for models with small encoders."""

from __future__ import annotations

import math

from PIL import Image as pil
from PIL.Image import Image as Picture

from pagoda.media.size import Sizing

Arrangement = tuple[int, int]
"""Rows and columns; (1, 1) is the whole picture alone."""


def cut(picture: Picture, sizing: Sizing) -> tuple[list[Picture], Arrangement]:
    """The tiles by rows, and behind them the whole, unless that is the only one."""
    how, side = pil.Resampling(sizing.resample), sizing.side
    if sizing.tiling == "grid":
        picture = picture.resize(
            _edged(picture.width, picture.height, _edge(picture.width, picture.height, sizing)), how
        )
        rows, columns = _covered(picture.width, picture.height, side)
    else:
        rows, columns = nearest(picture.width, picture.height, sizing)
    large = picture.resize((columns * side, rows * side), how)
    if (rows, columns) == (1, 1):
        return [large], (1, 1)
    boxes = [(x * side, y * side, (x + 1) * side, (y + 1) * side) for y in range(rows) for x in range(columns)]
    whole = (large if sizing.tiling == "grid" else picture).resize((side, side), how)
    return [*(large.crop(box) for box in boxes), whole], (rows, columns)


def nearest(width: int, height: int, sizing: Sizing) -> Arrangement:
    """As many tiles as have the shape that is nearest to the picture's. Of those that are equally near the larger one,
    unless half of it would be more than the picture has."""
    most, area = sizing.most_tiles, sizing.side**2
    found, best = (1, 1), math.inf
    shapes = [(x, y) for x in range(1, most + 1) for y in range(1, most + 1) if x * y <= most]
    for columns, rows in sorted(shapes, key=lambda shape: shape[0] * shape[1]):
        apart = abs(width / height - columns / rows)
        if apart < best or (apart == best and width * height > area * columns * rows / 2):
            found, best = (rows, columns), apart
    return found


def _edge(width: int, height: int, sizing: Sizing) -> int:
    """What the longest edge becomes: `longest_edge`, or less by whole tiles where these would be too many."""
    for edge in range(sizing.longest_edge, sizing.side, -sizing.side):
        rows, columns = _covered(*_edged(width, height, edge), sizing.side)
        if rows * columns <= sizing.most_tiles:
            return edge
    return sizing.side


def _edged(width: int, height: int, edge: int) -> tuple[int, int]:
    """Width and height once the longest edge is so long; the other one is even."""
    ratio = width / height
    other = int(edge / ratio if width >= height else edge * ratio)
    other = max(1, other + other % 2)
    return (edge, other) if width >= height else (other, edge)


def _covered(width: int, height: int, side: int) -> Arrangement:
    """The tiles that a picture takes, once the longest edge is whole tiles."""
    ratio = width / height
    if width >= height:
        columns = -(-width // side)
        return math.ceil(int(columns * side / ratio) / side) or 1, columns
    rows = -(-height // side)
    return rows, math.ceil(int(rows * side * ratio) / side) or 1


def middle(picture: Picture, side: int, resample: int) -> Picture:
    """The middle of a picture whose shorter edge is so long."""
    width, height = picture.size
    short = min(width, height)
    size = (side, int(side * height / width)) if width == short else (int(side * width / height), side)
    picture = picture.resize(size, pil.Resampling(resample))
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))
