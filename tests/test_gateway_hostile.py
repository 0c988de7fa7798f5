"""The gateway against clients that mean harm, or come all at once; the servers behind it say what they were sent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from pagoda.api.serving.blobs import BlobStore
from pagoda.gateway import child as child_module
from pagoda.gateway import proxy as proxy_module
from pagoda.gateway.app import Gateway, create_app
from pagoda.gateway.fleet import Fleet
from pagoda.gateway.policy import Seen, Step, next_step
from pagoda.gateway.proxy import Proxy
from pagoda.gateway.sizes import Sized
from pagoda.options.config import Options

SERVER = """
import http.server, json, os, socket, socketserver, sys, time

class Echo(http.server.BaseHTTPRequestHandler):
    def answer(self):
        size = int(self.headers.get("content-length", 0))
        sent = {"line": self.requestline, "headers": dict(self.headers.items()), "keys": os.environ["PAGODA_API_KEY"]}
        body = json.dumps({**sent, "size": len(self.rfile.read(size))}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    do_GET = do_POST = do_DELETE = answer
    def log_message(self, *args): pass
    def address_string(self): return ""

class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 100

with Server(json.load(open(sys.argv[-1]))["uds"], Echo) as server:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
        out.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
    server.serve_forever()
"""


@contextlib.asynccontextmanager
async def gateway(
    folder: Path, names: Sequence[str], monkeypatch: pytest.MonkeyPatch, **options: object
) -> AsyncGenerator[tuple[httpx.AsyncClient, Fleet], None]:
    """Each model takes all the memory."""
    script = folder / "server.py"
    script.write_text(SERVER)
    monkeypatch.setattr(child_module, "COMMAND", (sys.executable, "-S", str(script)))
    given = Options(**options)  # type: ignore[arg-type]
    models = [
        Sized(name, f"/models/{name}-1", replace(given, model=f"owner/of-{name}"), 10, 10, 64, "llama", "F16")
        for name in names
    ]
    fleet = Fleet(models, 10, folder, folder / "derived", given.api_key)
    app = create_app(Gateway(proxy=Proxy(fleet, None), blobs=BlobStore(folder), version="0"), given, local=True)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
        try:
            yield client, fleet
        finally:
            await fleet.stop()


def test_a_path_is_no_request_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with gateway(tmp_path, ["a"], monkeypatch) as (client, _):
            text = "x%20HTTP/1.1%0D%0Ax-mine:%20yes%0D%0A%0D%0ADELETE%20/api/delete"
            sent = (await client.get(f"/v1/responses/{text}".replace("/api/", "%2fapi%2f"))).json()
            assert sent["error"]["code"] == "not_found", "a slash ends the part that an id is"
            sent = (await client.get("/v1/responses/x%20HTTP%0D%0Ax-mine:%20yes%0D%0Ay:%C3%A4?q=%0D%0A")).json()
            assert sent["line"] == "GET /responses/x%20HTTP%0D%0Ax-mine:%20yes%0D%0Ay:%C3%A4?q=%0D%0A HTTP/1.1"
            assert "x-mine" not in sent["headers"]

    asyncio.run(main())


def test_servers_know_whose_key_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files and batches belong to a key; behind the gateway too, and after it was started again."""

    async def main() -> None:
        keys = ("one", "two,three")
        async with gateway(tmp_path, ["a"], monkeypatch, api_key=keys) as (client, _):
            for headers in ({"authorization": "Bearer two,three"}, {"x-api-key": "one"}):
                sent = (await client.get("/v1/files", headers=headers)).json()
                passed = {name.lower(): value for name, value in sent["headers"].items()}
                assert {name: passed.get(name) for name in ("authorization", "x-api-key")} == {
                    "authorization": None, "x-api-key": None, **headers,
                }  # fmt: skip
                assert sent["keys"] == '["one", "two,three"]'
        async with gateway(tmp_path, ["a"], monkeypatch) as (client, _):
            sent = (await client.get("/v1/files", headers={"authorization": "Bearer ollama"})).json()
            assert sent["keys"] == '["gateway"]' and sent["headers"]["authorization"] == "Bearer gateway"

    asyncio.run(main())


def test_a_model_is_not_unloaded_before_those_who_waited_are_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with gateway(tmp_path, ["a", "b", "c"], monkeypatch) as (client, fleet):

            async def ask(name: str) -> int:
                body = {"model": name, "prompt": "x"}
                return (await client.post("/v1/completions", json=body)).status_code

            for round in range(1, 6):
                assert set(await asyncio.gather(*map(ask, "abc" * 4))) == {200}
                assert sum(child.loads for child in fleet.children) <= 3 * round, "each once, for all who want it"

    asyncio.run(main())


def test_nobody_takes_the_room_of_one_that_waited_longer() -> None:
    early = Seen("early", "stopped", 6, waiting_since_s=1.0)
    late, small = Seen("late", "stopped", 6, waiting_since_s=2.0), Seen("small", "stopped", 4, waiting_since_s=2.0)
    assert next_step(late, [early], 10, 0.0) == Step(start=False)
    assert next_step(early, [late], 10, 0.0) == Step(start=True)
    assert next_step(small, [early], 10, 0.0) == Step(start=True), "there is room for both"
    leaving = Seen("leaving", "leaving", 6, busy=1)
    assert next_step(small, [early, leaving], 10, 0.0) == Step(start=True), "and will be"
    assert next_step(late, [Seen("early", "stopped", 6), leaving], 20, 0.0) == Step(start=True), "nobody wants it"


def test_a_model_that_is_made_takes_no_other_model_s_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with gateway(tmp_path, ["a", "b"], monkeypatch) as (client, fleet):
            for name in ("b", "B:latest", "./b"):
                made = await client.post("/api/create", json={"from": "a", "model": name})
                assert made.status_code == 400 and "name of another model" in made.json()["error"]
                copied = await client.post("/api/copy", json={"source": "a", "destination": name})
                assert copied.status_code == 400
            assert (await client.post("/api/create", json={"from": "b", "model": "b"})).status_code == 200
            for name in ("owner/of-b", "hf.co/owner/of-b:latest"):
                gone = await client.request("DELETE", "/api/delete", json={"model": name})
                assert gone.status_code == 400 and "being served" in gone.json()["error"]
            assert fleet.children[0].loads == 0, "what is refused loads nothing"

    asyncio.run(main())


def test_a_model_that_never_becomes_ready_blocks_nobody_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SERVER", "import time; time.sleep(600)")
    monkeypatch.setattr(child_module, "WATCHDOG_S", 1.0)
    monkeypatch.setattr(child_module, "LOADING_SILENCE_S", 0.5)

    async def main() -> None:
        async with gateway(tmp_path, ["a"], monkeypatch) as (client, fleet):
            reply = await client.post("/v1/completions", json={"prompt": "x"})
            assert reply.status_code == 503 and reply.json()["error"]["code"] == "model_not_loaded"
            assert "no sign of life for 0.5 s" in reply.json()["error"]["message"]
            assert fleet.first.state == "stopped"

    asyncio.run(main())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the kernel does not tell of a parent's end")
def test_a_child_whose_gateway_has_ended_already_does_not_begin(tmp_path: Path) -> None:
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as left:
        left.bind(str(path))
    command = [sys.executable, "-P", "-m", "pagoda.cli.child", "--config", str(tmp_path / "none.json")]
    environ = {**os.environ, "NOTIFY_SOCKET": str(path)}
    ended = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1 and ended.stderr == "the gateway is gone\n"


def test_bodies_that_wait_are_not_more_than_memory_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        monkeypatch.setattr(proxy_module, "MAX_HELD_BYTES", 2500)
        async with gateway(tmp_path, ["a"], monkeypatch) as (client, _):
            posts = [client.post("/v1/completions", json={"prompt": "x" * 1000}) for _ in range(4)]
            assert sorted(reply.status_code for reply in await asyncio.gather(*posts)) == [200, 200, 503, 503]
            assert (await client.post("/v1/completions", json={"prompt": "x" * 5000})).status_code == 200
            await client.post("/v1/completions", content=b"{")
            assert (await client.get("/load")).json()["server_load"] == 0

    asyncio.run(main())
