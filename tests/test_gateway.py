"""Several models behind one port: real servers of tiny models, loaded on demand, unloaded, killed, drained."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import engine_tiny
import psutil
import pytest
from gguf_writer import write_gguf
from server_process import PYTHON, running, serve

from pagoda.backend.cpu.machine import free_memory_bytes
from pagoda.deploy.service.scrape import parse

NAMES = ("red", "green", "blue")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {name: engine_tiny.write(folder / name) for name in NAMES}


def config(folder: Path, models: dict[str, str], **more: Any) -> str:
    """A file in which two of the three never fit together, by the caches that they are to have."""
    large = int(0.5 * free_memory_bytes())
    listed = [
        {"model": models["red"], "served-model-name": ["red", "rouge"]},
        {"model": models["green"], "served-model-name": "green", "kv-cache-memory-bytes": large},
        {"model": models["blue"], "served-model-name": "blue", "kv-cache-memory-bytes": large, "keep-alive": "1h"},
    ]
    path = folder / "serve.json"
    path.write_text(json.dumps({"models": listed, "max-num-seqs": 4, "threads": 1, **more}))
    return str(path)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, models: dict[str, str]) -> Iterator[str]:
    path = config(tmp_path_factory.mktemp("config"), models)
    environ = {"PAGODA_CACHE": str(tmp_path_factory.mktemp("cache"))}
    with running(*serve("--config", path, "--api-key", "secret"), environ=environ) as address:
        yield address


def send(
    url: str, path: str, body: Any = None, method: str | None = None, key: str = "secret"
) -> tuple[int, Any, dict[str, str]]:
    """Status, body (text where it is no JSON), headers."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
    request = urllib.request.Request(f"{url}{path}", data, headers, method=method)
    try:
        reply = urllib.request.urlopen(request, timeout=120)
    except urllib.error.HTTPError as error:
        reply = error
    with reply:
        text = reply.read().decode()
    try:
        return reply.status, json.loads(text), dict(reply.headers)
    except ValueError:
        return reply.status, text, dict(reply.headers)


def complete(url: str, model: str, **more: Any) -> tuple[int, Any]:
    body = {"model": model, "prompt": "hello", "max_tokens": 8, "temperature": 0, **more}
    status, reply, _ = send(url, "/v1/completions", body)
    return status, reply


def states(url: str) -> dict[str, str]:
    return {each["names"][0]: each["state"] for each in send(url, "/server_info")[1]["models"]}


