"""Qwen3-VL, dense and with experts, against transformers: vectors of each depth, logits, tokens, times in text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import vl_tiny
from reference_plans import Feed, make_plan
from test_reference_vision import pixel_values, worst
from transformers import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize
from vl_cases import BLOCKS, LIMITS, noise

from pagoda.arch.mrope import rope_positions
from pagoda.arch.registry import load_spec
from pagoda.backend.reference_vision import ReferenceVision
from pagoda.backend.select import load_executor
from pagoda.media.place import place
from pagoda.media.shown import timed
from pagoda.media.size import find_sizing
from pagoda.types import Float32, Image, PlannedImage
from pagoda.weights.open import open_source

BOUND = 1e-4
START, STOP = (vl_tiny.SPECIAL.index(f"<|vision_{end}|>") for end in ("start", "end"))
STILL, MOVING = noise(1, 4, 10), noise(4, 6, 4)
TEXT = np.random.default_rng(8).integers(7, 263, 40).tolist()


def encode(text: str) -> list[int]:
    return vl_tiny.tokenizer().encode(text).ids


def tokens_of(image: Image) -> list[int]:
    return [vl_tiny.VIDEO if image.video else vl_tiny.IMAGE] * image.tokens


def prompt() -> tuple[list[int], list[Image]]:
    """Text, a picture, text, two groups of frames of a video, text."""
    bare = [*TEXT[:5], vl_tiny.IMAGE, *TEXT[5:9], vl_tiny.VIDEO, *TEXT[9:15]]
    shown = [vl_tiny.picture(STILL, -1), vl_tiny.picture(MOVING, -1, video=True)]
    return place(bare, shown, vl_tiny.IMAGE, vl_tiny.VIDEO, tokens_of, timed(2, START, STOP, encode))


TOKENS, IMAGES = prompt()


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen3_vl_moe"])
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return vl_tiny.write(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def model(folder: str) -> Any:
    return transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def executor(folder: str) -> ReferenceVision:
    source = open_source(folder)
    made = load_executor("reference", load_spec(source), source, LIMITS)
    assert isinstance(made, ReferenceVision)
    return made


def inputs(tokens: Sequence[int]) -> dict[str, Any]:
    """What transformers' model takes."""
    kinds = [1 if t == vl_tiny.IMAGE else 2 if t == vl_tiny.VIDEO else 0 for t in tokens]
    return {
        "input_ids": torch.tensor([tokens]),
        "pixel_values": pixel_values(vl_tiny.picture(STILL, 0), STILL),
        "image_grid_thw": torch.tensor([[1, 4, 10]]),
        "pixel_values_videos": pixel_values(vl_tiny.picture(MOVING, 0, video=True), MOVING),
        "video_grid_thw": torch.tensor([[2, 6, 4]]),
        "mm_token_type_ids": torch.tensor([kinds], dtype=torch.int32),
    }


def our_logits(executor: ReferenceVision, tokens: Sequence[int]) -> Float32:
    """Of every token."""
    assert executor.spec.vision is not None
    positions, delta = rope_positions(len(TOKENS), IMAGES, executor.spec.vision)
    later = np.broadcast_to(np.arange(len(TOKENS), len(tokens)) + delta, (3, len(tokens) - len(TOKENS)))
    feed = Feed(tokens, 0, BLOCKS, [(i, -1, -1) for i in range(len(tokens))])
    step = replace(
        make_plan([feed], vl_tiny.VOCAB),
        rope_positions=np.concatenate([positions, later], axis=1).astype(np.int32),
        images=tuple(PlannedImage(image, image.start, 0, image.tokens) for image in IMAGES),
    )
    return executor.logits(step)


def test_vectors_of_every_depth_are_transformers(executor: ReferenceVision, model: Any) -> None:
    for shown in (STILL, MOVING, noise(1, 14, 2)):
        image = vl_tiny.picture(shown, 0, video=len(shown) > 1)
        with torch.no_grad():
            theirs = model.model.visual(pixel_values(image, shown), grid_thw=torch.tensor([image.grid]))
        wide = np.concatenate([theirs.pooler_output, *theirs.deepstack_features], axis=1)
        assert wide.shape[1] == 3 * 64 and worst(executor.encoder.encode(image), wide) < BOUND


def test_logits_and_greedy_tokens_are_transformers(executor: ReferenceVision, model: Any) -> None:
    tokens = list(TOKENS)
    with torch.no_grad():
        assert worst(our_logits(executor, tokens), model(**inputs(tokens)).logits[0].numpy()) < BOUND
        theirs = model.generate(**inputs(tokens), max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    for _ in range(5):
        tokens.append(int(our_logits(executor, tokens)[-1].argmax()))
    assert tokens == theirs[0].tolist()


@pytest.mark.parametrize("frames", [1, 2, 3, 6])
def test_times_are_transformers(frames: int) -> None:
    """Of frames that are looked at twice a second."""
    groups = -(-frames // 2)
    asked = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2),
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
        video_token="<|video_pad|>",
        _calculate_timestamps=lambda *given: Qwen3VLProcessor._calculate_timestamps(None, *given),
    )
    shown = {
        "video_grid_thw": torch.tensor([[groups, 4, 6]]),
        "video_metadata": [SimpleNamespace(fps=2.0, frames_indices=list(range(frames)))],
    }
    theirs = Qwen3VLProcessor.replace_video_token(asked, shown, 0)
    video = vl_tiny.picture(noise(2 * groups, 4, 6), -1, video=True, second_per_grid=1.0)
    video = transformed(video, repeated=2 * groups - frames)
    ids, placed = place(
        [40, vl_tiny.VIDEO, 41], [video], vl_tiny.IMAGE, vl_tiny.VIDEO, tokens_of, timed(2, START, STOP, encode)
    )
    assert ids == [40, *encode(theirs), 41]
    assert len({image.digest for image in placed}) == groups
    assert b"".join(image.pixels for image in placed) == video.pixels


@pytest.mark.parametrize("frames", [2, 7, 40])
@pytest.mark.parametrize("size", [(640, 480), (1920, 1080), (64, 48), (33, 300)])
def test_a_video_is_as_large_as_transformers_make_it(frames: int, size: tuple[int, int]) -> None:
    limits = {"shortest_edge": 64 * 64 * 8, "longest_edge": 32 * 32 * 2 * 700}
    sizing = find_sizing(16, 2, 2, ({}, {"size": limits}), {}, whole_videos=True)
    rows, columns = smart_resize(frames, size[1], size[0], 2, 32, limits["shortest_edge"], limits["longest_edge"])
    assert sizing.fit(*size, video=True, frames=frames) == (columns, rows)


def transformed(image: Image, **changes: Any) -> Image:
    return Image(**{**{name: getattr(image, name) for name in image.__struct_fields__}, **changes})


def test_what_cannot_be_is_refused() -> None:
    def refusal(**changes: Any) -> str:
        with pytest.raises(Exception) as caught:
            vl_tiny.spec("qwen3_vl", vision_config={**vl_tiny.config("qwen3_vl")["vision_config"], **changes})
        return str(caught.value)

    assert "must be the square of 2 or more" in refusal(num_position_embeddings=24)
    assert "no layers in their order" in refusal(deepstack_visual_indexes=[1, 0])
    assert "too few" in refusal(deepstack_visual_indexes=[0, 1, 2])
    assert "gelu_pytorch_tanh only" in refusal(hidden_act="silu")
