"""Streams go on while a picture is encoded: in pieces between steps, which change no token of anybody."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import vl_tiny

from pagoda.engine.core import EngineCore
from pagoda.errors import EngineError
from pagoda.options.engine_config import EngineConfig
from pagoda.sched.pace import Pace
from pagoda.types import Delta, Request, SamplingParams

PIXELS = np.random.default_rng(3).integers(0, 256, (1, 8 * vl_tiny.PATCH, 10 * vl_tiny.PATCH, 3), dtype=np.uint8)


def stream() -> Request:
    params = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True, seed=1)
    return Request(request_id="stream", prompt_token_ids=[20, 21, 22], params=params)


def with_picture(name: str = "picture") -> Request:
    picture = vl_tiny.picture(PIXELS, 3)
    prompt = [9, 10, 11, *[vl_tiny.IMAGE] * picture.tokens, 12, 13]
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, seed=1)
    return Request(request_id=name, prompt_token_ids=prompt, images=[picture], params=params)


def told(deltas: list[Delta], name: str) -> list[int]:
    return [token for delta in deltas if delta.request_id == name for token in delta.token_ids]


def finished(core: EngineCore) -> list[Delta]:
    deltas = []
    while core.has_work:
        deltas += core.step()
    return deltas


Make = Callable[[], EngineCore]


@pytest.fixture(params=["cpu", "torch-cpu"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    config = EngineConfig(
        model=vl_tiny.write(tmp_path), device=request.param, num_blocks=64, threads=2, max_model_len=256
    )
    made: list[EngineCore] = []

    def new() -> EngineCore:
        made.append(EngineCore(config))
        return made[-1]

    yield new
    for core in made:
        core.close()


def alone(core: EngineCore, request: Request) -> list[int]:
    core.add(request)
    return told(finished(core), request.request_id)


def test_a_stream_gets_tokens_while_a_picture_is_encoded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed, answer = alone(make(), stream()), alone(make(), with_picture())
    monkeypatch.setattr(Pace, "aside_s", lambda pace, load: 1e-9)
    core = make()
    core.add(stream())
    deltas = core.step()
    core.add(with_picture())
    before = 0
    while not told(deltas, "picture"):
        fresh = core.step()
        before += len(told(fresh, "stream"))
        deltas += fresh
    assert before > 4
    deltas += finished(core)
    assert told(deltas, "picture") == answer and told(deltas, "stream") == undisturbed


def test_a_picture_that_cannot_be_encoded_ends_its_own_request_only(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make()
    undisturbed = alone(core, stream())

    def fails(image: object, most_s: float) -> bool:
        if most_s:
            raise EngineError("the GPU has no memory left for this step")
        return False

    monkeypatch.setattr(core._executor, "encoded", fails)
    core.add(stream())
    core.add(with_picture())
    deltas = finished(core)
    (end,) = [delta for delta in deltas if delta.request_id == "picture"]
    assert end.finish_reason == "error" and end.error == "the GPU has no memory left for this step"
    assert told(deltas, "stream") == undisturbed
