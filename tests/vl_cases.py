"""A prompt with pictures and a video, and its steps: what executors of vision models are tested with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import vl_tiny
from reference_plans import Feed, make_plan

from pagoda.arch.mrope import rope_positions
from pagoda.arch.spec import ModelSpec
from pagoda.backend.base import Limits
from pagoda.types import Image, PlannedImage, StepPlan

BLOCKS = (9, 2, 5, 3, 30, 0, 7, 11, 12, 20)
LIMITS = Limits(max_model_len=256, max_num_seqs=4, max_num_batched_tokens=256, num_blocks=40)
RNG = np.random.default_rng(5)


def noise(frames: int, rows: int, columns: int) -> np.ndarray:
    """Random pixels of so many patches."""
    return RNG.integers(0, 256, (frames, rows * vl_tiny.PATCH, columns * vl_tiny.PATCH, 3), dtype=np.uint8)


PIXELS = (noise(1, 4, 10), noise(4, 6, 4), noise(1, 12, 2))
TEXT = RNG.integers(7, 263, 200).tolist()


def prompt() -> tuple[list[int], list[Image]]:
    """Text, a picture, text, a video of 4 frames, text, a picture of another size, text."""
    tokens = TEXT[:5]
    images = []
    for pixels, after in zip(PIXELS, (TEXT[5:8], TEXT[8:19], TEXT[19:29]), strict=True):
        video = len(pixels) > 1
        image = vl_tiny.picture(pixels, len(tokens), video=video, second_per_grid=0.7)
        images.append(image)
        tokens = tokens + [vl_tiny.VIDEO if video else vl_tiny.IMAGE] * image.tokens + after
    return tokens, images


TOKENS, IMAGES = prompt()


def plan(spec: ModelSpec, tokens: Sequence[int], first: int, last: int, blocks: Sequence[int] = BLOCKS) -> StepPlan:
    """The step that feeds tokens first:last, and wants the logits of all."""
    feed = Feed(tokens[first:last], first, blocks, [(i, -1, -1) for i in range(last - first)])
    assert spec.vision is not None
    positions, _ = rope_positions(len(TOKENS), IMAGES, spec.vision)
    later = len(tokens) - len(TOKENS)
    after = positions.max() + 1 + np.arange(later)
    turned = np.concatenate([positions, np.broadcast_to(after, (3, later))], axis=1).astype(np.int32)
    planned = []
    for image in IMAGES:
        begin, end = max(image.start, first), min(image.start + image.tokens, last)
        if begin < end:
            planned.append(PlannedImage(image, begin - first, begin - image.start, end - begin))
    step = make_plan([feed], vl_tiny.VOCAB)
    return replace(step, rope_positions=np.ascontiguousarray(turned[:, first:last]), images=tuple(planned))


def steps(spec: ModelSpec, tokens: Sequence[int], cuts: Sequence[int]) -> list[StepPlan]:
    """The steps of a prompt that is cut."""
    return [plan(spec, tokens, a, b) for a, b in zip([0, *cuts], [*cuts, len(tokens)], strict=True)]
