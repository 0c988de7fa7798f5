"""Bytes of a picture, or of the frames of a video, to pixels as the model takes them. Pillow does the work."""

from __future__ import annotations

import contextlib
import hashlib
import io
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image as pil
from PIL import ImageOps, UnidentifiedImageError
from PIL.Image import Image as Picture

from pagoda.errors import BadRequest
from pagoda.media.size import Sizing
from pagoda.media.task import FRAMES_PER_S, MAX_FRAMES, Pixels, Task
from pagoda.media.tiles import cut as tiles_of
from pagoda.media.tiles import middle

MAX_PIXELS = 100_000_000
"""Of one picture as it was sent, and of all frames of an animation together."""
MAX_BYTES = 192 << 20
"""Of the pixels of one picture or video in the model's size."""
MAX_ANIMATION_FRAMES = 2000
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP")
_WHITE = (255, 255, 255)
_SIXTEEN_BITS = ("I", "I;16", "I;16L", "I;16B", "I;16N")
_DEFAULT_FRAME_MS = 100


def decode(task: Task) -> Pixels:
    """Raises BadRequest for what is no picture, is broken or too large."""
    frames = _video_frames(task.parts) if task.video else [picture_in(task.parts[0])]
    source_pixels = sum(frame.width * frame.height for frame in frames)
    return pixels_of(frames, task.sizing, video=task.video, source_pixels=source_pixels)


def pixels_of(frames: Sequence[Picture], sizing: Sizing, *, video: bool, source_pixels: int = 0) -> Pixels:
    """Decoded pictures in the model's size; all frames of a video get that of the first."""
    width, height = sizing.fit(frames[0].width, frames[0].height, video=video, frames=len(frames))
    if len(frames) * width * height * 3 > MAX_BYTES:
        raise BadRequest(f"its {len(frames)} frames of {width} x {height} are too much: send fewer, or smaller ones")
    sized, tiles = _sized([to_rgb(frame) for frame in frames], (width, height), sizing, video)
    repeated = -len(sized) % sizing.temporal_patch_size if video else 0  # the model looks at whole groups of frames
    sized += [sized[-1]] * repeated
    data = b"".join(frame.tobytes() for frame in sized)
    shape = len(sized), height, width
    digest = hashlib.blake2b(f"{video} {shape} ".encode() + data, digest_size=16).digest()
    return Pixels(
        data=data,
        digest=digest,
        frames=len(sized),
        height=height,
        width=width,
        source_pixels=source_pixels,
        repeated=repeated,
        tiles=tiles,
    )


def _sized(
    frames: Sequence[Picture], size: tuple[int, int], sizing: Sizing, video: bool
) -> tuple[list[Any], tuple[int, int]]:
    """The pixels of each frame, or of each tile of a picture, and how these lie."""
    if sizing.tiling and not video:
        cut, tiles = tiles_of(frames[0], sizing)
        return [np.asarray(tile) for tile in cut], tiles
    if sizing.cropped:
        return [np.asarray(middle(frame, sizing.side, sizing.resample)) for frame in frames], (1, 1)
    return [np.asarray(frame.resize(size, pil.Resampling(sizing.resample))) for frame in frames], (1, 1)


def to_rgb(picture: Picture) -> Picture:
    """Three channels of 8 bits; what is transparent becomes white, as a page would show it."""
    if picture.mode in _SIXTEEN_BITS:
        picture = pil.fromarray((np.asarray(picture).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    elif picture.mode == "F":
        raise BadRequest("its pixels are fractions: only whole numbers have a defined white")
    if "transparency" in picture.info or picture.mode in ("RGBA", "LA", "La", "PA", "RGBa"):
        picture = picture.convert("RGBA")
        flat = pil.new("RGB", picture.size, _WHITE)
        flat.paste(picture, mask=picture.getchannel("A"))
        return flat
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def picture_in(data: bytes) -> Picture:
    """The picture, turned as its EXIF says; the first frame of an animation."""
    with _open(data) as picture, _our_words():
        picture.load()
        with contextlib.suppress(Exception):  # who looks at a picture with broken EXIF sees it as it lies
            ImageOps.exif_transpose(picture, in_place=True)
        return to_rgb(picture)


def _video_frames(parts: Sequence[bytes]) -> list[Picture]:
    if len(parts) > MAX_FRAMES:
        raise BadRequest(f"it has {len(parts)} frames; at most {MAX_FRAMES} are taken")
    if len(parts) > 1:
        return _within(picture_in(part) for part in parts)
    with _open(parts[0]) as animation, _our_words():
        return _within(_sampled(animation))


def _within(frames: Iterator[Picture]) -> list[Picture]:
    """The frames, as long as they are not too large together."""
    taken: list[Picture] = []
    total = 0
    for frame in frames:
        total += frame.width * frame.height
        if total > MAX_PIXELS:
            raise _too_large()
        taken.append(frame)
    return taken


def _sampled(animation: Any) -> Iterator[Picture]:
    """Frames of an animation, so many for each second that it is shown."""
    count = getattr(animation, "n_frames", 1)
    if count > MAX_ANIMATION_FRAMES or count * animation.width * animation.height > 4 * MAX_PIXELS:
        raise _too_large()
    shown_s, due_s = 0.0, 0.0
    taken = 0
    for index in range(count):
        animation.seek(index)
        animation.load()  # some formats tell how long a frame lasts only now
        lasts_s = (animation.info.get("duration") or _DEFAULT_FRAME_MS) / 1000
        shown_s += lasts_s
        while due_s < shown_s and taken < MAX_FRAMES:
            yield to_rgb(animation.copy())
            taken += 1
            due_s += 1 / FRAMES_PER_S


def _open(data: bytes) -> Picture:
    """The picture with nothing decoded but its size, which must be within the limits."""
    with _our_words(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        picture = pil.open(io.BytesIO(data), formats=FORMATS)
    if picture.width * picture.height > MAX_PIXELS:
        raise _too_large()
    return picture


def _too_large() -> BadRequest:
    return BadRequest(f"it has more than {MAX_PIXELS // 1_000_000} million pixels")


@contextlib.contextmanager
def _our_words() -> Iterator[None]:
    try:
        yield
    except BadRequest:
        raise
    except MemoryError:
        raise _too_large() from None
    except UnidentifiedImageError:
        names = ", ".join(FORMATS[:-1])
        raise BadRequest(f"it is no picture that can be read here: {names} or {FORMATS[-1]}") from None
    except pil.DecompressionBombError:
        raise _too_large() from None
    except Exception:  # decoders raise anything
        raise BadRequest("it is broken or incomplete") from None
