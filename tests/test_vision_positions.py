"""Where tokens around and inside images stand, against transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel, Qwen2VLConfig, Qwen2VLModel

from pagoda.arch.mrope import rope_positions
from pagoda.arch.vision_spec import Vision
from pagoda.types import Image

TEXT, PICTURE, VIDEO = 5, 1, 2
SMALL = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}


def vision(tokens_per_second: float | None) -> Vision:
    return Vision(
        patch_size=4,
        temporal_patch_size=2,
        merge_size=2,
        hidden_size=16,
        heads=2,
        depth=1,
        intermediate_size=16,
        activation="silu",
        gated=True,
        norm="rms",
        norm_eps=1e-6,
        image_token_id=PICTURE,
        video_token_id=VIDEO,
        tokens_per_second=tokens_per_second,
    )


def placed(start: int, grid: tuple[int, int, int], *, second_per_grid: float | None = None) -> Image:
    """An image without pixels; one with a time is a video."""
    video = second_per_grid is not None
    tokens = grid[0] * grid[1] * grid[2] // 4
    return Image(
        start=start,
        tokens=tokens,
        grid=grid,
        pixels=b"",
        digest=b"",
        video=video,
        second_per_grid=second_per_grid or 1.0,
    )


def theirs(length: int, images: list[Image], *, newer: bool) -> tuple[np.ndarray, int]:
    """transformers' positions and delta, by a model that has no weights."""
    text = SMALL | {"num_hidden_layers": 1, "vocab_size": 8}
    wide = {"hidden_size": 16, "num_heads": 2, "depth": 1, "patch_size": 4, "tokens_per_second": 3}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=wide) if newer else Qwen2VLConfig(text_config=text)
    with torch.device("meta"):
        model = Qwen2_5_VLModel(config) if newer else Qwen2VLModel(config)
    kinds = torch.zeros(1, length, dtype=torch.int32)
    for image in images:
        kinds[0, image.start : image.start + image.tokens] = VIDEO if image.video else PICTURE
    still, moving = ([torch.tensor(i.grid) for i in images if i.video is kind] for kind in (False, True))
    times = {"second_per_grid_ts": torch.tensor([i.second_per_grid for i in images if i.video])} if newer else {}
    positions, delta = model.get_rope_index(
        torch.full((1, length), TEXT),
        kinds,
        image_grid_thw=torch.stack(still) if still else None,
        video_grid_thw=torch.stack(moving) if moving else None,
        **times,
    )
    return positions[:, 0].numpy(), int(delta)


CASES = {
    "text alone": (6, []),
    "one picture": (20, [placed(3, (1, 4, 6))]),
    "a picture at the very beginning": (10, [placed(0, (1, 6, 4))]),
    "a picture at the very end": (9, [placed(3, (1, 4, 6))]),
    "two of different sizes, text between": (40, [placed(2, (1, 4, 8)), placed(13, (1, 10, 4))]),
    "a video that is wider than long": (60, [placed(2, (2, 8, 12), second_per_grid=0.7)]),
    "a video between pictures": (
        90,
        [placed(1, (1, 4, 4)), placed(7, (2, 12, 4), second_per_grid=1.4), placed(36, (1, 2, 2))],
    ),
}


@pytest.mark.parametrize("newer", [True, False], ids=["qwen2_5_vl", "qwen2_vl"])
@pytest.mark.parametrize("case", CASES)
def test_positions_and_delta_are_transformers(case: str, newer: bool) -> None:
    length, images = CASES[case]
    positions, delta = rope_positions(length, images, vision(3 if newer else None))
    expected, expected_delta = theirs(length, images, newer=newer)
    np.testing.assert_array_equal(positions, expected)
    assert delta == expected_delta


def test_what_follows_a_long_video_stands_behind_its_last_frame() -> None:
    """As the models were trained: there transformers since 5.3 differs."""
    images = [placed(2, (4, 4, 4), second_per_grid=2.0)]
    positions, delta = rope_positions(20, images, vision(3))
    assert positions[0, 2:18].tolist() == [2] * 4 + [8] * 4 + [14] * 4 + [20] * 4
    assert positions[:, 18:].tolist() == [[21, 22]] * 3
    assert delta == 22 + 1 - 20


def test_an_image_fills_its_tokens() -> None:
    image = Image(start=0, tokens=3, grid=(1, 4, 4), pixels=b"", digest=b"")
    with pytest.raises(ValueError, match="1 x 2 x 2 vectors cannot fill 3 tokens"):
        rope_positions(5, [image], vision(None))
