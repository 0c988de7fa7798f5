"""Ollama's routes about models, in memory; what an Ollama client sees at /."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from api_fake import Client, FakeEngine, make_server


@pytest.fixture
def client() -> Iterator[Client]:
    engine = FakeEngine(architecture="qwen3", weight_types="Q4_K, Q6_K", weight_bytes=1234)
    names = ("Org/Qwen3-0.6B", "mine:4b")
    with Client(make_server(engine, names=names, root="/models/x.gguf", default_params={"temperature": 0.6})) as made:
        yield made


def test_tags(client: Client) -> None:
    first, second = client.get("/api/tags").json()["models"]
    assert first["name"] == first["model"] == "Org/Qwen3-0.6B:latest" and second["name"] == "mine:4b"
    assert (first["size"], len(first["digest"]), first["modified_at"][-1]) == (1234, 64, "Z")
    assert first["digest"] != second["digest"]
    assert first["details"] == {
        "parent_model": "", "format": "gguf", "family": "qwen3", "families": ["qwen3"], "parameter_size": "0.6B",
        "quantization_level": "Q4_K", "context_length": 512,
    }  # fmt: skip
    assert "expires_at" not in first
    assert client.get("/v1/api/tags").status_code == client.call("HEAD", "/api/tags").status_code == 200


def test_ps(client: Client) -> None:
    first = client.get("/api/ps").json()["models"][0]
    assert first["expires_at"] > "2300" and first["size_vram"] == 0 and first["context_length"] == 512


@pytest.mark.parametrize("key", ["model", "name"])
@pytest.mark.parametrize("name", ["Org/Qwen3-0.6B", "qwen3-0.6b:latest", "mine:4b"])
def test_show(client: Client, key: str, name: str) -> None:
    reply = client.post("/api/show", {key: name}).json()
    assert "completion" in reply["capabilities"] and reply["template"] == "{{ messages }}"
    family = reply["model_info"]["general.architecture"]
    assert family == reply["details"]["family"] == "qwen3"
    assert reply["model_info"][f"{family}.context_length"] == 512
    parameters = dict(line.split() for line in reply["parameters"].splitlines())
    assert parameters == {"temperature": "0.6", "top_k": "40", "top_p": "0.9"}


def test_pull_of_what_is_here_and_of_what_is_not(client: Client) -> None:
    response = client.post("/api/pull", {"model": "mine:4b"})
    assert response.headers["content-type"] == "application/x-ndjson"
    assert [json.loads(line)["status"] for line in response.text.splitlines()] == ["pulling manifest", "success"]
    assert client.post("/api/pull", {"name": "mine:4b", "stream": False}).json() == {"status": "success"}
    for path in ("/api/pull", "/api/show"):
        response = client.post(path, {"model": "llama3"})
        assert response.status_code == 404 and response.json()["error"].startswith("model 'llama3' not found")


def test_what_a_server_of_one_model_does_not_do(client: Client) -> None:
    for name in ("push", "blobs/sha256:" + "0" * 64):
        response = client.post("/api/" + name, {"model": "mine:4b", "input": "x"})
        assert response.status_code == 501 and list(response.json()) == ["error"]
    refused = client.post("/api/embed", {"input": "x"})
    assert refused.status_code == 400 and "cannot make embeddings" in refused.json()["error"]


def test_version_and_root(client: Client) -> None:
    assert client.get("/api/version").json()["version"].count(".") == 2
    assert client.call("HEAD", "/").status_code == 200
    agent = {"user-agent": "ollama/0.12.0 (amd64 linux) Go/go1.24"}
    assert client.get("/", headers=agent).text == "Ollama is running"
    assert client.get("/").json()["name"] == "pagoda"
    assert "<html" in client.get("/", headers={"accept": "text/html"}).text
