"""Requests with images: their rows and positions in each step, and a prefix cache that tells images apart."""

from __future__ import annotations

import hashlib
from random import Random
from typing import Any

import msgspec
import pytest
from sched_fake import Harness, solo

from pagoda.arch.vision_spec import Vision
from pagoda.options.speculation import Speculation
from pagoda.sched.config import SchedulerConfig
from pagoda.types import BLOCK_SIZE, Image, Request, SamplingParams

PLACEHOLDER = 39
VISION = Vision(
    patch_size=1,
    temporal_patch_size=2,
    merge_size=2,
    hidden_size=8,
    heads=2,
    depth=1,
    intermediate_size=8,
    activation="quick_gelu",
    gated=False,
    norm="layer",
    norm_eps=1e-6,
    image_token_id=PLACEHOLDER,
    video_token_id=PLACEHOLDER,
    tokens_per_second=2.0,
)


def config(**changes: Any) -> SchedulerConfig:
    values: dict[str, Any] = {
        "num_blocks": 64,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 512,
        "max_model_len": 512,
        "vocab_size": 40,
        "vision": VISION,
    }
    return SchedulerConfig(**{**values, **changes})


def image(start: int, grid: tuple[int, int, int], shows: str, **more: Any) -> Image:
    digest = hashlib.blake2b(f"{grid} {shows}".encode(), digest_size=16).digest()
    tokens = grid[0] * grid[1] * grid[2] // 4
    return Image(start=start, tokens=tokens, grid=grid, pixels=b"", digest=digest, **more)


def request(name: str, *parts: list[int] | tuple[tuple[int, int, int], str], **params: Any) -> Request:
    """A prompt of runs of tokens, and of images."""
    prompt: list[int] = []
    images = []
    for part in parts:
        if isinstance(part, list):
            prompt += part
        else:
            images.append(image(len(prompt), *part, video=part[0][0] > 1))
            prompt += [PLACEHOLDER] * images[-1].tokens
    values = {"seed": 7, "max_tokens": 6, "ignore_eos": True, **params}
    return Request(request_id=name, prompt_token_ids=prompt, images=images, params=SamplingParams(**values))


def run(harness: Harness, *requests: Request) -> list[int]:
    """Run them to their ends; how many tokens each found in the cache."""
    for one in requests:
        harness.add(one)
    harness.run()
    for one in requests:
        told = harness.told[one.request_id]
        assert told.tokens == solo(one, harness.config).tokens
    return [max(harness.told[one.request_id].cached_tokens, default=0) for one in requests]


CAT = ((1, 8, 8), "cat")
DOG = ((1, 8, 8), "dog")
FILM = ((3, 4, 4), "film")


@pytest.mark.parametrize("budget", [5, 16, 17, 512])
@pytest.mark.parametrize("ahead", [False, True])
def test_however_the_prompt_is_cut_each_row_has_its_vector_and_its_positions(budget: int, ahead: bool) -> None:
    harness = Harness(config(max_num_batched_tokens=budget), ahead=ahead)
    with_images = request("a", [1, 2, 3], CAT, [4, 5], FILM, DOG, [6])
    run(harness, with_images, request("b", list(range(30))), request("c", CAT), request("d", [9], CAT, n=1))
    assert harness.steps_ahead or not ahead


