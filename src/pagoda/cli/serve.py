"""`pagoda serve`: takes the port, finds the model, starts the engine, and serves while that loads."""

from __future__ import annotations

import os
import sys

from pagoda.cli.help import serve_help
from pagoda.cli.inputs import load, show, split
from pagoda.cli.screen import ProgressLine
from pagoda.config import Options
from pagoda.deploy.default_model import default_model_path
from pagoda.deploy.find_model import check_format, find_model
from pagoda.settings import Settings, check


def run(argv: list[str]) -> int:
    """The command; the result is the exit code."""
    inputs = split(argv)
    if inputs.help is not None:
        print(serve_help(inputs.help), end="")
        return 0
    settings = load(inputs, os.environ)
    if inputs.show_config:
        print(show(settings))
        return 0
    check(settings)
    return _serve(settings)


def _serve(settings: Settings) -> int:
    options = settings.options
    from pagoda.api.listen import bind_socket

    listener = bind_socket(options.host, options.port)
    say(settings.notices)
    path = _local(options)
    from pagoda.engine.client import EngineClient

    engine = EngineClient(options.engine_config(path))
    engine.spawn()
    # The web server is imported while the engine loads in its own process.
    from pagoda.api.run import run_server

    return run_server(options, engine, listener, path, ProgressLine())


def say(lines: tuple[str, ...]) -> None:
    for line in lines:
        print(f"note: {line}", file=sys.stderr)


def _local(options: Options) -> str:
    """The model's path; the default model is fetched where none was named."""
    if options.model is None:
        progress = ProgressLine()
        try:
            return default_model_path(progress)
        finally:
            progress.clear()
    path = find_model(options.model, os.environ)
    check_format(path, options.load_format, options.quantization)
    return path
