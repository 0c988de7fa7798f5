"""Deltas that are sent where they come: the same bytes as by way of a task, slow readers, errors on the way."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import socket
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

import httpx
import pytest
from api_fake import TEXT, FakeEngine, events, make_server, on_port

from pagoda.engine.stream import DeltaStream, Stream
from pagoda.types import Delta, Request, SamplingParams

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
PROMPT = {"prompt": "Hi", "stream": True}


class PromptEngine(FakeEngine):
    """Puts each delta alone, as the link to an engine process does; counts those that were read at once."""

    at_once = 0

    def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        stream = Stream(request)
        task = asyncio.ensure_future(self._pump(stream))
        return _Counting(self, stream, lambda _: task.cancel())

    async def _pump(self, stream: Stream) -> None:
        async for delta in super().generate(stream.request):
            stream.put(delta, alone=True)


class _Counting(DeltaStream):
    def __init__(self, engine: PromptEngine, stream: Stream, release: Callable[[Stream], Any]) -> None:
        super().__init__(stream, release)
        self._engine = engine

    def read_by(self, reader: Callable[[Delta], bool]) -> None:
        def counted(delta: Delta) -> bool:
            taken = reader(delta)
            self._engine.at_once += taken
            return taken

        super().read_by(counted)


def told(base: str, path: str, body: dict[str, Any]) -> str:
    """The stream, without what differs from one call to the next."""
    response = httpx.post(base + path, json=body)
    assert response.status_code == 200
    return re.sub(r'"(id|created)":("[^"]*"|\d+)', "", response.text)


@pytest.mark.parametrize(
    ("path", "body", "direct"),
    [
        ("/v1/chat/completions", CHAT, True),
        ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2, "return_token_ids": True}, True),
        ("/v1/chat/completions", {**CHAT, "stream_options": {"continuous_usage_stats": True}, "max_tokens": 9}, True),
        ("/v1/chat/completions", {**CHAT, "n": 2}, False),
        ("/v1/chat/completions", {**CHAT, "stop": ["what"]}, False),
        ("/v1/completions", {**PROMPT, "max_tokens": 100}, True),
        ("/v1/completions", {**PROMPT, "max_tokens": 100, "logprobs": 1, "echo": True}, True),
        ("/v1/completions", {**PROMPT, "max_tokens": 0, "echo": True, "logprobs": 1}, False),
    ],
)
def test_a_stream_has_the_same_bytes_either_way(path: str, body: dict[str, Any], direct: bool) -> None:
    streams, engines = [], (FakeEngine(), PromptEngine())
    for engine in engines:
        with on_port(make_server(engine), engine) as base:
            streams.append(told(base, path, body))
    assert streams[0] == streams[1]
    assert (engines[1].at_once > 5) == direct


def test_a_slow_reader_gets_everything() -> None:
    text = TEXT * 4000
    tokens = len(text.encode())
    engine = PromptEngine(text, max_model_len=tokens + 100)
    body = json.dumps({**PROMPT, "max_tokens": tokens}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    with on_port(make_server(engine), engine) as base, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", int(base.rpartition(":")[2])))
        client.sendall(head + body)
        end = time.monotonic() + 60
        while engine.live or not engine.requests:  # all of it is made while nothing is read
            assert time.monotonic() < end
            time.sleep(0.01)
        assert 100 < engine.at_once < tokens // 10  # until the connection was full
        answer = http.client.HTTPResponse(client)
        answer.begin()
        content = answer.read()
    response = httpx.Response(200, headers={"content-type": "text/event-stream"}, content=content)
    assert "".join(chunk["choices"][0]["text"] for chunk in events(response)[:-1]) == text


def delta(*tokens: int, finish: Any = None) -> Delta:
    return Delta(request_id="a", token_ids=list(tokens), finish_reason=finish)


def test_a_reader_gets_what_comes_alone_while_the_consumer_waits() -> None:
    async def go() -> None:
        stream = Stream(Request(request_id="a", prompt_token_ids=[1], params=SamplingParams()))
        deltas = DeltaStream(stream, lambda _: None)
        read: list[int] = []
        takes = [True]

        def take(one: Delta) -> bool:
            if takes[0]:
                read.extend(one.token_ids)
            return takes[0]

        deltas.read_by(take)
        stream.put(delta(1), alone=True)  # nobody waits yet
        assert (await anext(deltas)).token_ids == [1]
        waiting = asyncio.ensure_future(anext(deltas))
        await asyncio.sleep(0)
        stream.put(delta(2), alone=True)
        await asyncio.sleep(0)
        assert read == [2] and not waiting.done() and stream.tokens == [1, 2]
        stream.put(delta(3))  # others came with it
        stream.put(delta(4), alone=True)  # not before 3
        assert (await waiting).token_ids == [3, 4] and read == [2]
        waiting = asyncio.ensure_future(anext(deltas))
        await asyncio.sleep(0)
        takes[0] = False
        stream.put(delta(5), alone=True)
        assert (await waiting).token_ids == [5]
        takes[0] = True
        waiting = asyncio.ensure_future(anext(deltas))
        await asyncio.sleep(0)
        stream.put(delta(6, finish="length"), alone=True)
        assert (await waiting).finish_reason == "length" and read == [2]

    asyncio.run(go())


def test_what_goes_wrong_in_a_reader_is_raised_where_the_consumer_waits() -> None:
    async def go() -> None:
        stream = Stream(Request(request_id="a", prompt_token_ids=[1], params=SamplingParams()))
        deltas = DeltaStream(stream, lambda _: None)

        def fail(_: Delta) -> bool:
            raise OSError("the way is closed")

        deltas.read_by(fail)
        waiting = asyncio.ensure_future(anext(deltas))
        await asyncio.sleep(0)
        stream.put(delta(1), alone=True)  # raises nothing here, where other streams' deltas follow
        with pytest.raises(OSError, match="closed"):
            await waiting

    asyncio.run(go())
