"""The commands of docs/download, planning, service and guides are typed as they stand, against a hub on loopback."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import engine_tiny
import psutil
import pytest
import torch
from hub import Hub, running
from safetensors.torch import load_file
from test_service_manage import CRONTAB, free_port

DOCS = Path(__file__).parent.parent / "docs"
PAGES = ("download.md", "planning.md", "service.md", "guides.md")
PATIENCE_S = 120
FOLDERS = ("qwen3-32b", "qwen3-4b", "qwen3-0.6b", "Qwen3-4B-I-chat")
NOT_TYPED = {
    r"^pip install": "the package index; that the name is right is tested with the clients",
    r"^sudo ": "changes the machine's own systemd; typed without sudo in a system of its own",
    r"^docker ": "needs Docker and images of a registry",
    r" --user$": "changes this user's own systemd",
    r"-f$": "follows until Ctrl-C",
    r"^pagoda top": "shows servers at these ports, or lasts until Ctrl-C; test_top.py types it for servers of its own",
    r"^pagoda serve": "typed apart, in test_serve_of_the_guides, where it is ended when it answers",
}
SAYS = {
    "pagoda plan": ("It fits. To serve it:", "pagoda serve", "in parallel"),
    "pagoda doctor": ("  ok  cpu", "  ok  port", "Nothing here stops serving."),
    "pagoda service status": (" (compose)", "address", "/v1"),
}
"""What is read from commands that would also end with 0 for an answer of another kind."""


def lines(page: str) -> list[str]:
    """Each command with its remark taken off; lines that end in a backslash are one."""
    blocks = re.findall(r"```bash\n(.*?)```", (DOCS / page).read_text(), re.S)
    text = "\n".join(blocks).replace("\\\n", "")
    return [line for one in text.splitlines() if (line := re.sub(r"\s+#.*", "", one).strip())]


def why_not(line: str) -> str | None:
    return next((why for pattern, why in NOT_TYPED.items() if re.search(pattern, line)), None)


@dataclass
class Desk:
    """A folder with the models that the guides name, a home and a hub of its own, and a `pagoda` to type."""

    folder: Path
    environ: dict[str, str]
    hubs: dict[str, Hub]
    port: int

    def type(self, line: str) -> subprocess.CompletedProcess[str]:
        """As it stands, but for the hub's address, the port, and the size of the tiny model's context."""
        name = next((name for name in self.hubs if name in line), None)
        here = {**self.environ, "HF_ENDPOINT": self.hubs[name].url} if name else dict(self.environ)
        here["MODELSCOPE_ENDPOINT"] = here["HF_ENDPOINT"]
        line = re.sub(r"^(export )?HF_ENDPOINT=\S+\s*", "", line) or "true"
        line = re.sub(r"--(port|max-model-len) \d+", self._own, line)
        if re.match(r"pagoda (service install|doctor)", line) and "--port" not in line:
            line += f" --port {self.port}"
        return subprocess.run(
            line, shell=True, cwd=self.folder, env=here, capture_output=True, text=True, timeout=PATIENCE_S
        )

    def _own(self, found: re.Match[str]) -> str:
        return f"--port {self.port}" if found[1] == "port" else f"--max-model-len {engine_tiny.CONTEXT}"


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    folder = tmp_path_factory.mktemp("desk")
    for name in FOLDERS:
        engine_tiny.write(folder / name)
    from_pytorch(folder / "qwen3-0.6b", folder / "qwen2.5-1.5b")
    files = {path.name: path.read_bytes() for path in sorted((folder / "qwen3-0.6b").iterdir())}
    text = "\n".join(line for page in PAGES for line in lines(page))
    names = set(re.findall(r"(?:pull|plan|serve|rm) ([A-Z]\w+/[\w.-]+)", text))
    (folder / "bin").mkdir()
    scripts = {"pagoda": f'#!/bin/sh\nexec {sys.executable} -m pagoda.cli.main "$@"\n'}
    scripts["crontab"] = CRONTAB.format(file=folder / "crontab.txt")
    for name, script in scripts.items():
        (folder / "bin" / name).write_text(script)
        (folder / "bin" / name).chmod(0o755)
    tmux = Path("/tmp") / f"pagoda-{os.getpid()}"  # the path of a socket must be short
    tmux.mkdir()
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PAGODA_", "HF_", "MODELSCOPE_", "TMUX"))}
    environ = {
        **kept,
        "PATH": f"{folder}/bin:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "HOME": str(folder),
        "XDG_CONFIG_HOME": str(folder / "config"),
        "XDG_CACHE_HOME": str(folder / "cache"),
        "TMUX_TMPDIR": str(tmux),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "KEY": "sk-1",
    }
    hubs = {}
    contexts = []
    for name in sorted(names):
        gguf = {"x-Q8_0.gguf": b"GGUF"} if "GGUF" in name else {}
        contexts.append(running({**files, **gguf}, name))
        hubs[name] = contexts[-1].__enter__()
    made = Desk(folder, environ, dict(sorted(hubs.items(), key=lambda item: -len(item[0]))), free_port())
    yield made
    for path in (folder / "config").glob("pagoda/services/*/service.json"):
        made.type(f"pagoda service uninstall {path.parent.name}")
    for context in contexts:
        context.__exit__(None, None, None)
    shutil.rmtree(tmux)


def from_pytorch(source: Path, target: Path) -> None:
    """The same model, of which only pytorch_model.bin is there."""
    shutil.copytree(source, target)
    torch.save(load_file(target / "model.safetensors"), target / "pytorch_model.bin")
    (target / "model.safetensors").unlink()


@pytest.mark.parametrize("page", PAGES)
def test_each_command_does_what_the_guide_says(desk: Desk, page: str) -> None:
    typed = 0
    for line in lines(page):
        if why_not(line):
            continue
        done = desk.type(line)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        wanted = next((words for start, words in SAYS.items() if line.startswith(start)), ())
        assert all(word in done.stdout for word in wanted), f"{line}\n{done.stdout}"
        assert "Traceback" not in done.stderr
        typed += 1
    assert typed >= 3


def serve_lines() -> list[str]:
    return [line for page in PAGES for line in lines(page) if line.startswith("pagoda serve")]


@pytest.mark.parametrize("line", sorted(set(serve_lines())))
def test_serve_of_the_guides(desk: Desk, line: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "pagoda.cli.main", *words(desk, line)],
        cwd=desk.folder,
        env={**desk.environ, "HF_ENDPOINT": next(iter(desk.hubs.values())).url, **hub_of(desk, line)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        said = ""
        for out in process.stdout:
            said += out
            if "answers now" in out:
                break
        assert "answers now" in said, said
    finally:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        process.communicate()


def hub_of(desk: Desk, line: str) -> dict[str, str]:
    return next(({"HF_ENDPOINT": hub.url} for name, hub in desk.hubs.items() if name in line), {})


def words(desk: Desk, line: str) -> list[str]:
    given = shlex.split(re.sub(r"--(port|max-model-len) \d+", desk._own, line))[1:]
    return given if "--port" in given else [*given, "--port", str(free_port())]


def test_what_is_not_typed_is_there_and_has_a_reason() -> None:
    every = [line for page in PAGES for line in lines(page)]
    unused = [pattern for pattern in NOT_TYPED if not any(re.search(pattern, line) for line in every)]
    assert not unused
    assert sum(why_not(line) is None for line in every) > sum(why_not(line) is not None for line in every) / 2


@pytest.mark.parametrize("page", PAGES)
def test_both_languages_have_the_same_commands(page: str) -> None:
    assert lines(page) == lines(page.replace(".md", ".zh-CN.md"))
