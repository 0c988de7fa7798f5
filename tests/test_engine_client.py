"""EngineClient over real processes: streams outlive the engine, and one request cannot end the others."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import engine_fake as fake
import psutil
import pytest

from pagoda.engine.client import EngineClient
from pagoda.engine.roster import SET_ASIDE
from pagoda.engine.stream import merge
from pagoda.errors import EngineError, MemoryShort, Overloaded
from pagoda.options.engine_config import EngineConfig
from pagoda.types import Delta, Request, SamplingParams

KILL, HANG = 250, 251


def request(name: str, prompt: list[int], **params: Any) -> Request:
    sampling = SamplingParams(**{"temperature": 0.0, "seed": 1, "max_tokens": 10, **params})
    return Request(request_id=name, prompt_token_ids=prompt, params=sampling)


def client(config: dict[str, Any] | None = None, options: dict[str, Any] | None = None, **behaviour: float) -> Any:
    given = {"command": fake.command(**behaviour), "backoff_s": 0.01, **(options or {})}
    return EngineClient(EngineConfig(model="fake", **(config or {})), **given)


@asynccontextmanager
async def running(
    config: dict[str, Any] | None = None, options: dict[str, Any] | None = None, **behaviour: float
) -> AsyncIterator[EngineClient]:
    engine = client(config, options, **behaviour)
    try:
        await engine.start()
        yield engine
    finally:
        await engine.stop()


async def collect(engine: EngineClient, wanted: Request) -> Delta:
    """All deltas of a request as one."""
    whole = Delta(request_id=wanted.request_id)
    async for delta in engine.generate(wanted):
        assert delta.request_id == wanted.request_id
        whole = merge([whole, delta])
    assert whole.finish_reason is not None
    return whole


def run(test: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await test

    asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def hit(engine: EngineClient, number: signal.Signals) -> None:
    assert engine.pid is not None  # no pid would be 0 to kill(): this whole process group
    os.kill(engine.pid, number)


def twenty() -> list[Request]:
    out = [request(f"greedy{i}", [i + 1] * (i + 1), max_tokens=40, logprobs=1) for i in range(10)]
    for i in range(10):
        more = {"logprobs": 0, "prompt_logprobs": 0} if i % 2 else {}
        out.append(request(f"seeded{i}", [i + 1, 7], max_tokens=40, temperature=1.0, seed=i, **more))
    return out


def check(wanted: Request, got: Delta) -> None:
    p = wanted.params
    tokens = fake.expected(wanted.prompt_token_ids, p.max_tokens or 0, p.seed or 0, p.temperature)
    assert got.token_ids == tokens and got.finish_reason == "length"
    assert [one.token_id for one in got.logprobs or []] == (tokens if p.logprobs is not None else [])
    scored = [one and one.token_id for one in got.prompt_logprobs or []]
    assert scored == ([None, *wanted.prompt_token_ids[1:]] if p.prompt_logprobs is not None else [])


def test_streams_and_stats() -> None:
    async def go() -> None:
        async with running() as engine:
            assert engine.ready and engine.info.architecture == "fake"
            wanted = twenty()
            for one, got in zip(wanted, await asyncio.gather(*(collect(engine, w) for w in wanted)), strict=True):
                check(one, got)
            stats = engine.stats
            assert stats.scheduler.generation_tokens == 800 and stats.steps >= 40 and stats.last_step_s > 0
            assert stats.scheduler.running == stats.scheduler.waiting == stats.scheduler.blocks_used == 0

    run(go())


@pytest.mark.parametrize("kills", [1, 2, 4])
def test_killed_in_the_middle_of_twenty_streams(kills: int) -> None:
    async def go() -> None:
        async with running(step_s=0.01) as engine:
            wanted = twenty()
            streams = [asyncio.create_task(collect(engine, w)) for w in wanted]
            for kill in range(kills):
                await until(lambda: engine.ready and engine.stats.steps > 3)
                hit(engine, signal.SIGKILL)
                await until(lambda: not engine.ready)
                await until(lambda: engine.restarts == kill + 1)  # noqa: B023
            for one, got in zip(wanted, await asyncio.gather(*streams), strict=True):
                check(one, got)
            assert engine.restarts == kills

    run(go())


def test_requests_that_come_while_it_is_down_wait() -> None:
    async def go() -> None:
        async with running(load_s=0.2) as engine:
            hit(engine, signal.SIGKILL)
            await until(lambda: not engine.ready)
            stream = asyncio.create_task(collect(engine, request("a", [3])))
            await asyncio.sleep(0.01)
            assert engine.stats.scheduler.waiting == 1 and not engine.ready
            check(request("a", [3]), await stream)

    run(go())


def test_one_poisonous_request_does_not_take_the_others() -> None:
    async def go() -> None:
        async with running(kill=KILL, step_s=0.005) as engine:
            wanted = twenty()
            others = [asyncio.create_task(collect(engine, w)) for w in wanted]
            await asyncio.sleep(0.05)
            poison = await collect(engine, request("poison", [KILL]))
            assert (poison.finish_reason, poison.error, poison.token_ids) == ("error", SET_ASIDE, [])
            for one, got in zip(wanted, await asyncio.gather(*others), strict=True):
                check(one, got)
            assert not engine.dead and engine.restarts <= 3

    run(go())


def test_poison_alone_is_set_aside_at_its_second_kill() -> None:
    async def go() -> None:
        async with running(kill=KILL) as engine:
            poison = await collect(engine, request("poison", [KILL]))
            assert poison.error == SET_ASIDE
            check(request("after", [4]), await collect(engine, request("after", [4])))
            assert engine.restarts == 2

    run(go())


def test_a_hung_engine_is_restarted() -> None:
    async def go() -> None:
        async with running(None, {"hang_limit_s": 0.4}, hang=HANG) as engine:
            stuck = await collect(engine, request("stuck", [HANG]))
            assert stuck.error == SET_ASIDE
            await until(lambda: engine.ready)
            pid = engine.pid
            stream = asyncio.create_task(collect(engine, request("long", [3], max_tokens=400)))
            await until(lambda: engine.stats.scheduler.running == 1)
            hit(engine, signal.SIGSTOP)
            check(request("long", [3], max_tokens=400), await stream)
            assert engine.pid != pid

    run(go())


@pytest.mark.alone
def test_a_slow_step_and_an_idle_engine_are_not_hung() -> None:
    async def go() -> None:
        async with running(None, {"hang_limit_s": 0.4}, step_s=0.3) as engine:
            await asyncio.sleep(0.6)
            check(request("a", [3], max_tokens=4), await collect(engine, request("a", [3], max_tokens=4)))
            assert engine.restarts == 0

    run(go())


def test_the_engine_is_given_up_after_too_many_deaths() -> None:
    async def go() -> None:
        reasons: list[str] = []
        async with running(None, {"on_dead": reasons.append, "backoff_s": 0.001}, step_s=0.005) as engine:
            stream = asyncio.create_task(collect(engine, request("a", [3], max_tokens=500)))
            for _ in range(6):
                await until(lambda: engine.ready and engine.stats.scheduler.running == 1)
                await asyncio.sleep(0.02)
                hit(engine, signal.SIGKILL)
                await until(lambda: not engine.ready)
            assert (await stream).finish_reason == "error"
            await until(lambda: engine.dead)
            assert len(reasons) == 1 and "6 times" in reasons[0]
            with pytest.raises(Overloaded):
                engine.generate(request("b", [3]))

    run(go())


def test_load_errors_keep_their_kind_and_remedy() -> None:
    async def go() -> None:
        engine = client({"device": "short"})
        with pytest.raises(MemoryShort) as caught:
            await engine.start()
        assert "--fake-memory" in caught.value.remedy and caught.value.exit_code == 75
        await engine.stop()

    run(go())


def test_death_while_loading_is_told_after_one_more_try() -> None:
    async def go() -> None:
        engine = client(options={"command": [sys.executable, "-c", "raise SystemExit(9)"]})
        with pytest.raises(EngineError, match="exit code 9 while it loaded"):
            await engine.start()
        assert engine.restarts == 1
        await engine.stop()

    run(go())


def test_progress_is_told_and_spawn_needs_no_loop() -> None:
    engine = client()
    engine.spawn()
    told: list[tuple[str, float]] = []

    async def go() -> None:
        await engine.start(lambda phase, share: told.append((phase, share)))
        await engine.stop()

    run(go())
    assert told == [("weights", 0.0), ("weights", 1.0)]


def test_stop_without_start_leaves_no_process() -> None:
    engine = client()
    engine.spawn()
    process = psutil.Process(engine.pid)

    async def go() -> None:
        await engine.stop()

    run(go())
    assert not process.is_running()


@pytest.mark.parametrize("way", ["aclose", "task", "dropped"])
@pytest.mark.alone
def test_leaving_cancels_within_a_step(way: str) -> None:
    async def go() -> None:
        async with running(step_s=0.005) as engine:
            if way == "task":
                task = asyncio.create_task(collect(engine, request("a", [3] * 40, max_tokens=400)))
                await until(lambda: engine.stats.scheduler.running == 1)
                task.cancel()
            else:
                stream = engine.generate(request("a", [3] * 40, max_tokens=400))
                async for _ in stream:
                    break
                assert engine.stats.scheduler.blocks_used == 3
                if way == "aclose":
                    await stream.aclose()
                del stream
            started = time.monotonic()
            await until(lambda: engine.stats.scheduler.blocks_used == 0)
            assert time.monotonic() - started < 0.5
            assert engine.stats.scheduler.generation_tokens < 100

    run(go())


def test_closing_before_the_first_delta_works() -> None:
    async def go() -> None:
        async with running(step_s=0.005) as engine:
            await engine.generate(request("a", [3], max_tokens=400)).aclose()
            assert await engine.drain(1.0)

    run(go())


def test_a_slow_consumer_gets_one_merged_delta() -> None:
    async def go() -> None:
        async with running() as engine:
            wanted = request("a", [3], max_tokens=50, logprobs=0)
            stream = engine.generate(wanted)
            await until(lambda: engine.stats.scheduler.generation_tokens == 50)
            deltas = [delta async for delta in stream]
            assert len(deltas) == 1
            check(wanted, deltas[0])

    run(go())


def test_no_more_than_may_queue() -> None:
    async def go() -> None:
        async with running({"max_num_seqs": 1}, {"max_queued": 1}, step_s=0.01) as engine:
            streams = [engine.generate(request(f"{i}", [3], max_tokens=400)) for i in range(2)]
            with pytest.raises(Overloaded):
                engine.generate(request("2", [3]))
            await streams[0].aclose()
            await engine.generate(request("3", [3])).aclose()

    run(go())


def test_drain_waits_then_ends_with_an_error() -> None:
    async def go() -> None:
        async with running(step_s=0.01) as engine:
            short = asyncio.create_task(collect(engine, request("short", [3], max_tokens=5)))
            long = asyncio.create_task(collect(engine, request("long", [3], max_tokens=500)))
            await until(lambda: engine.stats.scheduler.running == 2)
            assert not await engine.drain(0.3)
            assert (await short).finish_reason == "length"
            assert ((await long).finish_reason, (await long).token_ids != []) == ("error", True)
            with pytest.raises(Overloaded):
                engine.generate(request("late", [3]))
            await until(lambda: engine.stats.scheduler.running == 0)

    run(go())


def test_a_seed_is_chosen_once() -> None:
    async def go() -> None:
        async with running(step_s=0.01) as engine:
            unseeded = request("a", [3], seed=None, temperature=1.0, max_tokens=40)
            stream = engine.generate(unseeded)
            await until(lambda: engine.stats.steps > 5)
            hit(engine, signal.SIGKILL)
            tokens = [token async for delta in stream for token in delta.token_ids]
            seed = stream._stream.request.params.seed
            assert seed is not None and tokens == fake.expected([3], 40, seed, 1.0) and engine.restarts == 1
            assert tokens != (await collect(engine, unseeded)).token_ids

    run(go())


def test_random_mix_with_kills_and_cancels() -> None:
    async def go() -> None:
        rng = random.Random(5)
        config = {"num_blocks": 24, "max_num_seqs": 6, "max_num_batched_tokens": 32, "max_model_len": 300}
        async with running(config, {"backoff_s": 0.001}, step_s=0.001) as engine:

            async def one(i: int) -> None:
                prompt = [rng.randrange(1, 250) for _ in range(rng.randrange(1, 120))]
                wanted = request(f"{i}", prompt, temperature=1.0, seed=i, max_tokens=rng.randrange(1, 60), logprobs=0)
                await asyncio.sleep(rng.random() * 0.8)
                if rng.random() < 0.25:
                    stream = engine.generate(wanted)
                    async for _ in stream:
                        break
                    await stream.aclose()
                else:
                    check(wanted, await collect(engine, wanted))

            tasks = [asyncio.create_task(one(i)) for i in range(80)]
            for _ in range(3):
                await until(lambda: engine.ready and engine.stats.scheduler.generation_tokens > 300)
                hit(engine, signal.SIGKILL)
                await until(lambda: not engine.ready)
            await asyncio.gather(*tasks)
            await until(lambda: engine.stats.scheduler.blocks_used == 0)

    run(go())
