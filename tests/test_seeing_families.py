"""Families that see beside Qwen's VL (Gemma 3, Mistral 3, Qwen3.5): each executor, and cuts, against transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from seeing_models import (
    BOUNDS,
    DEVICES,
    MODELS,
    START,
    STOP,
    TEXT,
    inputs,
    load,
    logits,
    picture,
    pictures,
    prompt,
    spec_of,
    step,
    steps,
    vision_of,
    worst,
    write,
)
from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size

from pagoda.arch.vision_spec import Vision
from pagoda.backend.torch.split import middle
from pagoda.engine.core import EngineCore
from pagoda.engine.images import check_images
from pagoda.errors import BadRequest, ConfigError
from pagoda.media.place import Ends, place
from pagoda.media.size import find_sizing
from pagoda.options.engine_config import EngineConfig
from pagoda.sched.sight import Sight
from pagoda.types import Image, Request, SamplingParams

Case = tuple[str, Path, Any]


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, write(folder, request.param)


@pytest.mark.parametrize("device", DEVICES)
def test_logits_are_transformers_and_do_not_depend_on_cuts(device: str, case: Case) -> None:
    """Of a prompt with two pictures, which is cut where pictures may be."""
    kind, folder, model = case
    spec, vision = spec_of(folder), vision_of(folder)
    tokens, images = prompt(vision, pictures(kind, vision))
    executor = load(folder, device)
    whole = logits(executor, step(spec, tokens, images))
    with torch.no_grad():
        theirs = model(**inputs(kind, vision, tokens, images)).logits[0].numpy()
    assert worst(whole, theirs) < BOUNDS[device]
    first, second = images
    inside = (first.start + 3, second.start + 2) if not vision.both_ways else ()
    cuts = sorted({3, first.start, second.start + second.tokens, second.start - 1, *inside})
    cut = np.concatenate([logits(executor, each) for each in steps(spec, tokens, images, cuts)])
    assert np.array_equal(cut, whole)
    others = prompt(vision, [picture(vision, *image.grid[1:], 7) for image in images])[1]
    assert not np.allclose(logits(executor, step(spec, tokens, others))[-1], whole[-1], atol=1e-3)
    executor.close()


def test_a_picture_beside_other_requests_has_the_bits_that_it_has_alone(case: Case) -> None:
    """Also with more threads, and encoded in parts."""
    kind, folder, _ = case
    spec, vision = spec_of(folder), vision_of(folder)
    tokens, images = prompt(vision, pictures(kind, vision))
    alone, shared = load(folder, "cpu", threads=1), load(folder, "cpu", threads=3)
    expected = logits(alone, step(spec, tokens, images))
    while not shared.encoded(images[0], 1e-6):
        pass
    assert np.array_equal(logits(shared, step(spec, tokens, images, table=1)), expected)
    for executor in (alone, shared):
        executor.close()


def test_tokens_of_a_picture_see_each_other_in_one_step(tmp_path: Path) -> None:
    """Without the last position that each sees the logits are others; no step ends within a picture."""
    write(tmp_path, "gemma3")
    spec, vision = spec_of(tmp_path), vision_of(tmp_path)
    tokens, images = prompt(vision, pictures("gemma3", vision))
    whole = step(spec, tokens, images)
    executor = load(tmp_path, "reference")
    seen = logits(executor, whole)
    blind = logits(executor, replace(whole, last_seen=None))
    assert not np.allclose(seen[images[0].start], blind[images[0].start], atol=1e-3)
    request = Request(request_id="a", prompt_token_ids=tokens, images=images, params=SamplingParams())
    sight = Sight(request, vision)
    assert whole.last_seen is not None
    assert np.array_equal(sight.last_seen(0, len(tokens)), whole.last_seen)
    first, end = images[0].start, images[0].start + images[0].tokens
    taken = [sight.clear(at, 4, 100, lambda _: True) for at in (0, 3, first, first + 1, end - 2)]
    assert taken == [4, first - 3, end - first, end - first - 1, 4]
    assert sight.clear(first, 4, 10, lambda _: True) == 0
    assert middle(step(spec, tokens, images, last=end + 2), whole_requests=False) == first


def test_a_picture_of_a_gemma_stands_between_two_tokens_and_blank_lines() -> None:
    """Line breaks are cut into tokens together with those around them, as where the whole text is encoded."""

    def encode(text: str) -> list[int]:
        return [100 + len(text)] if set(text) == {"\n"} else [ord(letter) for letter in text]

    ends = Ends(START, STOP, encode)

    def tokens(image: Image) -> list[int]:
        return [7] * image.tokens

    image = Image(start=-1, tokens=4, grid=(1, 2, 2), pixels=b"", digest=b"")
    ids, placed = place([50, 101, START, 51, START, 102, 52], [image, image], START, None, tokens, None, ends)
    body = [START, 7, 7, 7, 7, STOP]
    assert ids == [50, 103, *body, 102, 51, 102, *body, 104, 52]
    assert [each.start for each in placed] == [3, 12]
    ids, _ = place([START, START], [image, image], START, None, tokens, None, ends)
    assert ids == [102, *body, 104, *body, 102]


@pytest.mark.parametrize("size", [(640, 480), (3000, 1000), (64, 48), (1540, 1541), (5, 900)])
def test_sizes_of_mistrals_pictures_are_transformers(size: tuple[int, int]) -> None:
    sizing = find_sizing(14, 1, 2, ({"size": {"longest_edge": 1540}}, {}), {}, longest_edge=1540, row_ends=True)
    theirs = get_resize_output_image_size(np.zeros((*size[::-1], 3)), (1540, 1540), (28, 28))
    assert sizing.fit(*size)[::-1] == theirs
    lower = sizing.lowered({"max_pixels": 28 * 28 * 100})
    width, height = lower.fit(*size)
    assert width * height <= 28 * 28 * 100


def test_a_gemma_is_given_pictures_of_one_size() -> None:
    sizing = find_sizing(14, 1, 4, ({"resample": 2, "size": {"height": 896, "width": 896}}, {}), {}, side=896)
    assert (sizing.fit(30, 9000), sizing.tokens((1, 64, 64)), sizing.resample) == ((896, 896), 256, 2)
    with pytest.raises(BadRequest, match="896 x 896 pixels only"):
        sizing.lowered({"max_pixels": 100_000})
    with pytest.raises(ConfigError, match="896 x 896"):
        find_sizing(14, 1, 4, ({}, {}), {"max_pixels": 100_000}, side=896)


def test_rows_of_a_picture_end_with_tokens_of_their_own(tmp_path: Path) -> None:
    write(tmp_path, "mistral3")
    vision = vision_of(tmp_path)
    assert vision.placeholders((1, 4, 6)) == [7, 7, 7, 12, 7, 7, 7, 13]
    assert vision.vector_places((1, 4, 6)).tolist() == [0, 1, 2, -1, 3, 4, 5, -1]
    tokens, images = prompt(vision, pictures("mistral3", vision))
    request = Request(request_id="a", prompt_token_ids=tokens, images=images, params=SamplingParams())
    check_images(request, vision)
    broken = [12 if token == 13 else token for token in tokens]
    with pytest.raises(BadRequest, match="does not lie on its placeholders"):
        check_images(Request(request_id="a", prompt_token_ids=broken, images=images, params=SamplingParams()), vision)


def generated(folder: Path, asked: list[tuple[list[int], list[Image]]], **options: Any) -> list[Any]:
    """The tokens of requests and their scores, through the engine."""
    config = EngineConfig(**{"model": str(folder), "device": "cpu", "num_blocks": 64, "speculation": None, **options})
    core = EngineCore(config)
    told: dict[str, Any] = {}
    for i, (tokens, images) in enumerate(asked):
        params = SamplingParams(max_tokens=8, temperature=0, seed=0, ignore_eos=True, logprobs=1)
        core.add(Request(request_id=str(i), prompt_token_ids=tokens, images=images, params=params))
        told[str(i)] = []
    try:
        while any(len(answer) < 8 for answer in told.values()):
            for delta in core.step():
                assert delta.error is None
                told[delta.request_id] += [(each.token_id, each.logprob) for each in delta.logprobs or ()]
    finally:
        core.close()
    return list(told.values())


def several(vision: Vision, kind: str) -> list[tuple[list[int], list[Image]]]:
    """Two of one prompt, one that begins as they do, one without pictures, and one with other pictures."""
    shown = pictures(kind, vision)
    tokens, images = prompt(vision, shown)
    cut = images[1].start + images[1].tokens
    other = prompt(vision, [picture(vision, *image.grid[1:], 9) for image in shown])
    return [(tokens, images), (tokens, images), ([*tokens[:cut], 40, 41], images), (TEXT[:30], []), other]


@pytest.mark.parametrize("kind", MODELS)
def test_company_budgets_and_the_cache_change_no_bit_of_an_answer(kind: str, tmp_path: Path) -> None:
    write(tmp_path, kind)
    asked = several(vision_of(tmp_path), kind)
    alone = [generated(tmp_path, [each], prefix_caching=False)[0] for each in asked]
    assert alone[0] == alone[1] != alone[4]
    for options in ({"max_num_batched_tokens": 24, "max_num_seqs": 5}, {"max_num_seqs": 2, "num_blocks": 7}):
        assert generated(tmp_path, asked, **options) == alone


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma3", "mistral3"])
def test_two_ranks_give_the_tokens_of_one(kind: str, tmp_path: Path) -> None:
    write(tmp_path, kind)
    asked = several(vision_of(tmp_path), kind)[1:]
    one, two = (generated(tmp_path, asked, device="torch-cpu", tensor_parallel_size=size) for size in (1, 2))
    assert [[token for token, _ in answer] for answer in two] == [[token for token, _ in answer] for answer in one]
