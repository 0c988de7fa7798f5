"""GLM-4.1V and its successors: sizes, videos and the variant with experts, against transformers."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from seeing_models import (
    BOUNDS,
    IMAGE,
    TEXT,
    VIDEO,
    inputs,
    load,
    logits,
    pictures,
    prompt,
    spec_of,
    step,
    worst,
    write,
)
from seeing_models import vision_of as vision_in
from transformers.models.glm4v.image_processing_pil_glm4v import smart_resize
from transformers.models.glm4v.processing_glm4v import Glm4vProcessor
from transformers.models.glm46v.processing_glm46v import Glm46VProcessor

from pagoda.arch import visual
from pagoda.backend.vision import patches
from pagoda.engine.images import check_images
from pagoda.media.place import place
from pagoda.media.shown import glm
from pagoda.media.size import find_sizing
from pagoda.types import Image, Request, SamplingParams

SIZES = ((640, 480), (3000, 1000), (64, 48), (30, 20), (200, 40), (4000, 3990))


@pytest.mark.parametrize("frames", [0, 2, 9])
@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_transformers(size: tuple[int, int], frames: int) -> None:
    """Of pictures, and of videos."""
    file = {"size": {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 1500}}
    sizing = find_sizing(14, 2, 2, (file, file), {}, whole_videos=True, whole_pictures=True)
    limits = {"min_pixels": 112 * 112, "max_pixels": 28 * 28 * 1500}
    theirs = smart_resize(num_frames=frames or 2, width=size[0], height=size[1], **limits)
    assert sizing.fit(*size, video=frames > 0, frames=frames or 1)[::-1] == theirs
    width, height = sizing.lowered({"max_pixels": 28 * 28 * 100}).fit(*size)
    assert width * height <= 28 * 28 * 100


def encode(text: str) -> list[int]:
    """The two tokens around a picture, and a token for each letter."""
    text = (
        text.replace("<|begin_of_image|>", "\ue009")
        .replace("<|end_of_image|>", "\ue00a")
        .replace("<|image|>", "\ue007")
    )
    return [ord(letter) - 0xE000 if letter >= "\ue000" else 100 + ord(letter) % 100 for letter in text]


def video(groups: int, seconds: float) -> Image:
    pixels = np.random.default_rng(groups).integers(0, 256, (2 * groups, 56, 84, 3), dtype=np.uint8).tobytes()
    digest = hashlib.blake2b(pixels, digest_size=16).digest()
    about: dict[str, Any] = {"pixels": pixels, "digest": digest, "second_per_grid": seconds, "video": True}
    return Image(start=-1, tokens=groups * 6, grid=(groups, 4, 6), **about)


@pytest.mark.parametrize(("processor", "written"), [(Glm4vProcessor, "{:.0f}"), (Glm46VProcessor, "{:.1f} seconds")])
def test_groups_of_frames_stand_before_their_times(processor: Any, written: str) -> None:
    asked: Any = SimpleNamespace(image_token="<|image|>", video_processor=SimpleNamespace(merge_size=2))
    asked.replace_frame_token_id = lambda *given, **more: processor.replace_frame_token_id(asked, *given, **more)
    times = SimpleNamespace(fps=2.0, timestamps=[i / 2 for i in range(6)])
    shown = {"video_grid_thw": torch.tensor([[3, 4, 6]]), "video_metadata": [times]}
    theirs = Glm4vProcessor.replace_video_token(asked, shown, 0)
    ids, placed = place(
        [20, VIDEO, 21], [video(3, 1.0)], IMAGE, VIDEO, lambda i: [IMAGE] * i.tokens, glm(written, encode)
    )
    assert ids == [20, *encode(theirs), 21]
    assert len({each.digest for each in placed}) == len(placed) == 3


@pytest.mark.parametrize("device", ["reference", "cpu", "torch"])
def test_a_video_is_transformers(device: str, tmp_path: Path) -> None:
    model = write(tmp_path, "glm4v")
    spec, vision = spec_of(tmp_path), vision_in(tmp_path)
    whole = video(3, 1.0)
    bare = [*TEXT[:5], VIDEO, *TEXT[5:12]]
    ids, placed = place(
        bare, [whole], IMAGE, VIDEO, lambda i: vision.placeholders(i.grid, video=True), glm("{:.0f}", encode)
    )
    check_images(Request(request_id="a", prompt_token_ids=ids, images=placed, params=SamplingParams()), vision)
    executor = load(tmp_path, device)
    kinds = torch.tensor([[2 * (token == IMAGE) for token in ids]], dtype=torch.int32)
    flat = torch.from_numpy(patches(whole, vision))
    with torch.no_grad():
        theirs = model(
            input_ids=torch.tensor([ids]),
            pixel_values_videos=flat,
            video_grid_thw=torch.tensor([whole.grid]),
            mm_token_type_ids=kinds,
        )
    assert worst(logits(executor, step(spec, ids, placed)), theirs.logits[0].numpy()) < BOUNDS[device]
    executor.close()


def test_the_variant_with_experts_is_transformers(tmp_path: Path) -> None:
    model = write(tmp_path, "glm4v_moe")
    spec, vision = spec_of(tmp_path), vision_in(tmp_path)
    tokens, images = prompt(vision, pictures("glm4v_moe", vision))
    executor = load(tmp_path, "reference")
    with torch.no_grad():
        theirs = model(**inputs("glm4v_moe", vision, tokens, images)).logits[0].numpy()
    assert worst(logits(executor, step(spec, tokens, images)), theirs) < BOUNDS["reference"]


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_the_processor_says_how_times_are_written(file: str, tmp_path: Path) -> None:
    """Configs of GLM-4.6V call it as GLM-4.5V is called."""
    write(tmp_path, "glm4v")
    assert vision_in(tmp_path).time_format == visual.TIMES
    (tmp_path / file).write_text('{"processor_class": "Glm46VProcessor"}')
    assert vision_in(tmp_path).time_format == visual.LATER_TIMES