def test_another_picture_in_the_same_place_is_not_the_same_prefix() -> None:
    harness = Harness(config())
    text = list(range(BLOCK_SIZE + 3))
    first, again, other = (request(name, text, what, text) for name, what in (("1", CAT), ("2", CAT), ("3", DOG)))
    assert run(harness, first) == [0]
    whole = len(first.prompt_token_ids) - 1
    assert run(harness, again) == [whole // BLOCK_SIZE * BLOCK_SIZE]
    assert run(harness, other) == [BLOCK_SIZE]  # the text before the picture, but not the block it begins in
    assert run(harness, request("4", text, ((1, 4, 16), "cat"), text)) == [BLOCK_SIZE]
    assert run(harness, request("5", text, [PLACEHOLDER] * 16, text)) == [BLOCK_SIZE]


def test_the_same_frames_at_another_speed_stand_elsewhere() -> None:
    harness = Harness(config())
    slow = request("slow", FILM, list(range(40)))
    fast = msgspec.structs.replace(
        slow, request_id="fast", images=[msgspec.structs.replace(slow.images[0], second_per_grid=0.5)]
    )
    assert run(harness, slow) == [0]
    assert run(harness, fast) == [0]


def test_two_pictures_that_begin_in_one_block_are_both_told() -> None:
    small = ((1, 4, 4), "a")
    others = [(small, ((1, 4, 4), "b")), (((1, 4, 4), "b"), small), (small, small)]
    harness = Harness(config())
    for number, (one, two) in enumerate(others):
        assert run(harness, request(str(number), [1, 2], one, two, list(range(30)))) == [0]


def test_put_back_and_resumed_requests_see_the_same() -> None:
    harness = Harness(config(num_blocks=9, max_num_batched_tokens=24))
    requests = [request(str(i), [i], CAT, [i, 3], DOG, max_tokens=70) for i in range(4)]
    run(harness, *requests)
    assert harness.scheduler.stats().preemptions
    whole = solo(requests[0], harness.config).tokens
    resumed = msgspec.structs.replace(requests[0], request_id="r", output_token_ids=whole[:11])
    fresh = Harness(config(num_blocks=9, max_num_batched_tokens=24))
    fresh.add(resumed)
    fresh.run()
    assert fresh.told["r"].tokens == whole[11:]


def test_drafts_have_positions_too() -> None:
    harness = Harness(config(speculation=Speculation(num_tokens=5, lookup_max=3, lookup_min=1, always=True)))
    run(harness, request("a", [1, 2, 3] * 8, CAT, [1, 2, 3] * 4, max_tokens=40, allowed_token_ids=(1, 2)))
    assert harness.scheduler.stats().spec_decode_num_draft_tokens


def test_streams_and_text_go_on_while_an_image_is_encoded() -> None:
    harness = Harness(config(), encodes=True)
    harness.add(request("stream", [1, 2], max_tokens=20))
    harness.planned()
    for name in ("1", "2"):
        harness.add(request(name, list(range(BLOCK_SIZE + 3)), CAT, [4, 5], DOG, [6]))
    assert harness.planned() == {"stream": 1}
    harness.add(request("text", [7, 8, 9], max_tokens=20))
    assert harness.planned() == {"stream": 1, "text": 3}
    assert harness.planned() == {"stream": 1, "text": 1}
    harness.encode()
    assert harness.scheduler.wanted_image() is None  # the next one might push out this one
    # what the second has in common with the first is computed once, as far as it fills blocks
    assert harness.planned() == {"stream": 1, "text": 1, "1": BLOCK_SIZE + 3 + 16 + 2, "2": 3 + 2}
    wanted = harness.scheduler.wanted_image()
    assert wanted is not None and wanted[0].digest == image(0, *DOG).digest and wanted[1] > 0
    assert harness.planned() == {"stream": 1, "text": 1}
    harness.encode()
    assert harness.planned() == {"stream": 1, "text": 1, "1": 17, "2": 17}
    assert harness.scheduler.wanted_image() is None
    harness.run()
    for name in ("1", "2"):
        assert harness.told[name].tokens == solo(harness.requests[name], harness.config).tokens


def test_what_needs_an_image_that_cannot_be_encoded_is_told_from_others() -> None:
    harness = Harness(config(), encodes=True)
    asked = [request("1", CAT, [3]), request("2", [1], DOG, [2], CAT), request("3", DOG), request("4", [1, 2])]
    for one in asked:
        harness.add(one)
    assert harness.scheduler.needing(asked[0].images[0]) == ["1", "2"]
    harness.cancel("1"), harness.cancel("2")
    harness.run()
    assert [harness.told[name].finish_reason for name in ("3", "4")] == ["length"] * 2


@pytest.mark.parametrize("encodes", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_random_mixes(seed: int, encodes: bool) -> None:
    rng = Random(seed)
    kinds = [((1, 2 * rng.randint(1, 4), 2 * rng.randint(1, 4)), str(i)) for i in range(3)] + [FILM]
    made = []
    for i in range(8):
        parts: list[Any] = []
        for _ in range(rng.randint(1, 3)):
            parts += [[rng.randrange(3)] * rng.randint(1, 20), rng.choice(kinds)]
        made.append(request(str(i), *parts, max_tokens=rng.randint(1, 12), prompt_logprobs=rng.choice([None, 1])))
    run(
        Harness(
            config(num_blocks=24, max_num_batched_tokens=rng.choice([7, 40])), ahead=bool(seed % 2), encodes=encodes
        ),
        *made,
    )
