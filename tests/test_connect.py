"""`pagoda connect` against running servers: each client's calls, what is printed, and that this works."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from api_fake import FakeEngine, make_server, on_port
from pooled_models import write_model
from server_process import running, serve
from test_pooled_api import minilm, minilm_path, served
from vl_trained import trained

from pagoda.cli.main import main
from pagoda.deploy.connect import calls
from pagoda.deploy.connect.connect import Served, Target
from pagoda.deploy.connect.guides import GUIDES, text

__all__ = ["minilm", "minilm_path"]
KEY = "sesame"
Shown = tuple[int, dict[str, Any]]


@pytest.fixture(scope="module")
def server(smollm2_path: str) -> Iterator[str]:
    """`pagoda serve` with the small model, open to the network and with a key, as for clients in Docker."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "pagoda.cli.main", "serve", smollm2_path, "--served-model-name", "small"]
    command += ["--port", str(port), "--host", "0.0.0.0", "--api-key", KEY, "--max-model-len", "1024"]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(1200):
            try:
                urllib.request.urlopen(url + "/health", timeout=60).read()
                break
            except OSError:
                assert process.poll() is None
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Any:
    def connect(*words: str) -> Shown:
        capsys.readouterr()
        code = main(["connect", *words, "--json"])
        return code, json.loads(capsys.readouterr().out)

    return connect


def failures(report: dict[str, Any]) -> list[str]:
    return [f"{f['topic']}: {f['text']}" for f in report["findings"] if f["level"] == "problem"]


@pytest.mark.parametrize("client", GUIDES)
def test_every_client_works_with_the_real_server(server: str, shown: Any, client: str) -> None:
    code, report = shown(client, "--url", server + "/v1/", "--api-key", KEY)
    assert (code, failures(report)) == (0, [])
    assert (report["model"], report["context"], report["task"]) == ("small", 1024, "generate")
    calls = [f for f in report["findings"] if f["text"].startswith("/v1/")]
    assert calls and all(f["text"].endswith(" ms") for f in calls)
    guide = report["guide"]
    assert "small" in guide and report["url"] in guide and KEY in guide and "$" not in guide
    port = server.rsplit(":", 1)[1]
    assert report["url"].endswith(f":{port}") and not report["url"].endswith("/v1")
    in_docker = GUIDES[client].docker
    assert in_docker == ("127.0.0.1" not in report["url"]), "containers cannot reach 127.0.0.1"
    noted = any("--max-model-len 32000" in f["cure"] for f in report["findings"])
    assert noted == (client in ("claude-code", "codex", "cline"))


def pasted(guide: str) -> str:
    """The part of a guide that is code, as people paste it."""
    return "\n".join(line[2:] for line in guide.splitlines() if line.startswith("  ") or not line)


@pytest.mark.parametrize("client", ["openai", "langchain"])
def test_the_python_that_is_printed_runs(server: str, shown: Any, client: str) -> None:
    _, report = shown(client, "--url", server, "--api-key", KEY)
    done = subprocess.run([sys.executable, "-c", pasted(report["guide"])], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_the_shell_that_is_printed_runs(server: str, shown: Any) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not here")
    _, report = shown("curl", "--url", server, "--api-key", KEY)
    done = subprocess.run(["sh", "-c", pasted(report["guide"])], capture_output=True, text=True, timeout=300)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"]
    _, report = shown("claude-code", "--url", server, "--api-key", KEY)
    script = pasted(report["guide"]).replace("\nclaude", "\nenv")
    seen = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=60, check=True).stdout
    assert f"ANTHROPIC_BASE_URL={server}\n" in seen and f"ANTHROPIC_AUTH_TOKEN={KEY}\n" in seen
    assert "ANTHROPIC_DEFAULT_HAIKU_MODEL=small\n" in seen


