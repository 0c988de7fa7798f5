"""The package `ollama` against a server on a port."""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx
import ollama
import pytest
from api_fake import TEXT, FakeEngine, make_server, on_port

from pagoda.options.http import HttpOptions

HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    engine = FakeEngine(architecture="llama")
    with on_port(make_server(engine), engine) as base:
        yield base


@pytest.fixture(scope="module")
def client(url: str) -> ollama.Client:
    return ollama.Client(host=url, timeout=60)


def test_chat(client: ollama.Client) -> None:
    reply = client.chat("fake-model", HI, keep_alive=-1, options={"seed": 1})
    assert reply.message.content == TEXT and reply.done_reason == "stop" and reply.eval_count == 54
    parts = list(client.chat("fake-model:latest", HI, stream=True, think=False))
    assert "".join(part.message.content or "" for part in parts) == TEXT
    assert parts[-1].done and (parts[-1].total_duration or 0) > 0


def test_generate(client: ollama.Client) -> None:
    assert client.generate("fake-model", "Hi").response == TEXT
    parts = list(client.generate("fake-model", "Hi", stream=True, options={"num_predict": 5}))
    assert "".join(part.response or "" for part in parts) == "Hello" and parts[-1].done_reason == "length"
    assert client.generate("fake-model").done_reason == "load"


def test_models(client: ollama.Client) -> None:
    (listed,) = client.list().models
    assert listed.model == "fake-model:latest" and listed.modified_at is not None
    assert listed.details is not None and listed.details.family == "llama"
    shown = client.show("fake-model")
    assert "completion" in (shown.capabilities or []) and shown.modelinfo is not None
    assert shown.modelinfo["llama.context_length"] == 512
    (loaded,) = client.ps().models
    assert loaded.model == "fake-model:latest" and loaded.expires_at is not None and loaded.expires_at.year > 2300
    assert client.pull("fake-model").status == "success"
    assert [each.status for each in client.pull("fake-model", stream=True)][-1] == "success"


def test_errors(client: ollama.Client) -> None:
    for call in (client.chat, client.show, client.pull):
        with pytest.raises(ollama.ResponseError, match="model 'llama3' not found") as caught:
            call("llama3")
        assert caught.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="maximum context length is 512 tokens"):
        client.chat("fake-model", [{"role": "user", "content": "x" * 600}])
    with pytest.raises(ollama.ResponseError, match="cannot make embeddings"):
        client.embed("fake-model", "x")
    with pytest.raises(ollama.ResponseError, match="is being served") as caught:
        client.delete("fake-model")
    assert caught.value.status_code == 400


def test_an_error_in_a_stream_is_raised() -> None:
    engine = FakeEngine(fail_after=2)
    with on_port(make_server(engine), engine) as base:
        parts = ollama.Client(host=base).chat("fake-model", HI, stream=True)
        with pytest.raises(ollama.ResponseError, match="out of luck"):
            list(parts)


def test_lines_come_one_by_one_without_heartbeats() -> None:
    engine = FakeEngine(text="some words", delay_s=0.05)
    times = []
    with on_port(make_server(engine, options=HttpOptions(sse_keep_alive_interval=0.02)), engine) as base:
        assert httpx.head(base).status_code == 200
        with httpx.stream("POST", base + "/api/chat", json={"messages": HI}) as response:
            for piece in response.iter_raw():
                assert piece.startswith(b'{"') and piece.endswith(b"}\n") and piece.count(b"\n") == 1
                times.append(time.monotonic())
    assert len(times) == len("some words") + 1 and times[-1] - times[0] > 0.3
