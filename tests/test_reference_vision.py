"""Vision models in the reference executor, on tiny random checkpoints, against transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import vl_tiny
import vl_trained
from PIL import Image as Pil
from reference_plans import Feed, make_plan
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from vl_cases import IMAGES, LIMITS, PIXELS, TEXT, TOKENS, steps

from pagoda.arch.mrope import rope_positions
from pagoda.arch.registry import load_spec
from pagoda.backend.reference_vision import ReferenceVision
from pagoda.backend.select import load_executor
from pagoda.backend.vision import Encoded, patches
from pagoda.types import Float32, Image, PlannedImage
from pagoda.weights.open import open_source

BOUND = 1e-4


@pytest.fixture(scope="module", params=vl_tiny.KINDS)
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    return vl_tiny.write(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def model(folder: str) -> Any:
    return transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def executor(folder: str) -> Iterator[ReferenceVision]:
    source = open_source(folder)
    made = load_executor("reference", load_spec(source), source, LIMITS)
    assert isinstance(made, ReferenceVision)
    yield made
    made.close()


def pixel_values(image: Image, pixels: np.ndarray) -> torch.Tensor:
    """Patches by transformers; of a video, its pairs of frames as pictures whose frames are then put together."""
    if len(pixels) == 1:
        made = Qwen2VLImageProcessorPil(do_resize=False)(Pil.fromarray(pixels[0]), return_tensors="pt")
        assert made["image_grid_thw"].tolist() == [list(image.grid)]
        return made["pixel_values"]
    alone = [pixel_values(image_of(frame), frame) for frame in pixels[:, None]]
    by_frame = [each.view(len(each), 3, 2, -1)[:, :, :1] for each in alone]
    pairs = [torch.cat(by_frame[i : i + 2], dim=2) for i in range(0, len(by_frame), 2)]
    return torch.cat(pairs).flatten(1)


def image_of(pixels: np.ndarray) -> Image:
    return vl_tiny.picture(pixels, 0)


def inputs(tokens: Sequence[int], images: Sequence[Image]) -> dict[str, Any]:
    """What transformers' model takes."""
    made: dict[str, Any] = {"input_ids": torch.tensor([tokens])}
    still = [(i, p) for i, p in zip(images, PIXELS, strict=True) if not i.video]
    made["pixel_values"] = torch.cat([pixel_values(i, p) for i, p in still])
    made["image_grid_thw"] = torch.tensor([i.grid for i, _ in still])
    moving = [(i, p) for i, p in zip(images, PIXELS, strict=True) if i.video]
    made["pixel_values_videos"] = torch.cat([pixel_values(i, p) for i, p in moving])
    made["video_grid_thw"] = torch.tensor([i.grid for i, _ in moving])
    kinds = [1 if t == vl_tiny.IMAGE else 2 if t == vl_tiny.VIDEO else 0 for t in tokens]
    return made | {"mm_token_type_ids": torch.tensor([kinds], dtype=torch.int32)}


def their_logits(model: Any, tokens: Sequence[int]) -> Float32:
    """Of every token, by their own positions."""
    made = inputs(tokens, IMAGES)
    if model.config.model_type == "qwen2_5_vl":
        made["second_per_grid_ts"] = torch.tensor([0.7])
    with torch.no_grad():
        return np.asarray(model(**made).logits[0].numpy(), np.float32)


def our_logits(executor: ReferenceVision, tokens: Sequence[int], cuts: Sequence[int]) -> Float32:
    """Of every token, the prompt cut into steps."""
    return np.concatenate([executor.logits(step) for step in steps(executor.spec, tokens, cuts)])


def worst(ours: Float32, theirs: Float32) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def test_patches_are_transformers(folder: str) -> None:
    vision = load_spec(open_source(folder)).vision
    assert vision is not None
    for image, pixels in zip(IMAGES, PIXELS, strict=True):
        np.testing.assert_allclose(patches(image, vision), pixel_values(image, pixels).numpy(), atol=1e-5)


def test_vectors_of_images_are_transformers(executor: ReferenceVision, model: Any) -> None:
    for image, pixels in zip(IMAGES, PIXELS, strict=True):
        with torch.no_grad():
            grid = torch.tensor([image.grid])
            theirs = model.model.visual(pixel_values(image, pixels), grid_thw=grid).pooler_output.numpy()
        assert worst(executor.encoder.encode(image), theirs) < BOUND


def test_logits_are_transformers(executor: ReferenceVision, model: Any) -> None:
    assert worst(our_logits(executor, TOKENS, []), their_logits(model, TOKENS)) < BOUND


