"""Coding agents as people run them, where they are installed: one session each, with a command run and its result read.

The model is scripted: first it thinks and calls the agent's own tool, then, with the result before it, it answers.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from api_fake import EOS, FakeEngine, PlainTemplate, make_server, on_port
from test_ollama_answers import SOURCE

from pagoda.types import Delta, Request

DONE = "The file says pagoda-17."


class Scripted(FakeEngine):
    """Calls `tool` until its result is in the prompt."""

    def __init__(self, tool: str, arguments: dict[str, Any]) -> None:
        super().__init__(max_model_len=2_000_000, model_max_len=2_000_000)
        call = json.dumps({"name": tool, "arguments": arguments})
        self._call = f"<think>\nLet me look.\n</think>\n\nI look.\n<tool_call>\n{call}\n</tool_call>"

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        prompt = bytes(i for i in request.prompt_token_ids if i < 256).decode()
        self.tokens = [*(DONE if "pagoda-17" in prompt else self._call).encode(), EOS]
        async for delta in super().generate(request):
            yield delta


@contextmanager
def agent(name: str, engine: Scripted, folder: Path) -> Iterator[tuple[str, str, dict[str, str]]]:
    """The agent's path, the server's address, and an environment that holds nothing of this user's."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    home = folder / "home"
    home.mkdir()
    (folder / "note.txt").write_text("pagoda-17\n")
    kept = {key: value for key, value in os.environ.items() if key in ("PATH", "LANG", "TMPDIR")}
    server = make_server(engine, chat_template=PlainTemplate(SOURCE), names=("small",))
    with on_port(server, engine) as url:
        yield path, url, {**kept, "HOME": str(home), "NO_PROXY": "127.0.0.1,localhost"}


def said(command: list[str], folder: Path, environ: dict[str, str]) -> str:
    done = subprocess.run(
        command, cwd=folder, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_codex(tmp_path: Path) -> None:
    engine = Scripted("exec_command", {"cmd": "cat note.txt"})
    with agent("codex", engine, tmp_path) as (codex, url, environ):
        provider = f'model_providers.p={{name="Pagoda",base_url="{url}/v1",env_key="KEY",wire_api="responses"}}'
        command = [codex, "exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", "-m", "small"]
        options = ["-c", "model_provider=p", "-c", provider, "What does note.txt say?"]
        assert DONE in said([*command, *options], tmp_path, {**environ, "KEY": "any"})
    assert len(engine.requests) == 2


def test_claude_code(tmp_path: Path) -> None:
    engine = Scripted("Bash", {"command": "cat note.txt", "description": "Read the note"})
    with agent("claude", engine, tmp_path) as (claude, url, environ):
        environ |= {"ANTHROPIC_BASE_URL": url, "ANTHROPIC_AUTH_TOKEN": "any", "ANTHROPIC_MODEL": "small"}
        environ |= {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_AUTOUPDATER": "1"}
        command = [claude, "-p", "What does note.txt say?", "--allowedTools", "Bash(cat:*)"]
        assert DONE in said(command, tmp_path, environ)
    assert len(engine.requests) >= 2


def test_cline(tmp_path: Path) -> None:
    """Its provider is the AI SDK's for servers like OpenAI's, whose schemas are strict."""
    engine = Scripted("run_commands", {"commands": ["cat note.txt"]})
    with agent("cline", engine, tmp_path) as (cline, url, environ):
        provider = ["-P", "openai-compatible", "-m", "small"]
        said(
            [cline, "auth", "-p", "openai-compatible", "-k", "any", "-m", "small", "-b", url + "/v1"], tmp_path, environ
        )
        assert DONE in said([cline, *provider, "--auto-approve", "true", "What does note.txt say?"], tmp_path, environ)
    assert len(engine.requests) >= 2


def test_opencode(tmp_path: Path) -> None:
    engine = Scripted("bash", {"command": "cat note.txt", "description": "Read the note"})
    with agent("opencode", engine, tmp_path) as (opencode, url, environ):
        provider = {"npm": "@ai-sdk/openai-compatible", "options": {"baseURL": url + "/v1", "apiKey": "any"}}
        config: dict[str, Any] = {
            "autoupdate": False,
            "share": "disabled",
            "model": "p/small",
            "small_model": "p/small",
        }
        config["provider"] = {"p": {**provider, "models": {"small": {"name": "small"}}}}
        (tmp_path / "opencode.json").write_text(json.dumps(config))
        assert DONE in said([opencode, "run", "What does note.txt say?"], tmp_path, environ)
    assert len(engine.requests) >= 2
