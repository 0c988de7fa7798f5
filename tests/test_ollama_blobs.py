"""Ollama's `create` from files: sent by their digest, kept under a name, served under it with what was said of them."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest
from api_fake import Client, make_server, on_port
from server_process import running, serve

from pagoda.api.serving import blobs
from pagoda.api.serving.blobs import BlobStore
from pagoda.api.serving.server import Server
from pagoda.cli.hub import Models
from pagoda.cli.main import main
from pagoda.deploy.download.created import created_model

JINJA = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def digest_of(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def server(folder: Path, **changes: Any) -> Server:
    return make_server(derived_dir=folder / "derived", blobs=BlobStore(folder / "blobs"), hub=Models(), **changes)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PAGODA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "cache"


@pytest.fixture
def client(cache: Path) -> Iterator[Client]:
    with Client(server(cache)) as made:
        yield made


def held(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "blobs").iterdir()) if (cache / "blobs").is_dir() else []


def test_a_file_is_kept_by_its_digest(client: Client, cache: Path) -> None:
    content = os.urandom(5 << 20)
    digest = digest_of(content)
    path = f"/api/blobs/{digest}"
    assert client.call("HEAD", path).status_code == 404
    assert client.call("POST", path, content=content).status_code == 201
    assert client.call("HEAD", path).status_code == 200 and client.call("POST", path, content=b"").status_code == 200
    assert held(cache) == [digest.replace(":", "-")]
    assert (cache / "blobs" / held(cache)[0]).read_bytes() == content


def test_another_content_than_the_digest_says_is_not_kept(client: Client, cache: Path) -> None:
    reply = client.call("POST", f"/api/blobs/{digest_of(b'a')}", content=b"b")
    assert reply.status_code == 400 and digest_of(b"b") in reply.json()["error"]
    assert held(cache) == []


@pytest.mark.parametrize("name", ["sha256:" + "A" * 64, "sha256:" + "a" * 63, "md5:" + "a" * 64, "sha256:..", "x" * 71])
def test_only_a_digest_becomes_a_path(client: Client, cache: Path, name: str) -> None:
    assert client.call("POST", f"/api/blobs/{name}", content=b"x").status_code == 400
    assert client.call("HEAD", f"/api/blobs/{name}").status_code == 400
    assert held(cache) == []
    assert client.call("POST", f"/api/blobs/..%2f..%2f{'a' * 64}", content=b"x").status_code in (400, 404)


def test_limits(client: Client, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = f"/api/blobs/{digest_of(b'abc')}"
    stale = cache / "blobs" / "sha256-x.1.tmp"
    stale.parent.mkdir(parents=True)
    stale.touch()
    os.utime(stale, (0, 0))
    monkeypatch.setattr("pagoda.api.ollama.blobs.MAX_BLOB_BYTES", 2)
    assert client.call("POST", path, content=b"abc").status_code == 413
    assert client.call("POST", path, content=iter_of(b"ab", b"c")).status_code == 413
    assert held(cache) == [], "what a crash left is gone too"
    monkeypatch.undo()
    monkeypatch.setattr(blobs, "ROOM_LEFT_BYTES", 1 << 60)
    full = client.call("POST", path, content=b"abc")
    assert full.status_code == 507 and "pagoda rm" in full.json()["error"] and held(cache) == []


async def iter_of(*parts: bytes) -> Any:
    for part in parts:
        yield part


def test_an_upload_that_breaks_off_leaves_nothing(cache: Path) -> None:
    made = server(cache)
    url_of, content = f"/api/blobs/{digest_of(b'x' * 100)}", b"x" * 100
    with on_port(made, made.engine) as base:
        begun = threading.Event()

        def parts() -> Iterator[bytes]:
            yield content[:50]
            begun.set()
            deadline = time.monotonic() + 120
            while not held(cache) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert any(name.endswith(".tmp") for name in held(cache))
            raise KeyError

        with pytest.raises(KeyError):
            httpx.post(base + url_of, content=parts(), timeout=30)
        deadline = time.monotonic() + 120
        while held(cache) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert begun.is_set() and held(cache) == []
        assert made.blobs is not None and made.blobs._uploads == 0


@pytest.mark.parametrize(("changes", "status"), [({}, 403), ({"api_keys": ("secret",)}, 201)])
def test_a_server_that_everyone_can_reach_takes_files_only_with_a_key(
    cache: Path, changes: dict[str, Any], status: int
) -> None:
    with Client(server(cache, local=False, **changes)) as client:
        path, headers = f"/api/blobs/{digest_of(b'x')}", {"authorization": "Bearer secret"}
        assert client.call("POST", path, content=b"x", headers=headers).status_code == status
        if changes:
            assert client.call("POST", path, content=b"x").status_code == 401
            assert client.call("HEAD", path).status_code == 401
    assert bool(held(cache)) == (status == 201)


def sent(client: Client, content: bytes) -> str:
    digest = digest_of(content)
    assert client.call("POST", f"/api/blobs/{digest}", content=content).status_code in (200, 201)
    return digest


def test_what_is_no_model_is_refused(client: Client, cache: Path, smollm2_path: str) -> None:
    model = {"m.gguf": sent(client, Path(smollm2_path).read_bytes())}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"files": {"m.gguf": digest_of(b"none")}}, "/api/blobs"),
        ({"files": {"m.gguf": sent(client, b"no model")}}, "m.gguf"),
        ({"files": {**model, "n.gguf": model["m.gguf"]}}, "one GGUF file"),
        ({"files": model, "from": "fake-model"}, "not both"),
        ({"files": model, "template": "{{ if .System }}{{ .System }}{{ end }}"}, "Jinja"),
        ({"files": model, "parameters": {"temperature": -1}}, "temperature"),
        ({"files": model, "quantize": "q4_0"}, "quantize"),
        ({"files": model, "model": "../x"}, "name"),
        ({"files": model, "model": "fake-model:latest"}, "fake-model"),
    ]
    for body, said in cases:
        reply = client.post("/api/create", {"model": "mine", "stream": False, **body})
        assert reply.status_code == 400 and said in reply.json()["error"], body
    assert not (cache / "created").exists()
    assert client.call("DELETE", "/api/delete", json={"model": "mine"}).status_code == 404


def test_ollamas_client_makes_a_model_of_a_file_and_it_is_served(
    cache: Path, smollm2_path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = server(cache)
    with on_port(made, made.engine) as base:
        theirs = ollama.Client(base)
        digest = theirs.create_blob(smollm2_path)
        told = list(
            theirs.create(
                "me/parrot:v1", files={"m.gguf": digest}, system="You repeat.", template=JINJA,
                parameters={"temperature": 0, "num_predict": 5}, stream=True,
            )
        )  # fmt: skip
        assert told[-1].status == "success" and "pagoda serve me/parrot:v1" in str(told[-2].status)
    root = created_model("me/parrot:v1")
    assert root is not None and (Path(root) / "model.gguf").stat().st_nlink == 2, "on the disk once"
    assert main(["list"]) == 0 and "me/parrot:v1" in capsys.readouterr().out
    with running(*serve("me/parrot:v1", "--threads", "1", "--max-model-len", "256")) as base:
        theirs = ollama.Client(base)
        shown = theirs.show("me/parrot:v1")
        assert shown.template == JINJA and 'SYSTEM "You repeat."' in (shown.modelfile or "")
        (card,) = httpx.get(f"{base}/v1/models", timeout=60).json()["data"]
        assert (card["id"], card["parent"], card["root"]) == ("me/parrot:v1", None, os.path.realpath(root))
        asked = {"model": "me/parrot:v1", "messages": [{"role": "user", "content": "Hi"}]}
        reply = httpx.post(f"{base}/v1/chat/completions", json=asked, timeout=60).json()
        assert reply["usage"]["completion_tokens"] == 5
        rendered = httpx.post(f"{base}/tokenize", json={**asked, "return_token_strs": True}, timeout=60).json()
        assert "".join(rendered["token_strs"]).startswith("<system>You")
        refused = httpx.request("DELETE", f"{base}/api/delete", json={"model": "me/parrot:v1"}, timeout=60)
        assert refused.status_code == 400 and "being served" in refused.text
    made = server(cache)
    with Client(made) as client:
        assert client.call("DELETE", "/api/delete", json={"model": "me/parrot:v1"}).status_code == 200
    assert held(cache) == [] and created_model("me/parrot:v1") is None
    assert not list((cache / "derived").iterdir())
