"""Ollama's create and copy: the served model under names of its clients' own, which every dialect knows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ollama
import pytest
from api_fake import Client, FakeEngine, PlainTemplate, make_server, on_port

from pagoda.api.serving import derived
from pagoda.api.serving.server import Server

PIRATE: dict[str, Any] = {
    "model": "pirate",
    "from": "fake-model",
    "system": 'You are a "pirate".',
    "parameters": {
        "temperature": 0.25,
        "stop": ["Arr", "Ho"],
        "seed": 7,
        "num_predict": 9,
        "mirostat": 1,
        "top_k": None,
    },
    "messages": [{"role": "user", "content": "Ahoy?"}, {"role": "assistant", "content": "Ahoy!"}],
}
BEGIN = [{"role": "system", "content": PIRATE["system"]}, *PIRATE["messages"]]
ASKED = {"role": "user", "content": "Hi"}


def server(folder: Path, **changes: Any) -> Server:
    return make_server(derived_dir=folder / "derived", **changes)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    with Client(server(tmp_path)) as made:
        yield made


def seen(client: Client) -> tuple[list[Any], Any]:
    """What the template got last, and the parameters that the engine got."""
    template, engine = client.server.chat_template, client.server.engine
    assert isinstance(template, PlainTemplate) and isinstance(engine, FakeEngine)
    told = [{"role": each["role"], "content": each["content"]} for each in template.seen[-1]["messages"]]
    return told, engine.requests[-1].params


CALLS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [ASKED]},
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {"messages": [ASKED], "max_tokens": 9},
    "/api/chat": {"messages": [ASKED]},
    "/api/generate": {"prompt": "Hi"},
}


@pytest.mark.parametrize("path", CALLS)
def test_every_dialect_knows_it(client: Client, path: str) -> None:
    reply = client.post("/api/create", {**PIRATE, "stream": False})
    assert reply.json() == {"status": "success"} and reply.headers["x-pagoda-ignored"] == "parameters.mirostat"
    assert client.post(path, {"model": "Pirate:latest", **CALLS[path], "stream": False}).status_code == 200
    told, params = seen(client)
    assert told == [*BEGIN, ASKED]
    assert (params.temperature, params.stop, params.seed, params.max_tokens) == (0.25, ("Arr", "Ho"), 7, 9)
    assert client.post(path, {"model": "fake-model", **CALLS[path], "stream": False}).status_code == 200
    told, params = seen(client)
    assert told == [ASKED] and params.temperature != 0.25 and params.stop == ()


def test_what_a_request_says_comes_before_what_the_model_says(client: Client) -> None:
    client.post("/api/create", PIRATE)
    own = {"role": "system", "content": "Be short."}
    client.chat(model="pirate", messages=[own, ASKED], temperature=0.5, stop=[], seed=1)
    told, params = seen(client)
    assert told == [own, *PIRATE["messages"], ASKED]
    assert (params.temperature, params.stop, params.seed, params.max_tokens) == (0.5, (), 1, 9)
    client.post("/api/generate", {"model": "pirate", "prompt": "Hi", "system": "Be short.", "options": {"seed": 2}})
    told, params = seen(client)
    assert told[0] == own and (params.seed, params.temperature) == (2, 0.25)
    counted = client.post("/tokenize", {"model": "pirate", "messages": [ASKED]}).json()["count"]
    assert counted > client.post("/tokenize", {"messages": [ASKED]}).json()["count"]


def test_it_is_listed_shown_and_there_after_a_restart(client: Client, tmp_path: Path) -> None:
    client.post("/api/create", PIRATE)
    client.post("/api/create", {"model": "me/captain:v1", "from": "pirate", "system": "Captain."})
    with Client(server(tmp_path)) as again:
        for each in (client, again):
            names = [model["name"] for model in each.get("/api/tags").json()["models"]]
            assert names == ["fake-model:latest", "pirate:latest", "me/captain:v1"]
            cards = {card["id"]: card["parent"] for card in each.get("/v1/models").json()["data"]}
            assert cards == {"fake-model": None, "pirate": "fake-model", "me/captain:v1": "pirate"}
        shown = again.post("/api/show", {"model": "me/captain:v1"}).json()
        assert shown["system"] == "Captain." and shown["messages"] == PIRATE["messages"]
        assert shown["details"]["parent_model"] == "pirate"
        parameters = [line.split() for line in shown["parameters"].splitlines()]
        assert ["temperature", "0.25"] in parameters and ["stop", '"Arr"'] in parameters
        assert ["stop", '"Ho"'] in parameters and ["num_predict", "9"] in parameters
        told = again.post("/api/show", {"model": "pirate"}).json()["modelfile"]
        assert told.startswith("FROM fake-model:latest\n") and 'SYSTEM """You are a "pirate"."""' in told
        assert 'MESSAGE assistant "Ahoy!"' in told
    with Client(server(tmp_path, root="/models/other")) as other:
        assert [model["name"] for model in other.get("/api/tags").json()["models"]] == ["fake-model:latest"]


def test_the_ollama_package_creates_copies_and_deletes(tmp_path: Path) -> None:
    engine = FakeEngine()
    with on_port(server(tmp_path, engine=engine), engine) as url:
        api = ollama.Client(host=url)
        told = list(api.create("pirate", from_="fake-model", system="Arr.", parameters={"seed": 3}, stream=True))
        assert told[-1].status == "success"
        assert api.copy("pirate", "buccaneer").status == "success"
        assert api.copy("fake-model", "plain").status == "success"
        assert api.chat("buccaneer", [ASKED]).message.content and engine.requests[-1].params.seed == 3
        assert api.show("buccaneer").parameters and len(api.list().models) == 4
        assert api.delete("buccaneer").status == "success" and api.delete("plain").status == "success"
        assert [each.model for each in api.list().models] == ["fake-model:latest", "pirate:latest"]
        with pytest.raises(ollama.ResponseError, match="not found"):
            api.chat("buccaneer", [ASKED])
        with pytest.raises(ollama.ResponseError, match="is being served"):
            api.delete("fake-model")
        with pytest.raises(ollama.ResponseError, match="pagoda serve FILE"):
            api.create_blob(__file__)
        with pytest.raises(ollama.ResponseError, match="not pushed"):
            api.push("pirate")


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"from": "llama3"}, 404, "not found"),
        ({"from": ""}, 400, "from must name"),
        ({"model": "../x"}, 400, "must be a name"),
        ({"model": "a" * 300}, 400, "must be a name"),
        ({"model": ""}, 400, "must be a name"),
        ({"model": "Fake-Model:latest"}, 400, "served model itself"),
        ({"files": {"x.gguf": "sha256:00"}}, 400, "not both"),
        ({"files": {"x.gguf": "sha256:00"}, "from": ""}, 501, "keeps no models"),
        ({"adapters": {"x": "sha256:00"}}, 400, "LoRA"),
        ({"quantize": "q4_K_M"}, 400, "--quantization"),
        ({"template": "{{ .Prompt }}"}, 400, "--chat-template"),
        ({"parameters": {"temperature": "hot"}}, 400, "parameters: temperature"),
        ({"parameters": {"top_p": 2}}, 400, "parameters: top_p"),
        ({"parameters": {"num_ctx": 1 << 30}}, 400, "num_ctx"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0]"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, 400, "messages[0]"),
        ({"system": "x" * (1 << 20)}, 413, "1 MiB"),
    ],
)
def test_what_cannot_be_made(client: Client, change: dict[str, Any], status: int, words: str) -> None:
    reply = client.post("/api/create", {**PIRATE, **change})
    assert reply.status_code == status and words in reply.json()["error"]
    assert len(client.get("/api/tags").json()["models"]) == 1


def test_the_models_own_template_may_be_sent_back(client: Client) -> None:
    shown = client.post("/api/show", {"model": "fake-model"}).json()
    assert client.post("/api/create", {**PIRATE, "template": shown["template"]}).status_code == 200


def test_a_server_that_everyone_can_reach_makes_none(tmp_path: Path) -> None:
    with Client(server(tmp_path, local=False)) as client:
        for path, body in (("create", PIRATE), ("copy", {"source": "fake-model", "destination": "x"})):
            assert client.post(f"/api/{path}", body).status_code == 403


def test_limits_and_a_folder_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derived, "MAX_DERIVED", 1)
    with Client(server(tmp_path)) as client:
        assert client.post("/api/create", PIRATE).status_code == client.post("/api/create", PIRATE).status_code == 200
        assert client.post("/api/copy", {"source": "pirate", "destination": "x"}).status_code == 413
    (tmp_path / "file").write_text("")
    with Client(server(tmp_path / "file")) as client:
        reply = client.post("/api/create", PIRATE)
        assert reply.status_code == 507 and "PAGODA_CACHE" in reply.json()["error"]
