"""Ollama's pull and delete: models fetched and removed through the server, by the code of `pagoda pull`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest
from api_fake import Client, FakeEngine, make_server, on_port
from hub import REPO, Fault, Hub, running
from test_pull_faults import check_published, use

from pagoda.cli.hub import MAX_PULLS, Models
from pagoda.deploy.download.cached import cached_models
from pagoda.deploy.download.find_model import cached_model

BIG = "model.safetensors"
FILES = {"config.json": b"{}", BIG: b"\x01" * 900_000, "tokenizer.json": b"{}"}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running(dict(FILES)) as started:
        use(started, tmp_path, monkeypatch)
        yield started


@pytest.fixture
def url(hub: Hub) -> Iterator[str]:
    engine = FakeEngine()
    with on_port(make_server(engine, hub=Models()), engine) as base:
        yield base


def test_what_is_served_under_another_name_is_not_removed(url: str, hub: Hub) -> None:
    assert ollama.Client(host=url, timeout=60).pull(REPO).status == "success"
    folder = cached_model(REPO, os.environ) or ""
    for path in (folder, f"{folder}/{BIG}"):
        with Client(make_server(hub=Models(path))) as client:
            reply = client.call("DELETE", "/api/delete", json={"model": REPO})
            assert reply.status_code == 400 and "being served" in reply.json()["error"]
    assert len(cached_models(os.environ)) == 1


def test_the_ollama_package_pulls_with_progress_and_deletes(url: str, hub: Hub) -> None:
    hub.faults.append(Fault("slow", BIG, 1_500_000))
    client = ollama.Client(host=url, timeout=60)
    told = list(client.pull(f"hf.co/{REPO}:latest", stream=True))
    assert told[0].status == "pulling manifest" and told[-1].status == "success"
    assert any(each.status and f"pagoda serve {REPO}" in each.status for each in told)
    bars = [each for each in told if each.digest]
    total = sum(map(len, FILES.values()))
    assert {each.total for each in bars} == {total} and len({each.digest for each in bars}) == 1
    done = [each.completed or 0 for each in bars]
    assert done == sorted(done) and done[-1] == total and any(0 < each < total for each in done)
    check_published(hub, Path(cached_model(REPO, os.environ) or ""))
    sent = hub.sent_bytes(BIG)
    assert client.pull(REPO).status == "success" and hub.sent_bytes(BIG) == sent
    assert client.delete(REPO).status == "success" and cached_models(os.environ) == []
    with pytest.raises(ollama.ResponseError, match="not found") as caught:
        client.delete(REPO)
    assert caught.value.status_code == 404


def test_what_is_served_is_here_already_and_stays(url: str, hub: Hub) -> None:
    client = ollama.Client(host=url, timeout=60)
    assert client.pull("fake-model").status == "success" and not hub.seen
    assert [each.status for each in client.pull("fake-model", stream=True)] == ["pulling manifest", "success"]
    with pytest.raises(ollama.ResponseError, match="is being served"):
        client.delete("fake-model:latest")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("name", "said"), [("nobody/has-this", "no such model"), ("llama3", "owner/name")])
def test_a_model_that_no_hub_has(url: str, name: str, said: str, stream: bool) -> None:
    client = ollama.Client(host=url, timeout=60)
    with pytest.raises(ollama.ResponseError, match=said) as caught:
        list(client.pull(name, stream=True)) if stream else client.pull(name)
    # A stream has its 200 before the hub is asked.
    assert caught.value.status_code == (-1 if stream and "/" in name else 404)


def test_a_client_that_leaves_ends_its_pull_and_keeps_what_came(url: str, hub: Hub) -> None:
    hub.faults.append(Fault("slow", BIG, 300_000, on="both"))
    with httpx.stream("POST", f"{url}/api/pull", json={"model": REPO}, timeout=60) as reply:
        for text in reply.iter_lines():
            if json.loads(text).get("completed", 0) > 100_000:
                break
    hub.faults.clear()
    deadline = time.monotonic() + 120
    while not (again := _pull(url)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert again and hub.sent_bytes(BIG) < 1.5 * len(FILES[BIG])


def _pull(url: str) -> bool:
    reply = httpx.post(f"{url}/api/pull", json={"model": REPO, "stream": False}, timeout=60)
    assert reply.status_code == 200 or "is being fetched" in reply.text, reply.text
    return reply.status_code == 200


def test_a_few_pulls_at_once(hub: Hub) -> None:
    models = Models()
    for _ in range(MAX_PULLS):
        models._free.acquire()
    with Client(make_server(hub=models)) as client:
        refused = client.post("/api/pull", {"model": REPO, "stream": False})
        assert refused.status_code == 503 and refused.headers["retry-after"]
        last = client.post("/api/pull", {"model": REPO}).text.splitlines()[-1]
        assert "being fetched already" in json.loads(last)["error"]


@pytest.mark.parametrize(("changes", "allowed"), [({}, False), ({"api_keys": ("secret",)}, True)])
def test_a_server_that_everyone_can_reach_fetches_only_for_its_keys(
    hub: Hub, changes: dict[str, Any], allowed: bool
) -> None:
    with Client(make_server(hub=Models(), local=False, **changes)) as client:
        headers = {"authorization": "Bearer secret"}
        for method, path in (("POST", "/api/pull"), ("DELETE", "/api/delete")):
            reply = client.call(method, path, json={"model": REPO, "stream": False}, headers=headers)
            assert reply.status_code == (200 if allowed else 403), reply.text
    assert bool(hub.seen) == allowed


def test_the_network_is_forbidden(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with Client(make_server(hub=Models())) as client:
        refused = client.post("/api/pull", {"model": REPO, "stream": False})
    assert refused.status_code == 400 and "HF_HUB_OFFLINE" in refused.json()["error"]


def test_a_server_without_a_hub_fetches_nothing() -> None:
    with Client(make_server()) as client:
        assert client.post("/api/pull", {"model": REPO, "stream": False}).status_code == 404
