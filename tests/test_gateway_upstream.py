"""`--upstream` and `--fallback`: a real second server, and a made one that is slow, rude or cut off."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import engine_tiny
import pytest
from server_process import running, serve
from test_gateway import complete, send, until

from pagoda.gateway.proxy import FALLBACK, UPSTREAM


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return engine_tiny.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def far(model: str) -> Iterator[str]:
    with running(*serve(model, "--served-model-name", "far", "--api-key", "far-key", "--threads", "1")) as url:
        yield url


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "gateway.log"


@pytest.fixture(scope="module")
def near(model: str, far: str, log: Path) -> Iterator[str]:
    words = ["--model", model, "--model", model + "/", "--served-model-name", "near", "lazy", "--threads", "1"]
    words += ["--upstream", far, "--fallback", "--fallback-model", "far", "--log-file", str(log)]
    words += ["--max-num-seqs", "1", "--max-num-queued-reqs", "0", "--api-key", "secret"]
    with running(*serve(*words), environ={"PAGODA_UPSTREAM_API_KEY": "far-key"}) as url:
        until(lambda: complete(url, "near")[0] == 200 and send(url, "/health")[0] == 200)
        yield url


def test_its_models_are_listed_with_their_owner_and_answered(near: str, far: str) -> None:
    cards = {card["id"]: card for card in send(near, "/v1/models")[1]["data"]}
    assert (
        list(cards) == ["near", "lazy", "far"] and cards["far"] == send(far, "/v1/models", key="far-key")[1]["data"][0]
    )
    assert [each["name"] for each in send(near, "/api/tags")[1]["models"]][-1] == "far:latest"
    assert send(near, "/v1/models/far")[1]["id"] == "far"
    body = {"model": "far", "prompt": "hello", "max_tokens": 4, "temperature": 0}
    status, reply, headers = send(near, "/v1/completions", body)
    assert status == 200 and reply["model"] == "far"
    assert headers[UPSTREAM] == far and FALLBACK not in headers
    status, text, headers = send(near, "/v1/completions", {**body, "stream": True})
    assert status == 200 and text.rstrip().endswith("data: [DONE]") and headers[UPSTREAM] == far
    status, reply, _ = send(near, "/api/generate", {"model": "far", "prompt": "hello", "stream": False})
    assert status == 200 and reply["model"] == "far"


def test_what_neither_has_is_its_error_under_its_name(near: str, far: str) -> None:
    status, reply, headers = send(near, "/v1/completions", {"model": "ghost", "prompt": "x"})
    assert status == 404 and "Served: far" in reply["error"]["message"] and headers[UPSTREAM] == far


def test_a_model_that_is_not_loaded_yet_is_answered_by_the_other(near: str, far: str, log: Path) -> None:
    body = {"model": "lazy", "prompt": "hello", "max_tokens": 4, "temperature": 0}
    status, reply, headers = send(near, "/v1/completions", body)
    assert status == 200 and reply["model"] == "far"
    assert headers[FALLBACK] == "it is not loaded yet" and headers[UPSTREAM] == far
    until(lambda: FALLBACK not in send(near, "/v1/completions", body)[2])
    assert send(near, "/v1/completions", body)[1]["model"] == "lazy"
    assert f"lazy: answered by the upstream {far}: it is not loaded yet" in log.read_text()


def test_a_full_queue_goes_to_the_other(near: str, log: Path) -> None:
    body = {"model": "near", "prompt": "hello", "max_tokens": 200, "ignore_eos": True, "temperature": 0}
    with ThreadPoolExecutor(6) as pool:
        got = list(pool.map(lambda _: send(near, "/v1/completions", body), range(6)))
    assert [status for status, _, _ in got] == [200] * 6
    fallen = [headers[FALLBACK] for _, _, headers in got if FALLBACK in headers]
    assert 1 <= len(fallen) <= 5 and all("too many requests" in each for each in fallen)
    assert len({reply["choices"][0]["text"] for _, reply, _ in got}) == 1
    told = log.read_text()
    assert "far-key" not in told and "secret" not in told


class Odd(BaseHTTPRequestHandler):
    """Answers by the model's name: `slow` sends a second event when told to, `cut` ends in the middle."""

    protocol_version = "HTTP/1.1"
    seen: list[dict[str, str]]
    go_on: threading.Event

    def do_GET(self) -> None:
        self.send_error(500)

    def do_POST(self) -> None:
        self.seen.append({name.lower(): value for name, value in self.headers.items()})
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if body["model"] == "rude":
            self.wfile.write(b"220 mail.example.org ESMTP\r\n")
            self.close_connection = True
            return
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        self._part(b'data: {"n": 1}\n\n')
        if body["model"] == "cut":
            self.close_connection = True
            return
        assert self.go_on.wait(60)
        self._part(b'data: {"n": 2}\n\n')
        self._part(b"")

    def _part(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def log_message(self, *args: Any) -> None:
        """Nothing: the test knows."""


@pytest.fixture(scope="module")
def odd(model: str) -> Iterator[tuple[str, type[Odd]]]:
    """A gateway whose upstream is odd."""
    kind = type("OddOne", (Odd,), {"seen": [], "go_on": threading.Event()})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        upstream = f"http://127.0.0.1:{server.server_address[1]}/v1"
        with running(*serve(model, "--upstream", upstream, "--api-key", "secret", "--threads", "1")) as url:
            yield url, kind
        server.shutdown()


def test_a_stream_is_passed_on_as_it_comes_and_keys_stay_here(odd: tuple[str, type[Odd]]) -> None:
    url, kind = odd
    body = json.dumps({"model": "slow", "stream": True, "messages": []}).encode()
    headers = {"content-type": "application/json", "authorization": "Bearer secret", "x-api-key": "secret"}
    with urllib.request.urlopen(
        urllib.request.Request(f"{url}/v1/chat/completions", body, headers), timeout=60
    ) as reply:
        assert reply.readline() == b'data: {"n": 1}\n'
        kind.go_on.set()
        assert reply.read() == b'\ndata: {"n": 2}\n\n'
    assert "secret" not in str(kind.seen) and kind.seen[-1]["x-pagoda-via"]


def test_what_is_cut_off_or_is_no_http_has_a_name(odd: tuple[str, type[Odd]]) -> None:
    url, _ = odd
    status, text, _ = send(url, "/v1/chat/completions", {"model": "cut", "stream": True, "messages": []})
    first, second = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: {")]
    assert status == 200 and first == {"n": 1}
    assert (
        second["error"]["code"] == "model_server_gone" and "the upstream http://127.0.0.1" in second["error"]["message"]
    )
    status, reply, _ = send(url, "/v1/chat/completions", {"model": "rude", "messages": []})
    assert status == 502 and reply["error"]["code"] == "upstream_error"
    assert len(send(url, "/v1/models")[1]["data"]) == 1, "it cannot list its models; ours are"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_circle_is_refused_and_a_dead_upstream_named(model: str) -> None:
    port = free_port()
    with running(*serve(model, "--upstream", f"http://127.0.0.1:{port}", "--threads", "1")) as first:
        status, reply = complete(first, "ghost")
        assert status == 502 and reply["error"]["code"] == "upstream_error" and str(port) in reply["error"]["message"]
        second = serve(model, "--upstream", first, "--threads", "1")
        with running(*(str(port) if word == "0" else word for word in second)):
            started = time.monotonic()
            status, reply = complete(first, "ghost")
            assert status == 508 and reply["error"]["code"] == "loop_detected"
            assert time.monotonic() - started < 10
