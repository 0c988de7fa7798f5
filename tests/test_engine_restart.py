"""Twenty streams of a real model over `kill -9` of its engine: the same text and log-probabilities, bit for bit."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import engine_tiny
import pytest

from pagoda.engine.client import EngineClient
from pagoda.engine.core import EngineCore
from pagoda.engine.stream import merge
from pagoda.options.engine_config import EngineConfig
from pagoda.text.output import TextOutput
from pagoda.text.tokenizer import Tokenizer, load_tokenizer
from pagoda.types import Delta, Request, SamplingParams

DEVICES = ["reference", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return engine_tiny.write(tmp_path_factory.mktemp("tiny"))


def requests(tokenizer: Tokenizer) -> list[Request]:
    out = []
    for i in range(20):
        greedy = {"temperature": 0.0} if i % 2 else {"temperature": 1.0, "top_p": 0.95, "repetition_penalty": 1.1}
        scored = {"prompt_logprobs": 2} if i % 5 == 0 else {}
        given: dict[str, Any] = {"seed": i, "max_tokens": 60, "logprobs": 3, **greedy, **scored}
        prompt = tokenizer.encode("Once upon a time " * (i % 4 + 1) + str(i))
        out.append(Request(request_id=f"r{i}", prompt_token_ids=prompt, params=SamplingParams(**given)))
    return out


def undisturbed(config: EngineConfig, wanted: list[Request]) -> dict[str, Delta]:
    core = EngineCore(config)
    told = {one.request_id: Delta(request_id=one.request_id) for one in wanted}
    for one in wanted:
        core.add(one)
    while core.has_work:
        for delta in core.step():
            told[delta.request_id] = merge([told[delta.request_id], delta])
    core.close()
    return told


def over_kills(config: EngineConfig, wanted: list[Request], steps: int, *, restarts: int = 1) -> list[list[Delta]]:
    """The deltas of each request, from engines of which each is killed before its `steps`-th step."""

    async def collect(engine: EngineClient, one: Request) -> list[Delta]:
        return [delta async for delta in engine.generate(one)]

    async def go() -> list[list[Delta]]:
        command = [sys.executable, str(Path(__file__).parent / "engine_dying.py"), str(steps)]
        engine = EngineClient(config, command=command, backoff_s=0.01)
        async with asyncio.timeout(300):
            await engine.start()
            told = await asyncio.gather(*(collect(engine, one) for one in wanted))
            assert engine.restarts >= restarts
            await engine.stop()
        return told

    return asyncio.run(go())


@pytest.mark.parametrize("device", DEVICES)
def test_every_stream_ends_as_if_nothing_had_happened(model: str, device: str) -> None:
    config = EngineConfig(model=model, device=device, num_blocks=256, threads=1, max_num_batched_tokens=64)
    tokenizer = load_tokenizer(model, {})
    wanted = requests(tokenizer)
    expected = undisturbed(config, wanted)

    for one, deltas in zip(wanted, over_kills(config, wanted, 30, restarts=2), strict=True):
        text, same = TextOutput(tokenizer, one), expected[one.request_id]
        got = merge([text.feed(delta) for delta in deltas])
        assert len(got.token_ids) == 60
        assert (got.token_ids, got.logprobs) == (same.token_ids, same.logprobs)
        assert got.prompt_logprobs == same.prompt_logprobs
        assert (got.prompt_logprobs is not None) == (one.params.prompt_logprobs is not None)
        assert got.text == TextOutput(tokenizer, one).feed(same).text