def until(condition: Callable[[], bool], limit_s: float = 60.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def servers(*names: str) -> dict[str, psutil.Process]:
    """Name of a model -> its server, of those that this process started."""
    out = {}
    for child in psutil.Process().children(recursive=True):
        words = child.cmdline() if child.status() != psutil.STATUS_ZOMBIE else []
        if "pagoda.cli.child" in words:
            out[json.loads(Path(words[-1]).read_text())["served_model_name"][0]] = child
    return {name: out[name] for name in names}


def test_all_are_listed_and_the_first_is_loaded(url: str) -> None:
    assert send(url, "/health", key="")[:2] == (200, {"status": "ready"})
    _, listed, _ = send(url, "/v1/models")
    assert [card["id"] for card in listed["data"]] == ["red", "rouge", "green", "blue"]
    assert all(card["max_model_len"] == engine_tiny.CONTEXT for card in listed["data"])
    assert [each["name"] for each in send(url, "/api/tags")[1]["models"]] == [
        "red:latest", "rouge:latest", "green:latest", "blue:latest",
    ]  # fmt: skip
    assert send(url, "/v1/models/blue")[1]["id"] == "blue"
    assert send(url, "/version")[0] == send(url, "/openapi.json")[0] == send(url, "/")[0] == 200


def test_a_model_nobody_has_is_the_same_404_as_elsewhere(url: str) -> None:
    status, reply = complete(url, "grey")
    assert status == 404 and reply["error"]["code"] == "model_not_found"
    assert "Served: red, rouge, green, blue" in reply["error"]["message"]
    status, reply, _ = send(url, "/api/chat", {"model": "grey", "messages": []})
    assert status == 404 and reply["error"].startswith("model 'grey' not found")
    assert send(url, "/v1/models/grey")[0] == 404


def test_keys_are_checked_at_the_gateway(url: str) -> None:
    assert send(url, "/v1/models", key="wrong")[0] == 401
    assert send(url, "/v1/completions", {"model": "red", "prompt": "x"}, key="")[0] == 401


def test_errors_are_those_of_the_model_s_server(url: str) -> None:
    status, reply = complete(url, "red", temperature=-1)
    assert status == 400 and reply["error"]["param"] == "temperature"
    assert send(url, "/v1/completions", [1])[0] == 400
    status, reply, _ = send(url, "/v1/nothing", {})
    assert status == 404 and "there is no /v1/nothing here" in reply["error"]["message"]
    assert send(url, "/v1/completions")[0] == 405
    status, reply, _ = send(url, "/api/blobs/sha256:0", {})
    assert status == 400 and "64 hexadecimal digits" in reply["error"]


def test_models_come_when_they_are_named_and_make_room_for_each_other(url: str) -> None:
    assert complete(url, "red")[0] == complete(url, "rouge")[0] == 200
    assert complete(url, "green")[0] == 200
    assert states(url) == {"red": "ready", "green": "ready", "blue": "stopped"}
    status, reply = complete(url, "blue")
    assert status == 200 and reply["model"] == "blue"
    assert states(url) == {"red": "ready", "green": "stopped", "blue": "ready"}, "the first one stays while it can"
    assert {each["name"] for each in send(url, "/api/ps")[1]["models"]} == {"red:latest", "rouge:latest", "blue:latest"}
    loaded = parse(send(url, "/metrics")[1], 0.0)
    assert loaded.get("pagoda:model_loaded", "blue") == 1 and loaded.get("pagoda:model_loaded", "green") == 0
    assert set(loaded.models) == {"red", "blue"}
    assert loaded.get("process_resident_memory_bytes", "blue") > 1e7


def test_two_models_that_cannot_be_together_are_both_answered(url: str) -> None:
    """The queue of each is served whole, then the other one's: nobody gets an error, nobody waits for ever."""
    with ThreadPoolExecutor(12) as pool:
        asked = [NAMES[1 + i % 2] for i in range(12)]
        got = list(pool.map(lambda name: complete(url, name), asked))
    assert [status for status, _ in got] == [200] * 12
    assert [reply["model"] for _, reply in got] == asked
    assert len({reply["choices"][0]["text"] for _, reply in got}) == 1, "the three have the same weights"


def test_a_stream_that_waits_for_its_model(url: str) -> None:
    assert complete(url, "green")[0] == 200
    body = {"model": "blue", "prompt": "hello", "max_tokens": 8, "temperature": 0, "stream": True}
    status, text, headers = send(url, "/v1/completions", body)
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    assert text.rstrip().endswith("data: [DONE]")


def test_keep_alive_0_unloads(url: str) -> None:
    assert complete(url, "blue")[0] == 200
    body = {"model": "blue", "keep_alive": 0, "stream": False}
    _, reply, _ = send(url, "/api/generate", body)
    assert reply["done_reason"] == "unload"
    until(lambda: states(url)["blue"] == "stopped")
    _, reply, _ = send(url, "/api/chat", body)
    assert reply["done_reason"] == "unload" and states(url)["blue"] == "stopped", "nothing is loaded to be unloaded"
    ask = {"model": "green", "prompt": "x", "keep_alive": "300ms", "stream": False, "options": {"num_predict": 2}}
    assert send(url, "/api/generate", ask)[1]["done"] is True
    until(lambda: states(url)["green"] == "stopped")
    assert send(url, "/api/generate", {**ask, "keep_alive": "soon"})[0] == 400


def test_models_that_clients_make_are_found_whether_loaded_or_not(url: str) -> None:
    make = {"model": "pirate", "from": "blue", "system": "Talk like a pirate.", "stream": False}
    assert send(url, "/api/create", make, key="wrong")[0] == 401
    assert send(url, "/api/create", make)[1] == {"status": "success"}
    assert complete(url, "pirate")[1]["model"] == "pirate"
    assert complete(url, "green")[0] == 200 and states(url)["blue"] == "stopped"
    assert "pirate" in [card["id"] for card in send(url, "/v1/models")[1]["data"]]
    assert complete(url, "pirate:latest")[0] == 200 and states(url)["blue"] == "ready"
    assert send(url, "/api/delete", {"model": "pirate"}, method="DELETE")[0] == 200
    assert complete(url, "pirate")[0] == 404


def test_a_model_is_made_of_a_file_that_a_client_sends(url: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", {"general.architecture": "llama"}, {})
    content = (tmp_path / "m.gguf").read_bytes()
    digest = "sha256:" + hashlib.sha256(content).hexdigest()
    path = f"/api/blobs/{digest}"
    assert send(url, path, method="HEAD")[0] == 404
    headers = {"authorization": "Bearer secret", "content-type": "application/octet-stream"}
    with urllib.request.urlopen(urllib.request.Request(url + path, content, headers), timeout=120) as reply:
        assert reply.status == 201
    assert send(url, path, method="HEAD")[0] == 200
    made = {"model": "me/mine", "files": {"m.gguf": digest}, "stream": False}
    assert send(url, "/api/create", made)[:2] == (200, {"status": "success"})
    assert send(url, "/api/delete", {"model": "me/mine"}, "DELETE")[0] == 200
    assert send(url, path, method="HEAD")[0] == 404, "no model uses the file any more"


def test_stored_responses_are_found(url: str) -> None:
    _, made, _ = send(url, "/v1/responses", {"model": "blue", "input": "hello", "max_output_tokens": 16})
    assert send(url, f"/v1/responses/{made['id']}")[1]["id"] == made["id"]
    assert send(url, f"/v1/responses/{made['id']}", method="DELETE")[0] == 200
    assert send(url, f"/v1/responses/{made['id']}")[0] == 404


def test_a_server_that_is_killed_is_started_again(url: str) -> None:
    assert complete(url, "red")[0] == 200
    servers("red")["red"].kill()
    status, reply = complete(url, "red")
    assert status == 200 and len(reply["choices"][0]["text"]) > 0
    until(lambda: states(url)["red"] == "ready")
    # The engine of a model is started again behind its back: the stream goes on.
    engine = next(c for c in servers("red")["red"].children() if "pagoda.engine.process" in c.cmdline())
    with ThreadPoolExecutor(4) as pool:
        expected = complete(url, "red", max_tokens=200, ignore_eos=True)[1]["choices"][0]["text"]
        futures = [pool.submit(complete, url, "red", max_tokens=200, ignore_eos=True) for _ in range(4)]
        engine.kill()
        assert {future.result()[1]["choices"][0]["text"] for future in futures} == {expected}


def test_a_model_whose_files_are_broken(tmp_path: Path, models: dict[str, str]) -> None:
    bad = Path(engine_tiny.write(tmp_path / "bad"))
    path = tmp_path / "serve.json"
    path.write_text(json.dumps({"models": [models["red"], {"model": str(bad), "served-model-name": "bad"}]}))
    with running(*serve("--config", str(path), "--threads", "1")) as url:
        (bad / "tokenizer.json").write_text("{")
        status, reply = complete(url, "bad")
        assert status == 503 and reply["error"]["code"] == "model_not_loaded"
        assert "tokenizer.json" in reply["error"]["message"]
        assert complete(url, "red")[0] == 200
        body = {"model": "bad", "prompt": "x", "stream": True}
        assert send(url, "/v1/completions", body)[0] == 503, "a stream too, while it has not begun"


def test_a_first_model_that_cannot_be_loaded_ends_the_start(tmp_path: Path, models: dict[str, str]) -> None:
    bad = Path(engine_tiny.write(tmp_path / "bad"))
    (bad / "tokenizer.json").write_text("{")
    command = [PYTHON, *serve(str(bad), models["red"], "--threads", "1")]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 65 and "pagoda: the model" in done.stderr and "tokenizer.json" in done.stderr


def test_sigterm_lets_streams_finish_and_leaves_nobody(tmp_path: Path, models: dict[str, str]) -> None:
    with running(*serve(models["red"], models["green"], "--served-model-name", "one", "two")) as url:
        assert complete(url, "two")[0] == 200
        ours = list(servers("one", "two").values())
        everybody = [*ours, *(each for one in ours for each in one.children(recursive=True))]
        with ThreadPoolExecutor(1) as pool:
            stream = {"model": "two", "prompt": "hi", "max_tokens": 240, "ignore_eos": True, "stream": True}
            reading = pool.submit(send, url, "/v1/completions", stream)
            time.sleep(0.05)
            os.kill(ours[0].ppid(), signal.SIGTERM)
            status, text, _ = reading.result()
    assert status in (200, 503) and (status == 503 or text.rstrip().endswith("data: [DONE]"))
    psutil.wait_procs(everybody, timeout=120)
    assert not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in everybody)


def test_children_end_with_a_gateway_that_is_killed(models: dict[str, str]) -> None:
    with running(*serve(models["red"], models["green"], "--served-model-name", "un", "deux")) as url:
        assert send(url, "/health")[0] == 200
        ours = list(servers("un").values())
        os.kill(ours[0].ppid(), signal.SIGKILL)
        _, alive = psutil.wait_procs(ours, timeout=120)
        assert not alive
