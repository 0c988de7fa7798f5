"""How large a picture goes into the model: sides that are whole patches, and the tokens that these take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from pagoda.errors import BadRequest, ConfigError

MAX_RATIO = 200
_MIN_PIXELS, _MAX_PIXELS = 56 * 56, 1280 * 28 * 28
_LOW_PIXELS = 512 * 512
_LANCZOS, _BILINEAR, _BICUBIC = 1, 2, 3
_FILTERS = (0, _LANCZOS, _BILINEAR, _BICUBIC, 4, 5)
_NAMES = (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))


class Sizing(msgspec.Struct, frozen=True, kw_only=True):
    """What the model takes, and between how many pixels a picture, or a frame of a video, is brought.

    `whole_videos`: those of all frames of a video together are counted; `whole_pictures`: a picture is a group of
    frames there. With `side` all pictures get so many pixels in
    each direction; with `longest_edge` they become smaller only, until neither side has more. `row_ends`: each row of
    tokens has one more. `resample` is Pillow's number of the filter. With `tiling` pictures become several of that
    side, at most `most_tiles` and the whole; `cropped`: their longer edge loses what is too much.
    """

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = _MIN_PIXELS
    max_pixels: int = _MAX_PIXELS
    min_frame_pixels: int = _MIN_PIXELS
    max_frame_pixels: int = _MAX_PIXELS
    whole_videos: bool = False
    whole_pictures: bool = False
    side: int = 0
    longest_edge: int = 0
    row_ends: bool = False
    resample: int = 3
    tiling: Literal["nearest", "grid"] | None = None
    most_tiles: int = 1
    cropped: bool = False

    @property
    def only_size(self) -> str:
        return f"this model is given pictures of {self.side} x {self.side} pixels only, whatever they were"

    @property
    def frames_of_picture(self) -> int:
        return self.temporal_patch_size if self.whole_pictures else 1

    @property
    def factor(self) -> int:
        """Pixels along a side of what becomes one token."""
        return self.patch_size * self.merge_size

    def fit(self, width: int, height: int, *, video: bool = False, frames: int = 1) -> tuple[int, int]:
        """Width and height in the model: multiples of `factor`, as near to the picture's own as the limits allow."""
        if self.side and not self.cropped:
            return self.side, self.side
        if max(height, width) > MAX_RATIO * min(height, width):
            raise BadRequest(f"its long side is more than {MAX_RATIO} times its short one ({width} x {height})")
        if self.cropped:
            return self.side, self.side
        factor = self.factor
        if self.whole_pictures and min(width, height) < factor:
            larger = max(factor / height, factor / width)
            width, height = int(width * larger), int(height * larger)
        least = self.min_frame_pixels if video else self.min_pixels
        most = self.max_frame_pixels if video else self.max_pixels
        rows, columns = round(height / factor), round(width / factor)
        if self.longest_edge:
            ratio = max(height / self.longest_edge, width / self.longest_edge, 1.0)
            rows, columns = (math.ceil(math.floor(edge / ratio) / factor) or 1 for edge in (height, width))
        count = frames if self.whole_videos and video else self.frames_of_picture
        groups = round(count / self.temporal_patch_size)
        pixels = rows * columns * factor**2 * max(groups * self.temporal_patch_size, 1)
        if pixels > most:
            shrink = math.sqrt(count * height * width / most)
            rows = max(1, math.floor(height / shrink / factor))
            columns = max(1, math.floor(width / shrink / factor))
        elif pixels < least:
            grow = math.sqrt(least / (count * height * width))
            rows, columns = math.ceil(height * grow / factor), math.ceil(width * grow / factor)
        return columns * factor, rows * factor

    def grid(self, width: int, height: int, frames: int) -> tuple[int, int, int]:
        """Patches in time, height and width."""
        return -(-frames // self.temporal_patch_size), height // self.patch_size, width // self.patch_size

    def tokens(self, grid: tuple[int, int, int]) -> int:
        return grid[0] * grid[1] * grid[2] // self.merge_size**2 + self.row_ends * (grid[1] // self.merge_size)

    @property
    def only_one(self) -> bool:
        """Whether all pictures take as many tokens."""
        return bool(self.side) and not self.tiling

    @property
    def tile_tokens(self) -> int:
        return (self.side // self.factor) ** 2

    def pixels_for(self, tokens: int) -> int:
        """The largest picture of so many tokens."""
        if self.tiling:  # beside the tiles there is the whole
            return max(1, tokens // self.tile_tokens - 1) * self.side**2
        return (tokens - self.row_ends * math.isqrt(2 * tokens)) * self.factor**2

    def lowered(self, asked: Mapping[str, Any], *, low: bool = False) -> Sizing:
        """With the limits that a request asks for, which can only be closer. `low`: it wants little detail."""
        given = pixel_limits(asked, "mm_processor_kwargs", self.factor)
        if self.tiling and "min_pixels" in given:
            raise BadRequest(f"mm_processor_kwargs: {_NO_LEAST}", param="mm_processor_kwargs")
        if self.side and given and not self.tiling:
            raise BadRequest(f"mm_processor_kwargs: {self.only_size}", param="mm_processor_kwargs")
        given = {name: value * self.frames_of_picture for name, value in given.items()}
        low_pixels = _LOW_PIXELS * self.frames_of_picture if low else self.max_pixels
        most = min(given.get("max_pixels", self.max_pixels), self.max_pixels, low_pixels)
        most_frame = min(most, self.max_frame_pixels)
        least = max(given.get("min_pixels", 0), self.min_pixels)
        return msgspec.structs.replace(
            self,
            max_pixels=most,
            max_frame_pixels=most_frame,
            min_pixels=min(least, most),
            min_frame_pixels=min(max(given.get("min_pixels", 0), self.min_frame_pixels), most_frame),
            most_tiles=max(1, min(self.most_tiles, most // self.side**2)) if self.tiling else 1,
        )


def pixel_limits(given: Mapping[str, Any], name: str, factor: int) -> dict[str, int]:
    """`min_pixels` and `max_pixels` of a table, also as the edges of `size`. Raises BadRequest for what is neither."""
    size = given.get("size")
    table = {**(size if isinstance(size, Mapping) else {}), **given}
    unknown = [key for key in given if key not in ("size", *(one[0] for one in _NAMES))]
    if unknown or (size is not None and not isinstance(size, Mapping)):
        wrong = unknown[0] if unknown else "size"
        raise BadRequest(f"{name}: {str(wrong)[:40]} is not known here; it takes min_pixels and max_pixels", param=name)
    found = {}
    for ours, edge in _NAMES:
        value = table.get(ours, table.get(edge))
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not factor**2 <= value < 2**31:
            raise BadRequest(f"{name}: {ours} must be a whole number of at least {factor**2}", param=name)
        found[ours] = value
    if found.get("min_pixels", 0) > found.get("max_pixels", 2**31):
        raise BadRequest(f"{name}: min_pixels must not be above max_pixels", param=name)
    return found


def find_sizing(
    patch_size: int,
    temporal_patch_size: int,
    merge_size: int,
    files: tuple[Mapping[str, Any], Mapping[str, Any]],
    given: Mapping[str, Any],
    *,
    whole_videos: bool = False,
    whole_pictures: bool = False,
    side: int = 0,
    longest_edge: int = 0,
    row_ends: bool = False,
    tiling: Literal["nearest", "grid"] | None = None,
    most_tiles: int = 1,
    cropped: bool = False,
) -> Sizing:
    """From the model's preprocessor_config.json and video_preprocessor_config.json, and --mm-processor-kwargs."""
    factor = patch_size * merge_size
    resample = files[0].get("resample")
    if resample not in _FILTERS:
        resample = _BILINEAR if side and not (tiling or cropped) else _LANCZOS if tiling == "grid" else _BICUBIC
    file = files[0]
    if side or longest_edge:
        longest_edge = longest_edge if side else _edge(file, longest_edge)
        most = (side or -(-longest_edge // factor) * factor) ** 2
        limits = {"min_pixels": min(factor**2, most), "max_pixels": most}
        files = (limits, limits)
    picture, video = (_of_file(file, factor) for file in files)
    try:
        own = pixel_limits(given, "mm_processor_kwargs", factor)
    except BadRequest as error:
        raise ConfigError("--" + error.message.replace("_", "-", 2), remedy=_EXAMPLE) from None
    tiles, own = (own, {}) if tiling else ({}, own)
    if side and own:
        raise ConfigError(f"--mm-processor-kwargs: {Sizing(side=side).only_size}", remedy="Leave it out")
    own = {name: value * temporal_patch_size for name, value in own.items()} if whole_pictures else own
    picture = {**picture, **own}
    video = {**picture, **video, **own}
    sizing = Sizing(
        patch_size=patch_size,
        temporal_patch_size=temporal_patch_size,
        merge_size=merge_size,
        whole_videos=whole_videos,
        whole_pictures=whole_pictures,
        side=side,
        longest_edge=longest_edge,
        row_ends=row_ends,
        resample=resample,
        tiling=tiling,
        most_tiles=most_tiles,
        cropped=cropped,
        **picture,
        **{name.replace("_", "_frame_"): value for name, value in video.items()},
    )
    if sizing.min_pixels > sizing.max_pixels or sizing.min_frame_pixels > sizing.max_frame_pixels:
        raise ConfigError(f"--mm-processor-kwargs: min_pixels {sizing.min_pixels} is above max_pixels", remedy=_EXAMPLE)
    return _tiled(sizing, file, tiles) if tiling else sizing


def _tiled(sizing: Sizing, file: Mapping[str, Any], own: Mapping[str, int]) -> Sizing:
    """With as many tiles as the model's file and --mm-processor-kwargs say."""
    if "min_pixels" in own:
        raise ConfigError(f"--mm-processor-kwargs: {_NO_LEAST}", remedy=_EXAMPLE)
    edge, most, each = sizing.longest_edge, _count(file, "max_patches", sizing.most_tiles), sizing.side**2
    if sizing.tiling == "grid":
        edge, most = _tiled_edge(file, sizing.side, edge)
    most = max(1, min(most, own.get("max_pixels", most * each) // each))
    tiling = None if file.get("do_image_splitting") is False else sizing.tiling
    changes: dict[str, Any] = {"tiling": tiling, "longest_edge": edge, "most_tiles": most, "max_pixels": most * each}
    return msgspec.structs.replace(sizing, **changes)


_NO_LEAST = "this model cuts pictures into tiles, so there is no min_pixels; max_pixels says how many of them"
_EXAMPLE = """Write --mm-processor-kwargs '{"max_pixels": 1003520}'"""


def _edge(file: Mapping[str, Any], default: int) -> int:
    size = file.get("size")
    edge = size.get("longest_edge") if isinstance(size, Mapping) else None
    return edge if isinstance(edge, int) and 0 < edge <= default else default


def _tiled_edge(file: Mapping[str, Any], side: int, default: int) -> tuple[int, int]:
    """How long the longest edge of a picture becomes that is cut into tiles, and the most tiles that gives."""
    inner = file.get("max_image_size")
    of_tile = inner.get("longest_edge", side) if isinstance(inner, Mapping) else side
    if of_tile != side:
        raise ConfigError(
            f"preprocessor_config.json: tiles of {of_tile} pixels do not fit the image encoder, which takes {side}",
            remedy="Download the model's preprocessor_config.json again",
        )
    size = file.get("size")
    edge = _count(size, "longest_edge", default) if isinstance(size, Mapping) else default
    edge = min(edge, default * 4)
    return edge, (-(-edge // side)) ** 2


def _count(file: Mapping[str, Any], name: str, default: int) -> int:
    value = file.get(name)
    return value if isinstance(value, int) and 0 < value < 2**16 else default


def _of_file(file: Mapping[str, Any], factor: int) -> dict[str, int]:
    known = {name: file[name] for name in ("size", "min_pixels", "max_pixels") if file.get(name) is not None}
    try:
        return pixel_limits(known, "preprocessor_config.json", factor)
    except BadRequest as error:
        raise ConfigError(error.message, remedy="Download the model's preprocessor_config.json again") from None
