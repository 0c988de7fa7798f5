"""docs/troubleshooting.md: each row is provoked for real, and what is then said is what the row says."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import engine_tiny
import pytest
from hub import REPO, Hub, running
from test_cli_serve import ENVIRON, START_S, launch, wait_for_port
from test_plan_fit import QWEN3_4B

from pagoda.cli.main import COMMANDS
from pagoda.options.config import declared

DOCS = Path(__file__).parent.parent / "docs"
PAGES = ("troubleshooting.md", "troubleshooting.zh-CN.md")
ROW = re.compile(r"^\| (\d+) \| (.*?) \| (.*?) \| (.*?) \|$", re.M)
CODE = re.compile(r"``(.+?)``|`(.+?)`")
OLD_PICKLE = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"


def rows(page: str) -> dict[int, tuple[str, ...]]:
    """Number -> the sentences that Pagoda says."""
    found = ROW.findall((DOCS / page).read_text())
    assert [int(row[0]) for row in found] == list(range(1, len(found) + 1))
    return {int(number): tuple(a or b for a, b in CODE.findall(says)) for number, _, says, _ in found}


def command(*words: str, code: str = "", **environ: str) -> str:
    """All that a command prints."""
    start = [sys.executable, *(["-c", code] if code else ["-m", "pagoda.cli.main"]), *words]
    done = subprocess.run(start, capture_output=True, text=True, timeout=90, env={**ENVIRON, **environ}, check=False)
    assert "Traceback" not in done.stderr or code, done.stderr
    return done.stdout + done.stderr


def serve(*words: str, **environ: str) -> str:
    return command("serve", *words, "--port", "0", **environ)


class Case:
    """A model that works, and a folder for one that does not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = engine_tiny.write(folder / "model")

    def copy(self) -> Path:
        return Path(shutil.copytree(self.model, self.folder / "copy"))

    def without(self, name: str) -> str:
        (self.copy() / name).unlink()
        return serve(str(self.folder / "copy"))

    def with_file(self, name: str, content: bytes) -> str:
        (self.copy() / name).write_bytes(content)
        return serve(str(self.folder / "copy"))


def out_of_memory(case: Case) -> str:
    small = ("--max-model-len", "128", "--max-num-batched-tokens", "500000")
    return serve(case.model, *small, "--gpu-memory-utilization", "0.01")


def beside_other_jobs(case: Case) -> str:
    (case.folder / "config.json").write_text(json.dumps(QWEN3_4B))
    return command("plan", str(case.folder), "--gpu", "24GiB", "--gpu-memory-utilization", "0.3")


def small_cache(case: Case) -> str:
    return serve(case.model, "--kv-cache-memory-bytes", "8K", "--max-model-len", "128")


def no_torch(case: Case) -> str:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pagoda.options.engine_config import EngineConfig\nfrom pagoda.engine.core import EngineCore\n"
        f"EngineCore(EngineConfig(model={case.model!r}, device='cuda'))"
    )
    return command(code=code)


def no_langchain(case: Case) -> str:
    """The import is refused as it is where the package is not installed."""
    code = (
        "import sys\nclass Absent:\n    def find_spec(self, name, *rest):\n"
        "        if name.startswith('langchain_core'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}')\n"
        "sys.meta_path.insert(0, Absent())\nimport pagoda.integrations.langchain"
    )
    return command(code=code)


def of_hub(*words: str, change: Callable[[Hub], None] = lambda hub: None) -> str:
    with running({"config.json": b"{}", "model.safetensors": bytes(9000)}) as hub:
        change(hub)
        place = tempfile.mkdtemp()
        return command(*words, "--source", hub.url, HF_HOME=place, HF_HUB_OFFLINE="0", NO_PROXY="127.0.0.1")


def gated(hub: Hub) -> None:
    hub.gated = True


def no_network(case: Case) -> str:
    place = str(case.folder)
    return command("pull", "acme/none", "--source", "http://127.0.0.1:9", HF_HOME=place, NO_PROXY="127.0.0.1")


def closed_folder(case: Case) -> str:
    """Root, whom no permission stops, first gives up the capabilities that make it so."""
    place = case.copy()
    place.chmod(0)
    start = [sys.executable, "-m", "pagoda.cli.main", "serve", str(place), "--port", "0"]
    if os.getuid() == 0:
        start = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *start]
    done = subprocess.run(start, capture_output=True, text=True, timeout=90, env=ENVIRON, check=False)
    place.chmod(0o700)
    return done.stderr


