"""`pagoda rm`: removes models from the caches."""

from __future__ import annotations

import os

from pagoda.cli.screen import size
from pagoda.cli.words import read_words
from pagoda.deploy.download.cached import cached_models, remove
from pagoda.errors import ConfigError, ModelError

HELP = """\
Usage: pagoda rm NAME [NAME ...] [--source huggingface|modelscope|created]

Removes models from the Hugging Face and ModelScope caches, with what an unfinished pull has left, and those that
clients of a server made of files (created). Folders of --local-dir are yours: remove them with rm.

Examples:
  pagoda rm Qwen/Qwen3-0.6B
"""
CACHES = ("huggingface", "modelscope", "created")


def run(argv: list[str]) -> int:
    """The command; the result is the exit code."""
    words = read_words("rm", argv, ("source",), ("help",), {"-h": "help"})
    if "help" in words.switches:
        print(HELP, end="")
        return 0
    if not words.plain:
        raise ConfigError("pagoda rm needs the name of a model", remedy="Which there are: pagoda list")
    source = words.last("source")
    if source not in (None, *CACHES):
        raise ConfigError(f"There is no cache {source}", remedy=f"Caches are {', '.join(CACHES)}")
    models = [model for model in cached_models(os.environ) if source in (None, model.cache)]
    for name in words.plain:
        if not any(model.name == name for model in models):
            raise ModelError(f"{name} is not in the caches", remedy="Which there are: pagoda list")
    for model in models:
        if model.name in words.plain:
            remove(model)
            print(f"removed {model.name} ({size(model.size_bytes)}) from {model.folders[0]}")
    return 0
