"""LoRA adapters over HTTP: each is a model of its own, and clients load others only where they may."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_fake import Client, FakeEngine, make_server

from pagoda.api.serving.adapters import LoraSide
from pagoda.errors import ConfigError, ModelError
from pagoda.types import Adapter

ROUTES = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")


def write(folder: Path) -> str:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return str(folder)


def check(adapter: Adapter) -> None:
    if "bad" in adapter.path:
        raise ModelError("it was made for another model", remedy="Take another one")


def server(engine: FakeEngine, root: Path | None = None, names: tuple[str, ...] = ("sql",), **more: Any) -> Client:
    adapters = tuple(Adapter(name=name, path=f"/adapters/{name}", stamp=name) for name in names)
    side = LoraSide(adapters=adapters, parents={"sql": "base"}, check=check, root=root)
    return Client(make_server(engine, lora=side, **more))


@pytest.fixture
def client(engine: FakeEngine, tmp_path: Path) -> Iterator[Client]:
    write(tmp_path / "root" / "one")
    write(tmp_path / "root" / "bad")
    write(tmp_path / "outside")
    (tmp_path / "root" / "link").symlink_to(tmp_path / "outside")
    with server(engine, tmp_path / "root") as made:
        yield made


def test_adapters_are_models_with_a_parent(client: Client) -> None:
    cards = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
    assert list(cards) == ["fake-model", "sql"]
    assert (cards["sql"]["parent"], cards["sql"]["root"]) == ("base", "/adapters/sql")
    assert cards["fake-model"]["parent"] is None
    assert client.get("/v1/models/sql").json()["parent"] == "base"


def test_the_model_of_a_request_chooses_its_adapter(client: Client, engine: FakeEngine) -> None:
    ask = {"model": "sql", "max_tokens": 3}
    messages = [{"role": "user", "content": "Hi"}]
    assert client.chat(**ask).json()["model"] == "sql"
    assert client.complete(**ask, n=2).status_code == 200
    assert client.post("/api/chat", {"model": "sql", "messages": messages, "stream": False}).status_code == 200
    assert client.post("/v1/messages", {**ask, "messages": messages}).status_code == 200
    assert client.post("/v1/responses", {"model": "sql", "input": "Hi"}).status_code == 200
    assert [each.adapter and each.adapter.name for each in engine.requests] == ["sql"] * 6
    client.chat(model="fake-model")
    client.chat()
    assert [each.adapter for each in engine.requests[6:]] == [None, None]
    assert client.chat(model="sqll").status_code == 404


def test_models_made_of_an_adapter_keep_it(client: Client, engine: FakeEngine) -> None:
    assert client.post(
        "/api/create", {"model": "mine", "from": "sql", "system": "Be short.", "stream": False}
    ).is_success
    client.chat(model="mine")
    assert engine.requests[-1].adapter is not None and engine.requests[-1].adapter.name == "sql"
    assert client.post(ROUTES[1], {"lora_name": "sql"}).status_code == 200
    gone = client.chat(model="mine")
    assert gone.status_code == 404 and "'sql'" in gone.json()["error"]["message"]


def test_loading_and_unloading(client: Client, engine: FakeEngine, tmp_path: Path) -> None:
    body = {"lora_name": "one", "lora_path": str(tmp_path / "root" / "one")}
    loaded = client.post(ROUTES[0], body)
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'one' added successfully.")
    assert client.chat(model="one").status_code == 200
    first = engine.requests[-1].adapter
    again = client.post(ROUTES[0], body)
    assert again.status_code == 400 and "load_inplace" in again.json()["error"]["message"]
    (tmp_path / "root" / "one" / "adapter_model.safetensors").write_bytes(b"new")
    assert client.post(ROUTES[0], {**body, "load_inplace": True}).status_code == 200
    client.chat(model="one")
    second = engine.requests[-1].adapter
    assert first is not None and second is not None and first.stamp != second.stamp
    assert client.post(ROUTES[1], {"lora_name": "one"}).text.startswith("Success")
    assert client.post(ROUTES[1], {"lora_name": "one"}).status_code == 404
    assert client.chat(model="one").status_code == 404


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"lora_name": "x", "lora_path": "{root}/../outside"}, "--lora-dir"),
        ({"lora_name": "x", "lora_path": "{root}/link"}, "--lora-dir"),
        ({"lora_name": "x", "lora_path": "/etc"}, "--lora-dir"),
        ({"lora_name": "x", "lora_path": "{root}/one\0"}, "lora_path"),
        ({"lora_name": "x", "lora_path": "{root}/nothing"}, "is no folder"),
        ({"lora_name": "x", "lora_path": "{root}/bad"}, "another model"),
        ({"lora_name": "../x", "lora_path": "{root}/one"}, "lora_name"),
        ({"lora_name": "fake-model", "lora_path": "{root}/one"}, "another model"),
        ({"lora_name": "x"}, "lora_path"),
    ],
)
def test_what_is_not_loaded(body: dict[str, str], words: str, client: Client, tmp_path: Path) -> None:
    filled = {key: text.replace("{root}", str(tmp_path / "root")) for key, text in body.items()}
    refused = client.post(ROUTES[0], filled)
    assert refused.status_code == 400 and words in refused.json()["error"]["message"]
    assert len(client.get("/v1/models").json()["data"]) == 2


def test_the_routes_are_there_only_where_they_were_asked_for(engine: FakeEngine, tmp_path: Path) -> None:
    body = {"lora_name": "one", "lora_path": write(tmp_path / "one")}
    for made in (server(engine), Client(make_server(engine))):
        with made:
            assert [made.post(route, body).status_code for route in ROUTES] == [404, 404]
    with server(engine, tmp_path, local=False) as everybody:
        assert everybody.post(ROUTES[0], body).status_code == 403
    with server(engine, tmp_path, api_keys=("k",)) as keyed:
        assert keyed.post(ROUTES[0], body).status_code == 401


def test_an_adapter_is_not_called_as_the_model(engine: FakeEngine) -> None:
    with pytest.raises(ConfigError, match="--served-model-name"):
        server(engine, names=("fake-model",))
