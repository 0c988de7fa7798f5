"""`pagoda run-batch`: answer the requests in a file without a server."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pagoda.cli.inputs import load, split
from pagoda.cli.model import local_model
from pagoda.cli.screen import ProgressLine
from pagoda.errors import BadRequest, ConfigError
from pagoda.options.check import check

if TYPE_CHECKING:
    from pagoda.api.batch.protocol import BatchResult
    from pagoda.api.serving.server import Server
    from pagoda.engine.client import EngineClient

HELP = """\
Usage: pagoda run-batch -i INPUT.jsonl -o OUTPUT.jsonl --model MODEL [options of serve]

Answers a file of requests, one JSON object a line as OpenAI's batches have them, and ends:
  {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...]}}

The output has a line for each, in the same order: {"id", "custom_id", "response", "error"}. It is there when all are
answered. The exit code is 0 if every line got an answer, whatever its status is.

Example:
  pagoda run-batch -i questions.jsonl -o answers.jsonl --model ./qwen3-0.6b

Options:
  -i, --input-file FILE     the requests
  -o, --output-file FILE    the answers
  all options of serve that concern the model, the machine and the scheduling: pagoda serve --help
"""

_FILES = {"-i": "input", "--input-file": "input", "-o": "output", "--output-file": "output"}
_AHEAD = 4
"""Requests that are under way for each place of the engine."""


def run(argv: list[str]) -> int:
    files, rest = _take_files(argv)
    inputs = split(rest)
    if inputs.help is not None:
        print(HELP, end="")
        return 0
    for name in ("input", "output"):
        if name not in files:
            raise ConfigError(f"pagoda run-batch needs an {name} file", remedy=f"Give -{name[0]} FILE.jsonl")
    source, target = Path(files["input"]), Path(files["output"])
    try:
        requests = [line for line in source.read_bytes().splitlines() if line.strip()]
        part = target.with_name(target.name + ".part")
        part.touch()
    except OSError as error:
        raise ConfigError(f"{error.filename} can't be used: {error.strerror}", remedy="Look at -i and -o") from None
    settings = load(inputs, os.environ)
    check(settings)
    from pagoda.cli.serve import make_server
    from pagoda.engine.client import EngineClient
    from pagoda.observe import setup_logging

    setup_logging(settings.options.log_level)
    path = local_model(settings.options)
    engine = EngineClient(settings.options.engine_config(path))
    engine.spawn()
    server = make_server(settings.options, path, engine)
    good = asyncio.run(_answer(server, engine, requests, part))
    part.replace(target)
    print(f"{target}: {len(requests)} results, {good} of them answers", file=sys.stderr)
    return 0


def _take_files(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    files: dict[str, str] = {}
    rest: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.partition("=")
        name = name.replace("_", "-") if name.startswith("--") else name
        if name not in _FILES:
            rest.append(word)
            continue
        if not equals and not words:
            raise ConfigError(f"{name} needs a file", remedy=f"Write {name} FILE.jsonl")
        files[_FILES[name]] = value if equals else words.pop(0)
    return files, rest


async def _answer(server: Server, engine: EngineClient, requests: list[bytes], part: Path) -> int:
    """Write a result for each request, in order. Gives the number of those with status 200."""
    import msgspec

    progress = ProgressLine()
    try:
        await engine.start(progress)
        progress.clear()
        ahead = _AHEAD * engine.info.max_num_seqs
        tasks: list[asyncio.Task[BatchResult]] = []
        good = 0
        with part.open("wb") as out:
            for done in range(len(requests)):
                while len(tasks) < min(len(requests), done + ahead):
                    tasks.append(asyncio.create_task(_result(server, requests[len(tasks)])))
                result = await tasks[done]
                good += result.response is not None and result.response.status_code == 200
                out.write(msgspec.json.encode(result) + b"\n")
        return good
    finally:
        progress.clear()
        await engine.stop()


async def _result(server: Server, raw: bytes) -> BatchResult:
    from pagoda.api.batch.call import ask, failed, read_line

    try:
        line = read_line(raw)
    except BadRequest as error:
        return failed(None, error.code, str(error))
    return await ask(server, line, priority=0)
