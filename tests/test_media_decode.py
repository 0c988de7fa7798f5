"""Pictures of all kinds come out as transformers' own processor makes them, and hostile ones end in our words."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from pagoda.errors import BadRequest, ConfigError
from pagoda.media.decode import decode, to_rgb
from pagoda.media.size import Sizing, find_sizing
from pagoda.media.task import MAX_FRAMES, Pixels, Task

SIZING = Sizing(min_pixels=56 * 56, max_pixels=28 * 28 * 64)
ORIENTATION = 0x0112


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    channels = {"L": 1, "RGB": 3, "RGBA": 4, "CMYK": 4, "LA": 2}[mode]
    values = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(values.squeeze() if channels == 1 else values, mode)


def encoded(picture: Image.Image, form: str = "PNG", **more: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, form, **more)
    return out.getvalue()


def sixteen_bits(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(16).integers(0, 65536, (height, width)).astype(np.uint16)
    return Image.fromarray(values)


def turned(quarter: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = quarter
    return encoded(noise(90, 61), "JPEG", exif=exif, quality=95)


PICTURES: dict[str, Callable[[], bytes]] = {
    "usual": lambda: encoded(noise(200, 150)),
    "one pixel": lambda: encoded(noise(1, 1)),
    "thin": lambda: encoded(noise(3, 500)),
    "wide": lambda: encoded(noise(700, 4)),
    "huge": lambda: encoded(noise(1500, 1100), "JPEG"),
    "half a patch": lambda: encoded(noise(42, 70)),
    "gray": lambda: encoded(noise(100, 80, "L")),
    "gray with alpha": lambda: encoded(noise(100, 80, "LA")),
    "alpha": lambda: encoded(noise(100, 80, "RGBA")),
    "palette": lambda: encoded(noise(100, 80).quantize(32)),
    "transparent palette": lambda: encoded(noise(100, 80).quantize(32), transparency=3),
    "transparent colour": lambda: encoded(Image.new("RGB", (80, 60), (10, 20, 30)), transparency=(10, 20, 30)),
    "16 bit": lambda: encoded(sixteen_bits(90, 70)),
    "black and white": lambda: encoded(noise(64, 64, "L").convert("1")),
    "CMYK": lambda: encoded(noise(100, 80, "CMYK"), "JPEG", quality=95),
    "GIF": lambda: encoded(noise(60, 60).quantize(16), "GIF"),
    "WebP": lambda: encoded(noise(60, 60), "WEBP", lossless=True),
    "BMP": lambda: encoded(noise(60, 60), "BMP"),
    **{f"turned {i}": lambda i=i: turned(i) for i in range(1, 9)},
}


def plain(name: str, data: bytes) -> Image.Image:
    """The picture as a viewer shows it on a white page, made without our code."""
    picture = Image.open(io.BytesIO(data))
    if name.startswith("turned"):
        turns = {2: [0], 3: [3], 4: [1], 5: [5], 6: [4], 7: [6], 8: [2]}[int(name[-1])] if name[-1] != "1" else []
        for turn in turns:
            picture = picture.transpose(Image.Transpose(turn))
    if name == "16 bit":
        return Image.fromarray((np.asarray(picture) // 256).astype(np.uint8)).convert("RGB")
    if "alpha" in name or "transparent" in name:
        rgba = np.asarray(picture.convert("RGBA")).astype(np.float64)
        alpha = rgba[..., 3:] / 255
        return Image.fromarray(np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8))
    return picture.convert("RGB")


@pytest.mark.parametrize("name", PICTURES)
def test_pixels_are_those_of_transformers(name: str) -> None:
    data = PICTURES[name]()
    made = decode(Task(parts=[data], sizing=SIZING))
    processor = Qwen2VLImageProcessorPil(min_pixels=SIZING.min_pixels, max_pixels=SIZING.max_pixels)
    wanted = processor(images=[plain(name, data)], return_tensors="np")
    grid = SIZING.grid(made.width, made.height, made.frames)
    assert list(grid) == wanted["image_grid_thw"][0].tolist()
    pixels = np.frombuffer(made.data, np.uint8).reshape(made.height, made.width, 3)
    rows, columns = grid[1] // 2, grid[2] // 2
    patches = pixels.reshape(rows, 2, 14, columns, 2, 14, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    patches = np.repeat(patches.reshape(grid[1] * grid[2], 3, 1, 14, 14), 2, axis=2)
    mean, std = (np.array(v)[:, None, None, None] for v in (processor.image_mean, processor.image_std))
    theirs = wanted["pixel_values"].reshape(-1, 3, 2, 14, 14) * std * 255 + mean * 255
    flattened = "alpha" in name or "transparent" in name
    assert np.abs(theirs - patches).max() < (2.01 if flattened else 0.01)


@pytest.mark.parametrize("limits", [(56 * 56, 28 * 28 * 1280), (3136, 12845056), (10 * 784, 20 * 784)])
def test_sizes_are_those_of_transformers(limits: tuple[int, int]) -> None:
    sizing = Sizing(min_pixels=limits[0], max_pixels=limits[1])
    processor = Qwen2VLImageProcessorPil(min_pixels=limits[0], max_pixels=limits[1])
    for width in (1, 13, 14, 42, 70, 98, 333, 1000, 2999, 6001):
        for height in (5, 28, 70, 126, 511, 1024, 4000):
            if max(width, height) > 200 * min(width, height):
                with pytest.raises(BadRequest, match="200 times"):
                    sizing.fit(width, height)
                continue
            sides = sizing.fit(width, height)
            wanted = processor.get_number_of_image_patches(height, width, {})
            grid = sizing.grid(*sides, 1)
            assert grid[1] * grid[2] == wanted
            assert sizing.tokens(grid) * 4 == wanted


def test_a_video_has_whole_groups_of_frames_of_one_size() -> None:
    frames = [noise(80, 60), noise(81, 60), noise(40, 30)]
    made = decode(Task(parts=[encoded(frame) for frame in frames], sizing=SIZING, video=True))
    pixels = np.frombuffer(made.data, np.uint8).reshape(made.frames, made.height, made.width, 3)
    assert made.frames == 4 and np.array_equal(pixels[2], pixels[3]) and not np.array_equal(pixels[0], pixels[1])
    assert SIZING.grid(made.width, made.height, made.frames)[0] == 2


@pytest.mark.parametrize("form", ["GIF", "WEBP"])
def test_an_animation_is_looked_at_twice_a_second(form: str) -> None:
    colours = [(value, 0, 0) for value in range(0, 250, 25)]
    frames = [Image.new("RGB", (56, 56), colour) for colour in colours]
    data = encoded(
        frames[0],
        form,
        save_all=True,
        append_images=frames[1:],
        duration=250,
        **({"lossless": True} if form == "WEBP" else {}),
    )
    video = decode(Task(parts=[data], sizing=SIZING, video=True))
    shown = np.frombuffer(video.data, np.uint8).reshape(video.frames, video.height, video.width, 3)[:, 0, 0, 0]
    assert shown.tolist() == [0, 50, 100, 150, 200, 200]
    still = decode(Task(parts=[data], sizing=SIZING))
    assert still.frames == 1 and still.data[0] == 0


def bomb() -> bytes:
    """A PNG that says it has 40000 x 40000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100_000)) + chunk(b"IEND", b"")


