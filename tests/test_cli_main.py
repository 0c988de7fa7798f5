"""The command line as a user meets it: help, exit codes, one sentence for each error, no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pagoda import __version__
from pagoda.cli.inputs import load, read_config, split
from pagoda.cli.main import guarded, main
from pagoda.cli.model import sampling_defaults
from pagoda.cli.screen import ProgressLine, size, table
from pagoda.deploy.download.find_model import check_format, find_model
from pagoda.errors import ConfigError, ModelError
from pagoda.options.config import Options


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(words)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("words", [(), ("--help",), ("serve", "--help"), ("chat", "-h")])
def test_help_has_examples(capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    code, out, _ = run(capsys, *words)
    assert code == 0
    assert "Examples:\n  pagoda serve" in out or "Examples:\n  pagoda chat" in out


def test_help_for_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "serve", "--help=max-model-len")
    assert "--max-model-len" in out and "--port" not in out


@pytest.mark.parametrize("words", [("version",), ("--version",), ("-v",)])
def test_version(capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    assert run(capsys, *words)[:2] == (0, f"{__version__}\n")


def test_version_tells_the_kernels(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGODA_CPU_ISA", "generic")
    code, out, _ = run(capsys, "version", "--verbose")
    assert code == 0 and "generic by PAGODA_CPU_ISA" in out


@pytest.mark.parametrize(
    ("words", "code", "needle"),
    [
        (("srve",), 78, "pagoda serve"),
        (("serve", "--prot", "1"), 78, "--port"),
        (("serve", "--port", "0", "--model", "/nowhere/a", "--model", "b"), 65, "/nowhere/a"),
        (("serve", "--port", "0", "-tp", "2"), 78, "only 1 works"),
        (("serve", "--port", "0", "--api-key", ""), 78, "--api-key is empty"),
        (("serve", "--config", "/nowhere.json"), 78, "/nowhere.json"),
        (("serve", "--config"), 78, "FILE"),
        (("serve", "/nowhere/model", "--port", "0"), 65, "/nowhere"),
        (("serve", "nobody/never-there", "--port", "0"), 65, "pagoda pull nobody/never-there"),
        (("serve", "a", "b", "--served-model-name", "c"), 78, "1 names for 2 models"),
        (("serve", "--fallback", "--port", "0", "a", "b"), 78, "--upstream http://"),
        (("serve", "--upstream", "localhost:8000"), 78, "this server itself"),
        (("serve", "--upstream", "ftp://x"), 78, "no address"),
        (("chat", "a", "b"), 78, "pagoda serve"),
        (("chat", "/nowhere/model"), 65, "/nowhere"),
        (("chat", "--threads", "2"), 78, "needs a model"),
        (("chat", "--url", "localhost"), 78, "http://"),
        (("chat", "--url", "http://127.0.0.1:9/v1", "-q", "hi"), 70, "pagoda serve"),
    ],
)
def test_errors_are_a_sentence_and_a_cure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], code: int, needle: str
) -> None:
    monkeypatch.setenv("HF_HOME", "/nowhere")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    got, out, err = run(capsys, *words)
    assert got == code
    assert needle in err
    assert err.startswith("pagoda: ") and len(err.splitlines()) <= 2
    assert "Traceback" not in err and not out


def test_an_unexpected_error_is_a_line_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(inputs: Any) -> Any:
        raise KeyError("surprise")

    monkeypatch.setattr("pagoda.cli.inputs.split", broken)
    monkeypatch.setattr("pagoda.cli.serve.split", broken)
    code, _, err = run(capsys, "serve")
    assert code == 70 and "surprise" in err and "PAGODA_DEBUG=1" in err
    monkeypatch.setenv("PAGODA_DEBUG", "1")
    with pytest.raises(KeyError):
        main(["serve"])


def test_show_config_of_several_models(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "serve", "a", "b", "--show-config")
    assert code == 0 and '{"model": "a"}, {"model": "b"}' in out


def test_show_config_names_origins_and_hides_keys(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = tmp_path / "server.yaml"
    config.write_text("max-num-seqs: 7\n")
    monkeypatch.setenv("VLLM_API_KEY", "very-secret")
    code, out, _ = run(capsys, "serve", "./m", "--port", "8001", "--config", str(config), "--show-config")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert code == 0
    assert "8001" in lines["port"] and lines["port"].endswith("command line")
    assert "7" in lines["max-num-seqs"] and lines["max-num-seqs"].endswith("server.yaml")
    assert "***" in lines["api-key"] and lines["api-key"].endswith("environment VLLM_API_KEY")
    assert lines["host"].endswith("default")
    assert "very-secret" not in out


@pytest.mark.parametrize(
    ("name", "text", "needle"),
    [
        ("a.json", '{"port": 1', "not JSON: line 1"),
        ("a.yaml", "port: [1", "not YAML"),
        ("a.yaml", "- port", "table of options"),
        ("a.yaml", "1: 2", "table of options"),
    ],
)
def test_a_broken_config_file_is_named(tmp_path: Path, name: str, text: str, needle: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError, match=needle) as error:
        read_config(str(path))
    assert str(path) in str(error.value)


def test_the_config_file_may_come_from_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"port": 1}')
    assert load(split([]), {"PAGODA_CONFIG": str(path)}).options.port == 1


def test_a_config_file_may_be_empty_or_json_in_yaml(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("")
    assert read_config(str(path)) == {}
    path.write_text("{port: 1}")
    assert read_config(str(path)) == {"port": 1}


def test_sampling_defaults() -> None:
    of_model = {"temperature": 0.6, "top_k": 20}
    assert sampling_defaults(Options(model="m"), of_model) == of_model
    assert sampling_defaults(Options(model="m", generation_config="vllm"), of_model) == {}
    own = Options(model="m", override_generation_config={"top_k": 5})
    assert sampling_defaults(own, of_model) == {"temperature": 0.6, "top_k": 5}
    for wrong in ({"temperatur": 1}, {"temperature": "hot"}, {"temperature": -1}, {"top_k": True}):
        with pytest.raises(ConfigError, match="--override-generation-config"):
            sampling_defaults(Options(override_generation_config=wrong), {})


def test_the_default_model_samples_as_its_page_recommends() -> None:
    assert sampling_defaults(Options(), {}) == {"temperature": 0.2, "top_p": 0.9}
    assert sampling_defaults(Options(override_generation_config={"temperature": 1}), {})["temperature"] == 1
    assert sampling_defaults(Options(generation_config="vllm"), {}) == {}


class TestFindModel:
    def test_a_path(self, tmp_path: Path) -> None:
        assert find_model(str(tmp_path), {}) == str(tmp_path)

    def test_a_near_miss_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "qwen3-0.6b").mkdir()
        with pytest.raises(ModelError, match=r"Did you mean .*/qwen3-0\.6b\?"):
            find_model(f"{tmp_path}/qwen3-06b", {})

    def test_hugging_face_cache(self, tmp_path: Path) -> None:
        repo = tmp_path / "hub" / "models--Qwen--Qwen3-0.6B"
        for name in ("old", "new"):
            (repo / "snapshots" / name).mkdir(parents=True)
            (repo / "snapshots" / name / "config.json").write_text("{}")
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text("old\n")
        environ = {"HF_HOME": str(tmp_path), "MODELSCOPE_CACHE": "/nowhere"}
        assert find_model("Qwen/Qwen3-0.6B", environ) == str(repo / "snapshots" / "old")

    @pytest.mark.parametrize(
        "place", ["models/Qwen--Qwen3-0.6B/snapshots/master", "models/Qwen/Qwen3-0___6B", "hub/models/Qwen/Qwen3-0.6B"]
    )
    def test_modelscope_cache(self, tmp_path: Path, place: str) -> None:
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "config.json").write_text("{}")
        environ = {"HF_HOME": "/nowhere", "MODELSCOPE_CACHE": str(tmp_path)}
        assert find_model("Qwen/Qwen3-0.6B", environ) == str(tmp_path / place)

    @pytest.mark.parametrize("name", ["../../nowhere/passwd", "a/../b", "Qwen/.."])
    def test_a_name_cannot_climb(self, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "models--a--b").mkdir()
        deep = tmp_path / "x" / "y" / "z"
        deep.mkdir(parents=True)
        monkeypatch.chdir(deep)
        with pytest.raises(ModelError, match="no file or folder"):
            find_model(name, {"HF_HOME": str(tmp_path), "MODELSCOPE_CACHE": str(tmp_path)})

    def test_format_that_contradicts_the_files(self, tmp_path: Path) -> None:
        (tmp_path / "model.safetensors").touch()
        check_format(str(tmp_path), "safetensors", None)
        for load_format, quantization in (("gguf", None), ("auto", "gguf")):
            with pytest.raises(ConfigError, match="are safetensors"):
                check_format(str(tmp_path), load_format, quantization)
        check_format("x.gguf", "gguf", "gguf")


class Stub(BaseHTTPRequestHandler):
    """An OpenAI server that answers with what it was sent."""

    asked: list[dict[str, Any]]

    def do_GET(self) -> None:
        self._reply(200, json.dumps({"data": [{"id": "stub"}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append({**body, "key": self.headers.get("Authorization")})
        if "prompt" in body:
            events: list[Any] = [{"choices": [{"text": f"{body['prompt']} again"}]}]
            events.append({"choices": [], "usage": {"completion_tokens": 7}})
            self._reply(200, "".join(f"data: {json.dumps(e)}\n\n" for e in events) + "data: [DONE]\n\n")
            return
        if body["messages"][-1]["content"] == "fail":
            self._reply(400, json.dumps({"error": {"message": "too long", "code": 400}}))
            return
        words = ("Hel", "lo ", str(len(body["messages"])))
        events = [{"choices": [{"delta": {"content": word}}]} for word in words]
        events.append({"choices": [], "usage": {}})
        self._reply(200, "".join(f"data: {json.dumps(e)}\n\n" for e in events) + ": ping\n\ndata: [DONE]\n\n")

    def _reply(self, status: int, text: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args: Any) -> None:
        return None


@pytest.fixture
def stub() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    asked: list[dict[str, Any]] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Stub,), {"asked": asked}))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1", asked
    server.shutdown()
    server.server_close()
    thread.join()


def test_one_question(
    capsys: pytest.CaptureFixture[str], stub: tuple[str, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    url, asked = stub
    words = ("chat", "--url", url, "-q", "hi", "--system-prompt", "be short", "--temperature", "0", "--max-tokens=5")
    code, out, _ = run(capsys, *words)
    assert (code, out) == (0, "Hello 2\n")
    assert [m["role"] for m in asked[0]["messages"]] == ["system", "user"]
    assert (asked[0]["model"], asked[0]["temperature"], asked[0]["max_tokens"]) == ("stub", 0, 5)
    assert asked[0]["key"] == "Bearer k"


def test_a_text_goes_on_and_its_speed_is_told(
    capsys: pytest.CaptureFixture[str], stub: tuple[str, list[dict[str, Any]]]
) -> None:
    url, asked = stub
    code, out, _ = run(capsys, "complete", "--url", url, "--quick", "so", "--max-tokens", "9", "--stats")
    assert code == 0 and out.startswith("so again\nTTFT: ") and "(7 tokens in " in out
    assert (asked[0]["prompt"], asked[0]["max_tokens"], asked[0]["stream"]) == ("so", 9, True)
    run(capsys, "complete", "--url", url, "so")
    assert asked[1]["prompt"] == "so"
    assert "stream_options" not in asked[1]
    assert run(capsys, "complete", "--system-prompt", "x")[0] == 78
    assert "Examples:\n  pagoda complete" in run(capsys, "complete", "--help")[1]


def test_what_vllm_calls_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    assert "pagoda doctor" in run(capsys, "collect-env", "--help")[1]
    code, _, err = run(capsys, "bench", "sweep", "--model", "m")
    assert code == 78 and "pagoda bench --concurrency 1,4,16" in err


def test_a_chat_remembers_and_forgets(stub: tuple[str, list[dict[str, Any]]]) -> None:
    url, asked = stub
    done = subprocess.run(
        [sys.executable, "-m", "pagoda.cli.main", "chat", "--url", url],
        input="one\ntwo\n/new\nthree\n/exit\nfour\n",
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
    )
    assert done.stdout.splitlines() == ["Hello 1", "Hello 3", "Hello 1"]
    assert [m["content"] for m in asked[1]["messages"]] == ["one", "Hello 1", "two"]


def test_what_the_server_refuses_is_said(
    capsys: pytest.CaptureFixture[str], stub: tuple[str, list[dict[str, Any]]]
) -> None:
    code, _, err = run(capsys, "chat", "--url", stub[0], "-q", "fail")
    assert code == 70 and "400: too long" in err


def test_screen(capsys: pytest.CaptureFixture[str]) -> None:
    line = ProgressLine()
    line("weights", 0.1)
    line("weights", 0.9)
    line.clear()
    assert capsys.readouterr().err == "loading: weights\n"
    assert table([("a", "1"), ("bcd", "2")]) == "  a    1\n  bcd  2"
    assert (size(98_362_432), size(3 << 29)) == ("94 MiB", "1.5 GiB")


def test_the_names_of_ollama_work(capsys: pytest.CaptureFixture[str]) -> None:
    assert "pagoda chat" in run(capsys, "run", "--help")[1]
    assert "pagoda list" in run(capsys, "ls", "--help")[1]


def test_a_full_disk_is_no_error_of_pagoda(capsys: pytest.CaptureFixture[str]) -> None:
    def write() -> int:
        with open("/dev/full", "w") as file:
            file.write("x")
        return 0

    assert guarded(write) == 74
    assert "cannot write" in capsys.readouterr().err
