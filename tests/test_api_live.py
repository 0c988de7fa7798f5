"""The server under uvicorn on a port: the openai package, clients that leave or stall, broken HTTP, draining."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest
from api_fake import TEXT, FakeEngine, make_server, on_port

from pagoda.api.http.connection import MAX_HEADER_BYTES
from pagoda.api.http.listen import PortTaken, bind_socket
from pagoda.api.http.stream import EventStream
from pagoda.types import SamplingParams

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    engine = FakeEngine()
    with on_port(make_server(engine), engine) as base:
        yield base


@pytest.fixture
def slow() -> Iterator[tuple[str, FakeEngine]]:
    """A server whose answers take about two seconds."""
    engine = FakeEngine(text="word " * 60, delay_s=0.02)
    with on_port(make_server(engine), engine) as base:
        yield base, engine


def wait_for(condition: Callable[[], bool], seconds: float = 3.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def client_of(url: str, key: str = "EMPTY") -> openai.OpenAI:
    return openai.OpenAI(base_url=url + "/v1", api_key=key, max_retries=0, timeout=60)


def test_openai_package_over_several_turns(url: str) -> None:
    client = client_of(url)
    assert client.models.list().data[0].id == "fake-model"
    assert client.models.retrieve("fake-model").id == "fake-model"
    messages: list[dict[str, str]] = []
    for turn in range(3):
        messages.append({"role": "user", "content": f"turn {turn}"})
        reply = client.chat.completions.create(model="fake-model", messages=messages)  # type: ignore[arg-type]
        assert reply.choices[0].message.content == TEXT
        assert reply.usage is not None and reply.usage.completion_tokens == 54
        messages.append({"role": "assistant", "content": TEXT})


def test_openai_package_streams(url: str) -> None:
    client = client_of(url)
    stream = client.chat.completions.create(
        model="fake-model",
        messages=[{"role": "user", "content": "x"}],
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
        top_logprobs=1,
        n=2,
    )
    texts = ["", ""]
    reasons = {}
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == [TEXT, TEXT] and reasons == {0: "stop", 1: "stop"}
    assert chunk.usage is not None and chunk.usage.completion_tokens == 108
    with client.chat.completions.stream(model="x/fake-model", messages=[{"role": "user", "content": "x"}]) as helper:
        assert helper.get_final_completion().choices[0].message.content == TEXT
    text = "".join(c.choices[0].text for c in client.completions.create(model="", prompt="a", stream=True, n=1))
    assert text == TEXT


def test_openai_package_raises_by_kind_of_error(url: str) -> None:
    client = client_of(url)
    with pytest.raises(openai.NotFoundError, match="Served: fake-model"):
        client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="fake-model", prompt="x" * 600)
    assert caught.value.code == "context_length_exceeded"
    guarded = FakeEngine(fail_after=2)
    with on_port(make_server(guarded, api_keys=("right",)), guarded) as base:
        with pytest.raises(openai.AuthenticationError):
            client_of(base).models.list()
        with pytest.raises(openai.InternalServerError, match="out of luck"):
            client_of(base, "right").completions.create(model="fake-model", prompt="x")
        stream = client_of(base, "right").completions.create(model="fake-model", prompt="x", stream=True)
        with pytest.raises(openai.APIError, match="out of luck"):
            list(stream)


def test_events_arrive_one_by_one_in_chunks(slow: tuple[str, FakeEngine]) -> None:
    base, engine = slow
    body = json.dumps({"prompt": "x", "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", httpx.URL(base).port or 0)) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
            % len(body)
            + body
        )
        told = b""
        while b"data: " not in told:
            told += raw.recv(4096)
        assert engine.live == 1, "nothing came before the answer was whole"
        while more := raw.recv(65536):
            told += more
    head, _, rest = told.partition(b"\r\n\r\n")
    assert b"transfer-encoding: chunked" in head.lower()
    chunks = []
    while (size := int(rest[: rest.index(b"\r\n")], 16)) > 0:
        start = rest.index(b"\r\n") + 2
        chunks.append(rest[start : start + size])
        rest = rest[start + size + 2 :]
    # How many bytes one read gives is the network's affair; where a chunk ends is the server's.
    assert all(chunk.startswith(b"data: ") and chunk.index(b"\n\n") == len(chunk) - 2 for chunk in chunks)
    assert len(chunks) >= 16


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.alone
def test_a_client_that_leaves_is_cancelled(slow: tuple[str, FakeEngine], stream: bool) -> None:
    base, engine = slow
    body = json.dumps({"prompt": ["x", "y"], "max_tokens": 200, "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", httpx.URL(base).port or 0)) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        assert wait_for(lambda: engine.live == 2)
        if stream:
            assert b"200 OK" in raw.recv(100)
    start = time.monotonic()
    assert wait_for(lambda: engine.live == 0)
    assert time.monotonic() - start < 0.3 and engine.cancelled == 2


@pytest.mark.parametrize(
    "sent",
    [
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
    ],
)
def test_broken_http_is_answered_in_json(url: str, sent: bytes) -> None:
    status, body = exchange(url, sent)
    assert status == 400
    assert json.loads(body)["error"]["code"] == "invalid_request_error"


def test_an_offer_of_http2_is_ignored(url: str) -> None:
    """Java's HTTP client makes it; the body that follows is the request's own, in one piece with the head or not."""
    body = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAA\r\n"
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n" % len(body) + offer + b"\r\n"
    with socket.create_connection(("127.0.0.1", httpx.URL(url).port or 0), timeout=60) as raw:
        for pieces in ([head + body], [head, body]):
            for piece in pieces:
                raw.sendall(piece)
                time.sleep(0.05)
            got = raw.recv(65536)
            assert got.startswith(b"HTTP/1.1 200") and b"text_completion" in got


def test_endless_headers_are_cut(url: str) -> None:
    status, body = exchange(url, b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * (MAX_HEADER_BYTES + 1) + b"\r\n")
    assert status == 431 and json.loads(body)["error"]["code"] == "headers_too_large"
    many = b"".join(b"h%d: x\r\n" % i for i in range(200))
    assert exchange(url, b"GET / HTTP/1.1\r\nHost: localhost\r\n" + many + b"\r\n")[0] == 431
    assert httpx.get(url + "/health").status_code == 200


def exchange(url: str, sent: bytes) -> tuple[int, bytes]:
    with socket.create_connection(("127.0.0.1", httpx.URL(url).port or 0), timeout=60) as raw:
        raw.sendall(sent)
        got = b""
        while part := raw.recv(65536):
            got += part
    head, _, body = got.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def test_slow_headers_are_cut(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagoda.api.http.connection.HEADERS_S", 0.2)
    with socket.create_connection(("127.0.0.1", httpx.URL(url).port or 0), timeout=60) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: lo")
        start = time.monotonic()
        assert raw.recv(100) == b""
        assert 0.1 < time.monotonic() - start < 8


def test_slow_bodies_are_cut(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagoda.api.http.body.FIRST_BYTE_S", 0.2)
    status, body = exchange(url, b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
    assert status == 408 and json.loads(body)["error"]["code"] == "request_timeout"


def test_a_connection_serves_on_after_errors(url: str) -> None:
    with httpx.Client(base_url=url) as client:
        for _ in range(3):
            assert client.post("/v1/completions", content=b"{").status_code == 400
            assert client.post("/nothing", json={}).status_code == 404
            assert client.post("/v1/completions", json={"prompt": "x"}).status_code == 200


def stream_of(engine: FakeEngine, **limits: float) -> tuple[EventStream, Callable[[], bool]]:
    """A stream that sends `data: x` when its engine is done, and a look at whether its place was given back."""
    server = make_server(engine)
    generation = server.start("cmpl", [[1]], SamplingParams(max_tokens=100, ignore_eos=True))

    async def lines():  # type: ignore[no-untyped-def]
        async for _ in generation.deltas():
            pass
        yield b"data: x\n\n"

    return EventStream(generation, lines(), server.aborted, **limits), lambda: server.busy


@pytest.mark.alone
def test_heartbeats_are_blocks_of_their_own() -> None:
    async def run() -> list[bytes]:
        stream, _ = stream_of(FakeEngine("abcd", delay_s=0.1), heartbeat_s=0.12)
        sent: list[bytes] = []

        async def send(message):  # type: ignore[no-untyped-def]
            sent.append(message.get("body", b"head"))

        await stream({"type": "http"}, never, send)
        return sent

    sent = asyncio.run(run())
    beats = sent.count(b": keep-alive\n\n")
    assert beats >= 3
    assert sent == [b"head", *[b": keep-alive\n\n"] * beats, b"data: x\n\n", b""]


@pytest.mark.alone
def test_a_client_that_reads_nothing_is_dropped() -> None:
    engine = FakeEngine("ab")

    async def run() -> tuple[float, bool, list[str]]:
        stream, busy = stream_of(engine, stall_s=0.2, heartbeat_s=0.1)
        cut: list[str] = []

        async def send(message):  # type: ignore[no-untyped-def]
            if message["type"] == "http.response.body":
                await asyncio.sleep(60)

        start = time.monotonic()
        scope = {"type": "http", "extensions": {"pagoda.connection": {"cut": lambda: cut.append("cut")}}}
        await stream(scope, never, send)
        return time.monotonic() - start, busy(), cut

    took, busy, cut = asyncio.run(run())
    assert took < 1 and not busy and cut == ["cut"]


async def never() -> dict[str, str]:
    await asyncio.sleep(60)
    return {"type": "http.disconnect"}


def test_a_taken_port_names_its_owner() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(PortTaken, match=rf"port {port} is taken by process \d+") as caught:
            bind_socket("127.0.0.1", port)
    assert caught.value.exit_code == 98 and f"--port {port + 1}" in str(caught.value)
    bind_socket("127.0.0.1", port).close()


def test_unix_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    bind_socket("", 0, path).close()
    listener = bind_socket("", 0, path)
    listener.close()
    assert Path(path).is_socket()


SCRIPT = textwrap.dedent(
    """
    import sys
    from api_fake import FakeEngine, make_server
    from pagoda.api.run import bind_socket, run_server
    from pagoda.observe import setup_logging

    setup_logging()
    engine = FakeEngine(text="word " * 60, delay_s=float(sys.argv[1]))
    listener = bind_socket("127.0.0.1", 0)
    announce = lambda: print(listener.getsockname()[1], flush=True)
    server = make_server(engine, log_requests=True)
    code = run_server(server, engine, listener, drain_s=float(sys.argv[2]), on_ready=announce)
    print("stopped", engine.stopped, engine.live)
    sys.exit(code)
    """
)


class Process:
    """The server as a process of its own."""

    def __init__(self, delay_s: float, drain_s: float) -> None:
        path = f"{TESTS.parent / 'src'}:{TESTS}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(delay_s), str(drain_s)],
            env={"PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}"

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


BODY = {"prompt": "x", "max_tokens": 40, "stream": True}


@pytest.mark.alone
def test_sigterm_lets_streams_finish_and_refuses_new_ones() -> None:
    with Process(delay_s=0.02, drain_s=10) as server, httpx.Client(base_url=server.url) as other:
        with httpx.stream("POST", server.url + "/v1/completions", json=BODY) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            assert wait_for(lambda: other.get("/health").status_code == 503)
            refused = other.post("/v1/completions", json={"prompt": "x"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            assert refused.headers["retry-after"] == "5"
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in rest[-2]
        out, err = server.process.communicate(timeout=60)
        assert server.process.returncode == 0 and "stopped True 0" in out
        assert "prompt=1 cached=4 completion=40 first_token=" in err and "finish=length" in err


def test_streams_that_outlast_the_drain_end_with_an_error_event() -> None:
    with Process(delay_s=0.1, drain_s=0.3) as server:
        with httpx.stream("POST", server.url + "/v1/completions", json=BODY) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGINT)
            rest = [line for line in lines if line]
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "shutting_down"
        out, _ = server.process.communicate(timeout=60)
        assert server.process.returncode == 0 and "stopped True 0" in out


@pytest.mark.alone
def test_a_second_signal_ends_at_once() -> None:
    with Process(delay_s=0.1, drain_s=30) as server:
        with httpx.stream("POST", server.url + "/v1/completions", json=BODY) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            assert wait_for(lambda: httpx.get(server.url + "/health").status_code == 503)
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(timeout=1) == -signal.SIGTERM


def test_a_dead_engine_ends_the_server_with_70() -> None:
    script = SCRIPT.replace(
        "server = make_server",
        "die = announce\nannounce = lambda: (die(), engine.on_dead('no luck'))\nserver = make_server",
    )
    path = f"{TESTS.parent / 'src'}:{TESTS}"
    command = [sys.executable, "-c", script, "0", "5"]
    done = subprocess.run(command, env={"PYTHONPATH": path}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 70 and "no luck" in done.stderr
