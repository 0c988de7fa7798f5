"""`--replicas`: which one gets a request, and that nothing is lost or changed when one of them is killed."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import urllib.request
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import engine_fake as fake
import engine_tiny
import httpx
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from server_process import running, serve
from test_engine_client import check, collect, twenty, until

from pagoda.deploy.service.scrape import parse
from pagoda.engine.client import EngineClient
from pagoda.errors import ConfigError, EngineError
from pagoda.gateway.replicas import Replicas, environments, part_of
from pagoda.gateway.spread import CHUNK_TOKENS, MOST_BUSIER, Prefixes, choose, chunk_keys, request_keys
from pagoda.options.engine_config import EngineConfig
from pagoda.types import Adapter, Request, SamplingParams

MANY = "Tell me a story about the number "


def run(test: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(180):  # a dozen processes start, on a machine that may be busy
            await test

    asyncio.run(bounded())


def test_a_prompt_goes_where_its_beginning_is() -> None:
    prefixes = Prefixes()
    prompt = list(range(1000))
    prefixes.note(chunk_keys(prompt), 1)
    known = prefixes.known_tokens(chunk_keys([*prompt[:500], 7, 8, 9]))
    assert known == {1: 500 // CHUNK_TOKENS * CHUNK_TOKENS}
    assert choose({0: 0, 1: 0}, known) == 1
    assert choose({0: 0, 1: 3}, known) == 1
    assert choose({0: 0, 1: 4}, known) == 0, "busier by more than 448 tokens are worth"
    assert prefixes.known_tokens(chunk_keys([5, *prompt])) == {}
    assert prefixes.known_tokens(chunk_keys(prompt, "another tenant")) == {}
    prefixes.forget(1)
    assert prefixes.known_tokens(chunk_keys(prompt)) == {}


def test_a_short_beginning_in_common_does_not_bring_all_to_one() -> None:
    prefixes, loads = Prefixes(), {0: 0, 1: 0, 2: 0}
    for last in range(9):
        keys = chunk_keys([*range(70), *[last] * 30])
        index = choose(loads, prefixes.known_tokens(keys))
        prefixes.note(keys, index)
        loads[index] += 1
    assert set(loads.values()) == {3}


@given(
    st.dictionaries(st.integers(0, 5), st.integers(0, 40), min_size=1),
    st.dictionaries(st.integers(0, 5), st.integers(0, 9000)),
)
def test_nobody_is_much_busier_for_what_it_knows(loads: dict[int, int], known: dict[int, int]) -> None:
    index = choose(loads, known)
    assert loads[index] - min(loads.values()) <= MOST_BUSIER
    if known.get(index, 0) < 128:
        assert loads[index] == min(loads.values())


def test_an_adapter_has_a_cache_of_its_own_and_a_place_where_it_is_loaded() -> None:
    params, prompt = SamplingParams(seed=1), list(range(300))
    one, two = (Adapter(name=name, path="/x", stamp=name) for name in ("one", "two"))

    def keys(ids: list[int], adapter: Adapter | None) -> list[int]:
        return request_keys(Request(request_id="r", prompt_token_ids=ids, params=params, adapter=adapter))

    prefixes = Prefixes()
    prefixes.note(keys(prompt, one), 1)
    assert prefixes.known_tokens(keys(prompt, None)) == prefixes.known_tokens(keys(prompt, two)) == {}
    assert prefixes.known_tokens(keys(prompt, one)) == {1: 5 * CHUNK_TOKENS}
    short = prefixes.known_tokens(keys([1, 2, 3], one))
    assert choose({0: 0, 1: 0}, short) == 1, "it is loaded there"
    assert choose({0: 0, 1: 1}, short) == 0, "but that is no reason to wait"


def test_gpus_and_threads_are_divided() -> None:
    assert [one["CUDA_VISIBLE_DEVICES"] for one in environments(2, 2, {})] == ["0,1", "2,3"]
    named = {"CUDA_VISIBLE_DEVICES": "4,6,7"}
    assert [one["CUDA_VISIBLE_DEVICES"] for one in environments(3, 1, named)] == ["4", "6", "7"]
    with pytest.raises(ConfigError, match=r"CUDA_VISIBLE_DEVICES names 3.*--replicas 1"):
        environments(2, 2, named)
    part = part_of(EngineConfig(model="m", threads=8), 3)
    assert part.threads == 2 and part.reserved_bytes > 0


def replicas(count: int, **behaviour: float) -> Replicas:
    config = EngineConfig(model="fake")
    return Replicas([EngineClient(config, command=fake.command(**behaviour), backoff_s=0.01) for _ in range(count)])


@pytest.mark.parametrize("killed", [[0], [0, 1], [0, 1, 2, 0]])
def test_kills_of_replicas_in_twenty_streams(killed: list[int]) -> None:
    async def go() -> None:
        group = replicas(3, step_s=0.004)
        await group.start()
        clients: Any = group.engines
        try:
            wanted = twenty()
            streams = [asyncio.create_task(collect(group, one)) for one in wanted]  # type: ignore[arg-type]
            await asyncio.sleep(0.02)
            assert all(client.load >= 6 for client in clients)
            for index in killed:
                await until(lambda: clients[index].pid is not None and clients[index].ready)  # noqa: B023
                os.kill(clients[index].pid, signal.SIGKILL)
                await asyncio.sleep(0.02)
            for one, got in zip(wanted, await asyncio.gather(*streams), strict=True):
                check(one, got)
            await until(lambda: group.restarts == len(killed))
            assert all(client.load == 0 for client in clients)
        finally:
            await group.stop()

    run(go())


def test_a_request_that_kills_engines_ends_alone() -> None:
    async def go() -> None:
        group = replicas(2, kill=250, step_s=0.002)
        await group.start()
        try:
            wanted = twenty()
            poison = Request(request_id="bad", prompt_token_ids=[250], params=wanted[0].params)
            bad = asyncio.create_task(collect(group, poison))  # type: ignore[arg-type]
            for one, got in zip(wanted, await asyncio.gather(*(collect(group, w) for w in wanted)), strict=True):  # type: ignore[arg-type]
                check(one, got)
            assert (await bad).finish_reason == "error"
            assert group.restarts <= 4
        finally:
            await group.stop()

    run(go())


def test_one_that_is_given_up_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagoda.engine.client.MAX_DEATHS", 0)

    async def go() -> None:
        group = replicas(2, step_s=0.004)
        gone: list[str] = []
        group.on_dead = gone.append
        await group.start()
        clients: Any = group.engines
        try:
            wanted = twenty()
            streams = [asyncio.create_task(collect(group, one)) for one in wanted]  # type: ignore[arg-type]
            await asyncio.sleep(0.02)
            os.kill(clients[0].pid, signal.SIGKILL)
            for one, got in zip(wanted, await asyncio.gather(*streams), strict=True):
                check(one, got)
            await until(lambda: clients[0].dead)  # its streams may have ended before it was missed
            assert group.ready and not gone
            os.kill(clients[1].pid, signal.SIGKILL)
            await until(lambda: bool(gone))
            with pytest.raises(Exception, match="shutting down"):
                group.generate(wanted[0])
        finally:
            await group.stop()

    run(go())


def test_a_replica_that_cannot_load_ends_the_start() -> None:
    async def go() -> None:
        good = EngineClient(EngineConfig(model="fake"), command=fake.command())
        bad = EngineClient(EngineConfig(model="fake"), command=("false",), backoff_s=0.01)
        group = Replicas([good, bad])
        with pytest.raises(EngineError, match="while it loaded"):
            await group.start()
        await group.stop()

    run(go())


@pytest.fixture(scope="module")
def url(smollm2_path: str) -> Iterator[str]:
    command = serve(
        "--model", smollm2_path, "--replicas", "2", "--max-model-len", "1000", "--served-model-name", "smol"
    )
    with running(*command) as address:
        yield address


def ask(url: str, number: int, seen: Callable[[], object] = int) -> str:
    """The text of a stream, and its last finish reason; each event is `seen`."""
    sampled = {"temperature": 1.0, "seed": number} if number % 2 else {"temperature": 0.0}
    body = {
        "model": "smol", "stream": True, "max_tokens": 48, **sampled,
        "messages": [{"role": "user", "content": MANY + str(number)}],
    }  # fmt: skip
    text, reason = "", None
    with urllib.request.urlopen(
        urllib.request.Request(
            f"{url}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        ),
        timeout=120,
    ) as reply:
        for line in reply:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                seen()
                assert "error" not in event, event
                text += event["choices"][0]["delta"].get("content") or ""
                reason = event["choices"][0]["finish_reason"] or reason
    return f"{text}|{reason}"


def engines(url: str) -> list[psutil.Process]:
    """The engine processes of the server at that address."""
    port = urlsplit(url).port
    mine = psutil.Process().children()
    server = next(p for p in mine if any(c.laddr.port == port for c in p.net_connections("tcp")))
    return [
        child
        for child in server.children(recursive=True)
        if child.status() != psutil.STATUS_ZOMBIE and "pagoda.engine.process" in child.cmdline()
    ]


def test_kill_9_of_a_replica_in_twenty_streams_over_http(url: str) -> None:
    with ThreadPoolExecutor(20) as pool:
        expected = list(pool.map(lambda number: ask(url, number), range(20)))
        assert len(set(expected)) > 10 and all(each.endswith(("|length", "|stop")) for each in expected)
        victim = engines(url)[0]
        events = iter(range(10_000))

        def seen() -> None:
            if next(events) == 100:
                victim.kill()

        assert list(pool.map(lambda number: ask(url, number, seen), range(20))) == expected
    with urllib.request.urlopen(f"{url}/metrics") as reply:
        text = reply.read().decode()
    sums = parse(text, 0.0)
    assert sums.get("pagoda:engine_restarts_total", "smol") == 1
    assert 'vllm:num_requests_running{engine="1",model_name="smol"}' in text
    assert sums.get("vllm:generation_tokens_total", "smol") > 0


def test_threads_are_shared(tmp_path: Path, url: str) -> None:
    assert len(engines(url)) == 2
    with urllib.request.urlopen(f"{url}/server_info") as reply:
        info = json.load(reply)["engine"]
    assert info["device"].startswith("2 x cpu") and info["max_model_len"] == 1000


def test_adapters_are_on_all_replicas_and_come_and_go(tmp_path: Path) -> None:
    model = engine_tiny.write(tmp_path / "model")
    for name, size in (("first", 1.0), ("second", 0.5)):
        engine_tiny.write_adapter(tmp_path / name, size)
    words = (model, "--replicas", "2", "--threads", "2", "--lora-modules", f"first={tmp_path / 'first'}")
    words += ("--served-model-name", "tiny", "--allow-runtime-lora-updating", "--lora-dir", str(tmp_path))
    with (
        running(*serve(*words, "--no-enable-prefix-caching")) as url,
        httpx.Client(base_url=url, timeout=120) as client,
    ):

        def ask(model: str) -> str:
            body = {"model": model, "prompt": "Once upon", "max_tokens": 24, "temperature": 0, "ignore_eos": True}
            reply = client.post("/v1/completions", json=body)
            return str(reply.json()["choices"][0]["text"]) if reply.status_code == 200 else str(reply.status_code)

        def at_once(model: str) -> set[str]:
            with ThreadPoolExecutor(8) as pool:
                return set(pool.map(ask, [model] * 8))

        change = {"lora_name": "second", "lora_path": str(tmp_path / "second")}
        assert client.post("/v1/load_lora_adapter", json=change).status_code == 200
        told = [at_once(name) for name in ("tiny", "first", "second")]
        assert all(len(texts) == 1 for texts in told) and len(set.union(*told)) == 3
        steps = re.findall(r"(?m)^pagoda:engine_steps_total\{.*\} (\S+)", client.get("/metrics").text)
        assert len(steps) == 2 and min(map(float, steps)) > 20, "each replica had some"
        assert client.post("/v1/unload_lora_adapter", json={"lora_name": "second"}).status_code == 200
        assert at_once("second") == {"404"} and at_once("first") == told[1]