def test_the_files_that_are_printed_can_be_read(server: str, shown: Any) -> None:
    _, report = shown("codex", "--url", server, "--api-key", KEY)
    config = tomllib.loads(pasted(report["guide"]))
    assert config["model"] == "small" and config["model_context_window"] == 1024
    assert config["model_providers"][config["model_provider"]]["base_url"] == server + "/v1"
    _, report = shown("spring", "--url", server, "--api-key", KEY)
    openai = yaml.safe_load(pasted(report["guide"]))["spring"]["ai"]["openai"]
    assert (openai["base-url"], openai["api-key"]) == (server, KEY)
    assert openai["chat"]["options"]["model"] == "small"


def test_embedding_models(minilm: str, shown: Any) -> None:
    for client in ("dify", "ragflow", "openwebui", "langchain", "llamaindex", "openai", "spring", "curl"):
        code, report = shown(client, "--url", minilm)
        assert [f for f in failures(report) if not f.startswith("from Docker")] == []
        assert report["task"] == "embed" and code == GUIDES[client].docker
        assert "mbed" in report["guide"]
    code, report = shown("codex", "--url", minilm)
    assert code == 1 and "has no use for a model of the kind embed" in failures(report)[0]


def test_reranking_models(tmp_path: Path, shown: Any) -> None:
    write_model(tmp_path, "bert", transformers.AutoModelForSequenceClassification, num_labels=1)
    with served(tmp_path) as (url, _, _):
        for client in ("dify", "ragflow", "openwebui", "curl"):
            _, report = shown(client, "--url", url)
            assert [f for f in failures(report) if not f.startswith("from Docker")] == []
            assert "erank" in report["guide"]