def test_greedy_tokens_are_transformers(executor: ReferenceVision, model: Any) -> None:
    """Each token that follows stands behind the largest position so far."""
    tokens = list(TOKENS)
    for _ in range(6):
        tokens.append(int(our_logits(executor, tokens, [])[-1].argmax()))
    made = inputs(TOKENS, IMAGES)
    if model.config.model_type == "qwen2_5_vl":
        made["second_per_grid_ts"] = torch.tensor([0.7])
    with torch.no_grad():
        theirs = model.generate(**made, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert tokens == theirs[0].tolist()


@pytest.mark.parametrize("cuts", [[1, 6, 7, 30], [10, 11, 25, 26, 27, 50], [41]])
def test_logits_do_not_depend_on_where_the_prompt_is_cut(executor: ReferenceVision, cuts: list[int]) -> None:
    whole = our_logits(executor, TOKENS, [])
    np.testing.assert_array_equal(our_logits(executor, TOKENS, cuts), whole)


def test_an_image_that_was_dropped_is_encoded_again(executor: ReferenceVision) -> None:
    """Preempted: the prompt comes again, in other steps, after its images have left the memory."""
    first = our_logits(executor, TOKENS, [20])
    executor._encoded._most_bytes = 1
    np.testing.assert_array_equal(our_logits(executor, TOKENS, [8, 33]), first)


def test_the_newer_spelling_of_config_and_names_is_the_same_model(folder: str, model: Any, tmp_path: Path) -> None:
    """As transformers writes it today: text_config, rope_parameters, model.visual and model.language_model."""
    model.save_pretrained(tmp_path)
    old, new = open_source(folder), open_source(str(tmp_path))
    assert load_spec(new) == load_spec(old)
    assert "text_config" in new.config
    made = load_executor("reference", load_spec(new), new, LIMITS)
    assert isinstance(made, ReferenceVision)
    assert worst(our_logits(made, TOKENS, []), their_logits(model, TOKENS)) < BOUND


def test_text_alone_needs_no_positions(executor: ReferenceVision, model: Any) -> None:
    rows = [(i, -1, -1) for i in range(30)]
    ours = executor.logits(make_plan([Feed(TEXT[:30], 0, [3, 1], rows)], vl_tiny.VOCAB))
    with torch.no_grad():
        theirs = model(input_ids=torch.tensor([TEXT[:30]])).logits[0].numpy()
    assert worst(ours, theirs) < BOUND


def test_what_is_encoded_is_kept_up_to_a_size() -> None:
    asked: list[int] = []

    def begin(image: Image) -> Callable[[float], Float32 | None]:
        asked.append(image.start)
        return lambda most_s: np.zeros(10, np.float32) if most_s > 1 else None

    kept: Encoded[Float32] = Encoded(80, begin)
    images = [Image(start=i, tokens=1, grid=(1, 2, 2), pixels=b"", digest=bytes([i])) for i in range(3)]
    for i in (0, 1, 0, 2, 0, 1):
        kept.vectors(images[i])
    assert asked == [0, 1, 2, 1]
    small: Encoded[Float32] = Encoded(1, begin)
    for i in (0, 0, 1, 1, 0):
        small.vectors(images[i])
    assert asked[4:] == [0, 1, 0]
    # in parts: it is begun once, unless another comes in between
    assert not small.ready(images[1], 0.0) and not small.ready(images[1], 0.1) and not small.ready(images[1], 0.1)
    assert small.ready(images[0], 0.0) and small.ready(images[1], 2.0) and asked[7:] == [1]
    assert not small.ready(images[2], 0.1) and not small.ready(images[0], 0.1)
    assert small.ready(images[2], 2.0) and asked[8:] == [2, 0, 2]


@pytest.mark.parametrize("grid", [(1, 4, 4), (1, 10, 12), (2, 4, 4)], ids=["picture", "large picture", "video"])
def test_a_trained_model_names_what_it_sees(grid: tuple[int, int, int]) -> None:
    source = open_source(vl_trained.trained())
    made = load_executor("reference", load_spec(source), source, LIMITS)
    assert isinstance(made, ReferenceVision) and made.spec.vision is not None
    part = {"type": "image" if grid[0] == 1 else "video"}
    for colour in vl_trained.COLOURS:
        content = [part, {"type": "text", "text": "What colour is this?"}]
        tokens = vl_trained.Teacher().ids(vl_trained.prompt(content), grid)
        start = min(tokens.index(t) for t in (vl_tiny.IMAGE, vl_tiny.VIDEO) if t in tokens)
        image = vl_tiny.picture(vl_trained.plain(colour, grid), start, video=grid[0] > 1)
        positions, delta = rope_positions(len(tokens), [image], made.spec.vision)
        said: list[int] = []
        while vl_tiny.END not in said and len(said) < 10:
            fed, place = ([said[-1]], len(tokens) + len(said) - 1) if said else (tokens, 0)
            step = make_plan([Feed(fed, place, range(16), [(len(fed) - 1, -1, -1)])], vl_tiny.VOCAB)
            turned = np.full((3, 1), place + delta, np.int32) if said else positions
            parts = () if said else (PlannedImage(image, start, 0, image.tokens),)
            said += made.launch(replace(step, rope_positions=turned, images=parts)).wait().tokens.tolist()
        assert vl_tiny.tokenizer().decode(said) == colour