def truncated(case: Case) -> str:
    os.truncate(case.copy() / "model.safetensors", 3000)
    return serve(str(case.folder / "copy"))


def old_pickle(case: Case) -> str:
    (case.copy() / "model.safetensors").unlink()
    (case.folder / "copy" / "pytorch_model.bin").write_bytes(OLD_PICKLE)
    return serve(str(case.folder / "copy"))


def other_architecture(case: Case) -> str:
    config = json.loads((Path(case.model) / "config.json").read_text())
    return case.with_file("config.json", json.dumps({**config, "model_type": "mamba2"}).encode())


def port_taken(case: Case) -> str:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        return command("serve", case.model, "--port", str(holder.getsockname()[1]))


def loading(case: Case) -> str:
    process = launch(case.model, "--port", "0")
    said, _ = wait_for_port(process)
    process.terminate()
    out, err = process.communicate(timeout=START_S)
    return err + said + out


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    model = engine_tiny.write(tmp_path_factory.mktemp("served") / "model")
    process = launch(model, "--port", "0", "--served-model-name", "tiny")
    yield wait_for_port(process)[1]
    process.terminate()
    process.communicate(timeout=START_S)


def posted(port: int, model: str, content: object) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 1}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return str(answer["error"]["message"])


IMAGE = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]

PROVOKE: MappingProxyType[int, Callable[[Case], str]] = MappingProxyType(
    {
        1: out_of_memory,
        2: beside_other_jobs,
        3: small_cache,
        4: lambda case: serve(case.model, "--max-model-len", "1000"),
        5: lambda case: serve(case.model, "--device", "cuda", CUDA_VISIBLE_DEVICES=""),
        6: no_torch,
        7: no_langchain,
        8: lambda case: serve(case.model, "--device", "cpu", "--tensor-parallel-size", "2"),
        9: no_network,
        10: lambda case: of_hub("pull", "acme/other"),
        11: lambda case: of_hub("pull", REPO, change=gated),
        12: lambda case: serve("acme/none", HF_HUB_OFFLINE="1", HF_HOME=str(case.folder)),
        13: lambda case: serve(f"{case.model}s"),
        14: closed_folder,
        15: lambda case: case.with_file("model.safetensors", POINTER.encode()),
        16: lambda case: case.without("config.json"),
        17: lambda case: case.without("tokenizer.json"),
        18: truncated,
        19: old_pickle,
        20: other_architecture,
        21: lambda case: serve(case.model, "--quantization", "squeezellm"),
        22: lambda case: serve(f"{case.model}s", "--trust-remote-code", "--trust-remote-code"),
        23: lambda case: serve(case.model, "--gpu-memory-utilisation", "0.9"),
        24: port_taken,
        25: loading,
        28: lambda case: command("chat", "--url", "http://127.0.0.1:9/v1", "-q", "Hi"),
    }
)
ASKED: MappingProxyType[int, tuple[str, Any]] = MappingProxyType({26: ("gpt-4", "Hi"), 27: ("tiny", IMAGE)})


def said(number: int, text: str) -> None:
    """Each sentence of the row is in the text, in this order."""
    flat, at = " ".join(text.split()), 0
    for sentence in rows(PAGES[0])[number]:
        pattern = re.escape(sentence).replace("…", ".+?")
        found = re.search(pattern, flat[at:])
        assert found, f"{sentence!r} is not in {flat!r}"
        at += found.end()


@pytest.mark.parametrize("number", PROVOKE)
def test_row(number: int, tmp_path: Path) -> None:
    said(number, PROVOKE[number](Case(tmp_path)))


@pytest.mark.parametrize("number", ASKED)
def test_row_of_a_request(number: int, port: int) -> None:
    said(number, posted(port, *ASKED[number]))


def test_every_row_has_a_test() -> None:
    assert set(rows(PAGES[0])) == {*PROVOKE, *ASKED}
    assert all(rows(PAGES[0]).values())


def test_both_languages_quote_the_same_sentences() -> None:
    assert rows(PAGES[0]) == rows(PAGES[1])


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_options_of_the_cures_exist(page: str) -> None:
    flags = {setting.flag for setting in declared()} | {"--gpu", "--source"}
    for row in ROW.findall((DOCS / page).read_text()):
        for quoted, plain in CODE.findall(row[3]):
            words = (quoted or plain).split()
            if words[0] == "pagoda":
                assert words[1] in COMMANDS
            assert not {word for word in words if word.startswith("--")} - flags, row