def test_what_is_wrong_is_said_with_its_cure(capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine()
    with on_port(make_server(engine, api_keys=(KEY,)), engine) as url:
        for words, code, said in (
            (["dify", "--url", url], 70, "--api-key"),
            (["openai", "--url", url, "--api-key", KEY, "--model", "x"], 78, "It serves fake-model"),
            (["openai", "--url", "localhost:8000"], 78, "http://localhost:8000"),
            (["openai", "--url", "http://127.0.0.1:9"], 70, "pagoda serve"),
            (["openai", "--lang", "fr"], 78, "en, zh"),
            (["word", "--url", url], 78, "claude-code"),
            ([], 78, "ragflow"),
        ):
            assert main(["connect", *words]) == code
            assert said in capsys.readouterr().err
        assert main(["connect", "dify", "--url", url, "--api-key", KEY]) == 1
        out = capsys.readouterr().out
        assert "FAIL  from Docker" in out and "--host 0.0.0.0" in out and "Function Call Type" in out
        assert main(["connect", "dify", "--url", url, "--api-key", KEY, "--lang", "zh"]) == 1
        out = capsys.readouterr().out
        assert "从 Docker 访问" in out and "模型上下文长度" in out and "1 个问题" in out
        assert main(["connect", "curl", "--url", url, "--api-key", KEY, "--address", "127.0.0.1"]) == 0
    engine = FakeEngine()
    with on_port(make_server(engine, names=('m"; rm -rf',)), engine) as url:
        assert main(["connect", "curl", "--url", url]) == 78
        assert "--served-model-name" in capsys.readouterr().err


def test_every_guide_is_in_both_languages(capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine()
    with on_port(make_server(engine), engine) as url:
        for client in GUIDES:
            texts = []
            for lang in ("en", "zh"):
                main(["connect", client, "--url", url, "--lang", lang])
                texts.append(capsys.readouterr().out)
            english, chinese = texts
            assert not any("\u4e00" <= char <= "\u9fff" for char in english)
            assert sum("\u4e00" <= char <= "\u9fff" for char in chinese) > 20
    assert main(["connect", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(client in text for client in GUIDES)


CHUNK = '{"id":"x","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"a"}}]}'
END = '{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}'
USED = '{"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":1}}'
GOOD = [CHUNK, END, USED, "[DONE]"]


@contextmanager
def other_server(chat: str, stream: str) -> Iterator[str]:
    """Some OpenAI-like server, with the answers that a test wants."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            models = '{"data":[{"id":"m","max_model_len":99}]}'
            self.reply(models if self.path == "/v1/models" else "", "application/json")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            streams = body.get("stream")
            self.reply(stream if streams else chat, "text/event-stream" if streams else "application/json")

        def reply(self, body: str, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        threading.Thread(target=made.serve_forever).start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()


CHAT = '{"object":"chat.completion","choices":[{"message":{"content":""}}]}'


def sse(*events: str, end: str = "\n\n") -> str:
    return "".join(f"data: {event}{end}" for event in events)


@pytest.mark.parametrize(
    ("chat", "stream", "wrong"),
    [
        (CHAT, sse(*GOOD), []),
        (CHAT.replace('""', "null"), sse(*GOOD), ["choices[0].message.content"]),
        (CHAT.replace("chat.completion", "text"), sse(*GOOD), ["object"]),
        ("no json", sse(*GOOD), ["object"]),
        (CHAT, sse(*GOOD, end="\r\n\r\n"), ["data: {...}"]),
        (CHAT, sse(*GOOD).replace("data: [", "event: end\ndata: ["), ["data: {...}"]),
        (CHAT, sse(CHUNK, END, USED), ["[DONE]"]),
        (CHAT, sse(CHUNK, USED, "[DONE]"), ["finish_reason"]),
        (CHAT, sse(CHUNK, END, "[DONE]"), ["usage"]),
        (CHAT, sse(CHUNK, END, USED, USED, "[DONE]"), ["usage"]),
        (CHAT, sse(*['{"id":"x"}', *GOOD]), ["choices"]),
        (CHAT, "", ["choices"]),
    ],
)
def test_what_breaks_dify_is_seen(shown: Any, chat: str, stream: str, wrong: list[str]) -> None:
    with other_server(chat, stream) as url:
        _, report = shown("dify", "--url", url)
    seen = [f for f in failures(report) if not f.startswith("from Docker")]
    assert len(seen) == len(wrong) and all(w in f for w, f in zip(wrong, seen, strict=True))


@pytest.mark.parametrize(("limit_s", "wrong"), [(60, []), (0, ["the first text took 0 s, and the client waits 0 s"])])
def test_a_first_text_that_ragflow_does_not_wait_for_is_seen(
    shown: Any, monkeypatch: pytest.MonkeyPatch, limit_s: int, wrong: list[str]
) -> None:
    monkeypatch.setattr(calls, "FIRST_TEXT_S", limit_s)
    with other_server(CHAT, sse(*GOOD)) as url:
        _, report = shown("ragflow", "--url", url)
    seen = [f for f in failures(report) if not f.startswith("from Docker")]
    assert len(seen) == len(wrong) and all(w in f for w, f in zip(wrong, seen, strict=True))


def test_addresses() -> None:
    assert Target("http://[::1]:8000/v1").at("10.0.0.1") == "http://10.0.0.1:8000"
    assert Target("https://host/base/v1/").root == "https://host/base"
    assert Target("http://127.0.0.2:1").is_loopback and not Target("http://10.0.0.1:1").is_loopback
    assert Target("http://host:1").at("fe80::1") == "http://[fe80::1]:1"


@pytest.mark.parametrize(
    ("can", "vision", "kind"),
    [(("completion", "vision"), "Support", "image2text"), (("completion",), "Not Support", "chat")],
)
def test_models_that_see_are_added_as_such(can: tuple[str, ...], vision: str, kind: str) -> None:
    served = Served("eyes", 4096, "generate", can)
    lines = text(GUIDES["dify"], served, "http://a:1", "", "en").splitlines()
    assert [line.split()[2:] for line in lines if "Vision support" in line] == [vision.split()]
    assert any(
        line.split()[-1] == kind
        for line in text(GUIDES["ragflow"], served, "http://a:1", "", "en").splitlines()
        if line.strip()
    )


def test_models_that_see_are_shown_a_picture(shown: Any) -> None:
    with running(*serve(trained(), "--served-model-name", "eyes")) as url:
        for client, name in (("dify", "a picture"), ("ragflow", "a picture"), ("claude-code", "")):
            _, report = shown(client, "--url", url)
            assert [f for f in failures(report) if not f.startswith("from Docker")] == []
            assert any(f["topic"] == "a picture" for f in report["findings"]) == bool(name)