HOSTILE: dict[str, tuple[Callable[[], list[bytes]], str]] = {
    "text": (lambda: [b"no picture"], "no picture that can be read here"),
    "empty": (lambda: [b""], "no picture that can be read here"),
    "bomb": (lambda: [bomb()], "more than 100 million pixels"),
    "cut": (lambda: [encoded(noise(200, 200))[:-5000]], "broken or incomplete"),
    "cut JPEG": (lambda: [encoded(noise(200, 200), "JPEG")[:-900]], "broken or incomplete"),
    "wrong header": (lambda: [b"\x89PNG\r\n\x1a\n" + b"\0" * 40], "no picture|broken"),
    "other format": (lambda: [encoded(noise(20, 20), "TIFF")], "no picture that can be read here"),
    "PostScript": (lambda: [encoded(noise(20, 20), "EPS")], "no picture that can be read here"),
    "line": (lambda: [encoded(noise(1, 900))], "200 times"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("video", [False, True])
def test_hostile_pictures_end_in_our_words(name: str, video: bool) -> None:
    make, words = HOSTILE[name]
    with pytest.raises(BadRequest, match=words) as caught:
        decode(Task(parts=make(), sizing=SIZING, video=video))
    assert "/" not in caught.value.message and "0x" not in caught.value.message


def test_frames_are_limited() -> None:
    with pytest.raises(BadRequest, match=f"at most {MAX_FRAMES}"):
        decode(Task(parts=[encoded(noise(8, 8))] * (MAX_FRAMES + 1), sizing=SIZING, video=True))


def test_sizes_come_from_the_files_and_the_flag() -> None:
    edges = {"size": {"shortest_edge": 4 * 784, "longest_edge": 100 * 784}}
    made = find_sizing(14, 2, 2, ({"min_pixels": 3136, "max_pixels": 12845056}, {}), {})
    assert (made.min_pixels, made.max_pixels, made.max_frame_pixels) == (3136, 12845056, 12845056)
    made = find_sizing(14, 2, 2, ({"min_pixels": 3136, "max_pixels": 12845056}, edges), {})
    assert (made.max_pixels, made.min_frame_pixels, made.max_frame_pixels) == (12845056, 3136, 78400)
    made = find_sizing(14, 2, 2, (edges, {}), {"max_pixels": 50 * 784})
    assert (made.min_pixels, made.max_pixels, made.max_frame_pixels) == (3136, 50 * 784, 50 * 784)
    for wrong in ({"max_pixels": "1"}, {"max_pixels": 3}, {"fps": 1}, {"min_pixels": 10**6}):
        with pytest.raises(ConfigError, match="--mm-processor-kwargs"):
            find_sizing(14, 2, 2, (edges, {}), wrong)


def test_a_request_can_ask_for_smaller_pictures_only() -> None:
    assert SIZING.lowered({"max_pixels": 10 * 784}).max_pixels == 10 * 784
    assert SIZING.lowered({"max_pixels": 10**8}).max_pixels == SIZING.max_pixels
    large = Sizing(max_pixels=12845056, max_frame_pixels=12845056)
    assert large.lowered({}, low=True).max_pixels == 512 * 512
    with pytest.raises(BadRequest, match="max_pixels"):
        SIZING.lowered({"max_pixels": -1})


def test_fractions_have_no_white() -> None:
    with pytest.raises(BadRequest, match="fractions"):
        to_rgb(Image.new("F", (2, 2)))


def test_the_same_pixels_in_another_shape_are_another_picture() -> None:
    made = [decode(Task(parts=[encoded(Image.new("RGB", size))], sizing=SIZING)) for size in ((56, 112), (112, 56))]
    assert made[0].data == made[1].data and made[0] != made[1]
    assert isinstance(made[0], Pixels)
