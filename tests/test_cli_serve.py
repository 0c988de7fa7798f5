"""`pagoda serve` as a process: the port first, then the model, the table, an answer, and a clean end."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pagoda.cli.address import address, is_loopback
from pagoda.cli.serve import welcome
from pagoda.deploy.download.default_model import FILE
from pagoda.engine.messages import ModelInfo
from pagoda.options.config import Options

START_S = 60
ENVIRON = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"}


def launch(*words: str, module: str = "pagoda.cli.main") -> subprocess.Popen[str]:
    command = [sys.executable, "-m", module, *(["serve"] if module == "pagoda.cli.main" else []), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRON)


def wait_for_port(process: subprocess.Popen[str]) -> tuple[str, int]:
    """All that was printed until the address, and the port in it."""
    if process.stdout is None:
        raise RuntimeError("stdout is not a pipe")
    text, watchdog = "", threading.Timer(START_S, process.kill)
    watchdog.start()
    try:
        for line in process.stdout:
            text += line
            if found := re.search(r"http://localhost:(\d+)/v1 answers", line):
                return text, int(found[1])
    finally:
        watchdog.cancel()
    process.kill()
    pytest.fail(f"the server did not start: {text} {process.communicate()}")


@pytest.fixture(scope="module")
def running(smollm2_path: str) -> Iterator[tuple[subprocess.Popen[str], str, int]]:
    words = ("--model", smollm2_path, "--port", "0", "--max-model-len", "256", "--enforce-eager", "--threads", "1")
    process = launch(*words, module="pagoda.entrypoints.openai.api_server")
    text, port = wait_for_port(process)
    yield process, text, port
    if process.poll() is None:
        process.kill()
    process.communicate()


def call(port: int, method: str, path: str, body: object = None) -> tuple[int, dict[str, object]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        content = None if body is None else json.dumps(body)
        connection.request(method, path, content, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def test_it_prints_a_table_and_answers(running: tuple[subprocess.Popen[str], str, int], smollm2_path: str) -> None:
    _, _, port = running
    status, models = call(port, "GET", "/v1/models")
    listed = models["data"]
    assert status == 200 and isinstance(listed, list)
    assert (listed[0]["id"], listed[0]["max_model_len"]) == (smollm2_path, 256)
    body = {"model": smollm2_path, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0}
    status, reply = call(port, "POST", "/v1/chat/completions", body)
    choices = reply["choices"]
    assert status == 200 and isinstance(choices, list) and choices[0]["message"]["content"]


def test_chat_talks_to_it(running: tuple[subprocess.Popen[str], str, int]) -> None:
    _, _, port = running
    words = ["chat", "--url", f"http://localhost:{port}/v1", "-q", "Hi", "--max-tokens", "4"]
    done = subprocess.run(
        [sys.executable, "-m", "pagoda.cli.main", *words], capture_output=True, text=True, env=ENVIRON, check=True
    )
    assert done.stdout.strip() and not done.stderr


def test_the_curl_it_prints_works(running: tuple[subprocess.Popen[str], str, int]) -> None:
    """The last lines printed are a command: what they send is what the server takes."""
    process, text, port = running
    if process.stdout is None:
        raise RuntimeError("stdout is not a pipe")
    while " -d " not in text:
        text += process.stdout.readline()
    assert "context" in text and "256 tokens" in text
    body = re.search(r"-d '(.*)'", text)
    assert body is not None
    status, _ = call(port, "POST", "/v1/chat/completions", {**json.loads(body[1]), "max_tokens": 2})
    assert status == 200


def test_sigterm_ends_it_and_its_engine(running: tuple[subprocess.Popen[str], str, int]) -> None:
    process, _, port = running
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "CUDA graphs" in err and "Traceback" not in err
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_chat_with_an_engine_of_its_own(smollm2_path: str) -> None:
    words = ["chat", smollm2_path, "-q", "Hi", "--max-tokens", "4", "--max-model-len", "256", "--temperature", "0"]
    done = subprocess.run(
        [sys.executable, "-m", "pagoda.cli.main", *words], capture_output=True, text=True, env=ENVIRON, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_a_taken_port_is_found_before_the_model_is_read() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        process = launch("/nowhere/model", "--port", str(port))
        _, err = process.communicate(timeout=START_S)
    assert process.returncode == 98
    assert f"port {port} is taken" in err and f"--port {port + 1}" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("content", "needle"), [(b"", "pagoda:"), (b"GGUF" + bytes(100), "pagoda:"), (b"<!doctype html>", "pagoda:")]
)
def test_a_broken_model_is_one_sentence(tmp_path: Path, content: bytes, needle: str) -> None:
    path = tmp_path / FILE
    path.write_bytes(content)
    process = launch(str(path), "--port", "0")
    _, err = process.communicate(timeout=START_S)
    assert process.returncode == 65
    assert needle in err and "Traceback" not in err


def test_a_missing_key_on_an_open_address_is_one_warning() -> None:
    process = launch("/nowhere/model", "--port", "0", "--host", "0.0.0.0")
    _, err = process.communicate(timeout=START_S)
    assert process.returncode == 65
    assert err.count("--api-key") == 1
    process = launch("/nowhere/model", "--port", "0", "--host", "0.0.0.0", "--api-key", "k")
    assert "may use this server" not in process.communicate(timeout=START_S)[1]


@pytest.mark.parametrize(
    ("host", "local", "shown"),
    [
        ("127.0.0.1", True, "http://localhost:"),
        ("::1", True, "http://localhost:"),
        ("localhost", True, "http://localhost:"),
        ("0.0.0.0", False, "http://localhost:"),
        ("10.0.0.7", False, "http://10.0.0.7:"),
        ("fd00::7", False, "http://[fd00::7]:"),
    ],
)
def test_addresses(host: str, local: bool, shown: str) -> None:
    assert is_loopback(host) is local
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        assert address(Options(host=host), listener).startswith(shown)
        assert address(Options(uds="/run/p"), listener) == "unix:/run/p"


def test_the_table() -> None:
    info = ModelInfo(
        model="/m",
        architecture="llama",
        vocab_size=9,
        max_model_len=100,
        model_max_len=200,
        num_blocks=1,
        block_size=16,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        weight_bytes=1 << 30,
        kv_bytes=1 << 20,
        activation_bytes=1 << 20,
        device="cpu (avx2, 2 threads)",
        weight_types="Q4_1",
        eos_token_ids=(),
        load_s=0.5,
    )
    text = welcome("it's", info, "http://localhost:8000", needs_key=False)
    for part in ("the model could do 200", "4 requests", "1.0 GiB weights", "avx2", "llama, Q4_1", "0.50 s"):
        assert part in text
    assert "it'\\''s" in text
    assert "Authorization" not in text
    guarded = welcome("m", info, "unix:/run/p", needs_key=True)
    assert "--unix-socket /run/p http://localhost/v1" in guarded and "Authorization: Bearer KEY" in guarded


def test_a_server_may_open_as_many_files_as_it_is_allowed() -> None:
    """A shell gives 1024, and the 1000th client would be turned away."""
    code = (
        "import resource as r; from pagoda.api.http.listen import allow_many_files as many\n"
        "many(); a = r.getrlimit(r.RLIMIT_NOFILE); many(); print(*a, r.getrlimit(r.RLIMIT_NOFILE) == a)"
    )
    for limits, wanted in (("ulimit -Sn 64; ulimit -Hn 5000", "5000 5000 True"), ("ulimit -n 70", "70 70 True")):
        shell = f'{limits}; exec "$0" -c "$1"'
        done = subprocess.run(["bash", "-c", shell, sys.executable, code], capture_output=True, text=True)
        assert done.stdout.strip() == wanted, done.stderr
