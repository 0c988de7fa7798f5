"""A request's own deadline, its id, what the server tells of its load, and how much one key may ask at once."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from api_fake import Client, FakeEngine, events, make_server, on_port

from pagoda.api.http.body import MAX_BODY_BYTES


def test_a_deadline_ends_an_answer_with_an_error() -> None:
    engine = FakeEngine("word " * 100, delay_s=0.01)
    with Client(make_server(engine)) as client:
        for response in (
            client.chat(deadline_s=0.2),
            client.complete(deadline_s=0.2),
            client.post("/v1/responses", {"input": "Hi", "deadline_s": 0.2}),
        ):
            assert response.status_code == 504 and response.headers["x-should-retry"] == "false"
            error = response.json()["error"]
            assert (error["code"], error["param"]) == ("deadline_exceeded", "deadline_s")
        told = events(client.chat(deadline_s=0.2, stream=True))
        assert len(told) > 2 and told[-1]["error"]["code"] == "deadline_exceeded"
        assert engine.live == 0 and not client.server.busy
        start = time.monotonic()
        assert client.chat(deadline_s=60, max_tokens=2).status_code == 200 and time.monotonic() - start < 30
        for bad in (0, -1, 1e9):
            assert client.chat(deadline_s=bad).json()["error"]["param"] == "deadline_s"


def test_the_clients_id_comes_back(client: Client) -> None:
    sent = {"x-request-id": "abc-1"}
    assert client.post("/v1/completions", {"prompt": "x"}, headers=sent).headers["x-request-id"] == "abc-1"
    assert client.get("/health", headers=sent).headers["x-request-id"] == "abc-1"
    assert client.post("/v1/completions", b"{", headers=sent).headers["x-request-id"] == "abc-1"
    own = client.post("/v1/completions", {"prompt": "x"}, headers={"x-request-id": "a b"}).headers["x-request-id"]
    assert own.startswith("cmpl-")


def test_load_and_server_info(client: Client) -> None:
    assert client.get("/load").json() == {"server_load": 0}
    told = client.get("/server_info").json()
    assert (told["version"], told["models"], told["state"]) == ("1.2.3", ["fake-model"], "ready")
    assert told["engine"]["max_model_len"] == 512 and told["engine"]["device"] == "fake"


def test_a_key_has_a_limit_of_its_own() -> None:
    engine = FakeEngine("word " * 400, delay_s=0.01, max_model_len=4096)
    server = make_server(engine, api_keys=("one", "two"), max_requests_per_key=1)
    hi: list[Any] = [{"role": "user", "content": "Hi"}]
    with on_port(server, engine) as url:
        one, two = (openai.OpenAI(base_url=url + "/v1", api_key=key, max_retries=0) for key in ("one", "two"))
        running = one.chat.completions.create(model="fake-model", messages=hi, stream=True)
        next(iter(running))
        with pytest.raises(openai.RateLimitError) as caught:
            one.chat.completions.create(model="fake-model", messages=hi, max_tokens=1)
        assert caught.value.code == "rate_limit_exceeded" and caught.value.response.headers["retry-after"] == "1"
        headers = {"x-api-key": "one"}
        refused = httpx.post(url + "/v1/messages", json={"max_tokens": 1, "messages": hi}, headers=headers)
        assert refused.status_code == 429 and refused.json()["error"]["type"] == "rate_limit_error"
        assert two.chat.completions.create(model="fake-model", messages=hi, max_tokens=1).choices
        assert one.models.list().data  # takes nothing of the model
        assert 'reason="rate_limit"} 2.0' in httpx.get(url + "/metrics", headers=headers).text
        running.close()
        patient = one.with_options(max_retries=5)  # it waits as long as it is told, and asks again
        assert patient.chat.completions.create(model="fake-model", messages=hi, max_tokens=1).choices
        with pytest.raises(openai.BadRequestError):
            one.chat.completions.create(model="fake-model", messages=[], max_tokens=1)
        assert one.chat.completions.create(model="fake-model", messages=hi, max_tokens=1).choices


def test_without_keys_nobody_is_limited() -> None:
    with Client(make_server(max_requests_per_key=1)) as client:
        assert all(client.chat(max_tokens=1).status_code == 200 for _ in range(3))


def test_bodies_that_fill_the_memory_send_the_next_one_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagoda.api.app.MAX_BODIES_BYTES", 10_000)
    engine = FakeEngine("word " * 3)
    server = make_server(engine)
    begun, go_on = threading.Event(), threading.Event()
    small = {"prompt": "x" * 100, "max_tokens": 1}
    large = b'{"prompt": "x", "max_tokens": 1, "other": "' + b"y" * 20_000 + b'"}'

    def parts() -> Iterator[bytes]:
        yield large[:9_950]
        begun.set()
        assert go_on.wait(60)
        yield large[9_950:]

    with on_port(server, engine) as url, ThreadPoolExecutor(1) as pool:
        assert httpx.post(f"{url}/v1/completions", content=large).status_code == 200, "alone it may be larger"
        first = pool.submit(httpx.post, f"{url}/v1/completions", content=parts(), timeout=60)
        assert begun.wait(60)
        deadline = time.monotonic() + 60
        while (refused := httpx.post(f"{url}/v1/completions", json=small)).status_code == 200:
            assert time.monotonic() < deadline, "the first part is on its way"
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "server_overloaded"
        assert httpx.get(f"{url}/health").status_code == 200
        go_on.set()
        assert first.result().status_code == 200, "what was there first is answered"
        assert httpx.post(f"{url}/v1/completions", json=small).status_code == 200
        assert 'reason="memory_full"' in httpx.get(f"{url}/metrics").text


def test_the_place_of_a_request_that_breaks_off_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagoda.api.app.MAX_BODIES_BYTES", 1_000)

    def parts() -> Iterator[bytes]:
        yield b'{"prompt": "' + b"x" * 990
        raise KeyError

    engine = FakeEngine()
    with on_port(make_server(engine), engine) as url:
        for _ in range(3):
            with pytest.raises(KeyError):
                httpx.post(f"{url}/v1/completions", content=parts())
        deadline = time.monotonic() + 60
        while httpx.post(f"{url}/v1/completions", json={"prompt": "x" * 100}).status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_client_that_sends_all_before_it_reads_learns_the_limit() -> None:
    """asyncio's connections forget what has arrived when a write fails."""
    engine = FakeEngine("x")

    async def body() -> AsyncIterator[bytes]:
        yield bytes(MAX_BODY_BYTES + 1)
        for _ in range(4):
            await asyncio.sleep(0.05)  # by now the answer is known, and a closed connection would be noticed
            yield bytes(1 << 20)

    async def post(url: str, headers: dict[str, str]) -> httpx.Response:
        async with httpx.AsyncClient() as client:
            return await client.post(url + "/v1/completions", content=body(), headers=headers)

    with on_port(make_server(engine), engine) as url:
        for headers in ({}, {"content-length": str(MAX_BODY_BYTES + 1 + (4 << 20))}):
            response = asyncio.run(post(url, headers))
            assert response.status_code == 413 and "over the limit of 32 MiB" in response.text
