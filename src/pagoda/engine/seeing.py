"""How pictures are given to a model that sees: sizes, limits, and what may be fetched. For the server and for `LLM`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pagoda.arch.vision_spec import Vision
from pagoda.errors import BadRequest, ConfigError, ContextLengthExceeded
from pagoda.media import shown
from pagoda.media.fetch import Permission
from pagoda.media.place import Ends, image_of, place
from pagoda.media.size import Sizing, find_sizing
from pagoda.media.sources import Source
from pagoda.media.task import Pixels, Task, need_pillow
from pagoda.options.config import Options
from pagoda.text.files import read_json
from pagoda.types import Image

MAX_SOURCE_PIXELS = 400_000_000
"""Of all pictures of a request, as they were sent."""
_SHOWN = MappingProxyType({"internvl": shown.internvl, "idefics": shown.idefics})


@dataclass(frozen=True, slots=True)
class Seeing:
    """`limits`: how many a request may hold, by kind."""

    vision: Vision
    sizing: Sizing
    permission: Permission
    limits: Mapping[str, int]

    def check_count(self, sources: Sequence[Source]) -> None:
        if not self.vision.takes_videos and any(source.video for source in sources):
            raise BadRequest("this model takes pictures, but no videos", param="messages")
        for kind, video in (("image", False), ("video", True)):
            held, limit = sum(source.video == video for source in sources), self.limits.get(kind)
            if limit is not None and held > limit:
                raise BadRequest(
                    f"the messages hold {held} of kind {kind}, but this server takes {limit} in one request",
                    remedy="Send fewer, or start the server with a larger --limit-mm-per-prompt",
                    param="messages",
                )

    def task(self, source: Source, parts: list[bytes], asked: Mapping[str, Any]) -> Task:
        """What to decode; `asked` are the request's own mm_processor_kwargs."""
        return Task(parts=parts, sizing=self.sizing.lowered(asked, low=source.low), video=source.video)

    def image(self, source: Source, pixels: Pixels) -> Image:
        return image_of(pixels, self.sizing, video=source.video)

    def place(
        self, ids: list[int], images: Sequence[Image], encode: Callable[[str], list[int]]
    ) -> tuple[list[int], list[Image]]:
        v = self.vision
        show, ends = None, None
        if v.frame_tokens is not None:
            show = shown.timed(v.temporal_patch_size, *v.frame_tokens, encode)
        elif v.frames_as_pictures:
            show = shown.glm(v.time_format, encode)
        elif v.names in _SHOWN:
            show = _SHOWN[v.names](encode)
        if v.ends is not None:
            ends = Ends(*v.ends, encode)
        tokens = partial(_tokens, v)
        return place(ids, images, v.placeholder_id, self.video_id(encode), tokens, show, ends)

    def video_id(self, encode: Callable[[str], list[int]]) -> int | None:
        """What stands for a video in a rendered template."""
        if not self.vision.video_text:
            return self.vision.video_token_id
        found = encode(self.vision.video_text)
        return found[0] if len(found) == 1 else None

    def check_taken(self, images: Sequence[Image], count: int, limit: int) -> None:
        """ContextLengthExceeded where the first of `count` pictures alone are too many: the others need no decoding."""
        taken = sum(image.tokens for image in images)
        if taken < limit:
            return
        most = self.sizing.pixels_for(max(4, limit * 3 // 4 // count))
        smaller = f', or smaller ones: mm_processor_kwargs {{"max_pixels": {most}}}'
        raise ContextLengthExceeded(
            f"this model's maximum context length is {limit} tokens, and {len(images)} of the {count} pictures alone "
            f"take {taken}",
            remedy="Send fewer pictures" + ("" if self.sizing.only_one else smaller),
            param="messages",
        )

    def check_length(self, ids: Sequence[int], images: Sequence[Image], limit: int) -> None:
        """ContextLengthExceeded that says what the pictures take, and how large they may be."""
        if not images or len(ids) < limit:
            return
        taken = sum(image.tokens for image in images)
        room = limit - 1 - (len(ids) - taken)
        vectors = sum(image.grid[0] for image in images)
        fits = 0 if room <= 0 or self.sizing.side else room // vectors  # tiles are of one size
        kwargs = 'mm_processor_kwargs {{"max_pixels": {}}}'
        remedy = "Send fewer pictures"
        if fits >= 4:
            remedy = f"Send smaller pictures: with {kwargs.format(self.sizing.pixels_for(fits))} they fit"
        elif self.sizing.tiling:
            remedy += f": with {kwargs.format(self.sizing.side**2)} each takes {self.sizing.tile_tokens} tokens"
        raise ContextLengthExceeded(
            f"this model's maximum context length is {limit} tokens, but the prompt holds {len(ids)}, {taken} of them "
            f"for {len(images)} {'pictures' if self.sizing.tiling is None else 'parts of pictures'}",
            remedy=remedy,
            param="messages",
        )


def _tokens(vision: Vision, image: Image) -> list[int]:
    return vision.placeholders(image.grid, video=image.video)


def find_seeing(options: Options, path: str, vision: Vision | None) -> Seeing | None:
    """None for a model that does not see. Raises ConfigError for options, or an installation, that do not do."""
    limits = _limits(options.limit_mm_per_prompt)
    folder = options.allowed_local_media_path
    if folder is not None and not Path(folder).is_dir():
        raise ConfigError(f"--allowed-local-media-path {folder} is not a folder", remedy="Give a folder that exists")
    if vision is None:
        return None
    need_pillow()
    own = read_json(path, "processor_config.json")  # newer folders have it in place of the other two
    files = tuple(
        {**(own.get(part) or {}), **read_json(path, name)}
        for part, name in (
            ("image_processor", "preprocessor_config.json"),
            ("video_processor", "video_preprocessor_config.json"),
        )
    )
    sizing = find_sizing(
        vision.patch_size,
        vision.temporal_patch_size,
        vision.merge_size,
        (files[0], files[1]),
        options.mm_processor_kwargs,
        whole_videos=vision.frame_tokens is not None or vision.frames_as_pictures,
        whole_pictures=vision.frames_as_pictures,
        side=vision.side * vision.patch_size,
        longest_edge=vision.longest_edge,
        row_ends=vision.row_tokens is not None,
        tiling=vision.tiling,
        most_tiles=vision.most_tiles,
        cropped=vision.cropped,
    )
    return Seeing(vision, sizing, Permission(options.allowed_media_domains, folder), limits)


def _limits(given: Mapping[str, Any]) -> dict[str, int]:
    flag, remedy = "--limit-mm-per-prompt", """Write --limit-mm-per-prompt '{"image": 4, "video": 1}'"""
    out = {}
    for kind, value in given.items():
        count = value.get("count") if isinstance(value, Mapping) else value
        if kind not in ("image", "video", "audio"):
            raise ConfigError(f"{flag}: {kind} is not known", remedy=remedy)
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise ConfigError(f"{flag}: {kind} must be a whole number", remedy=remedy)
        out[kind] = count
    return out
