"""`pagoda list`: the models that are on this machine, with their sizes."""

from __future__ import annotations

import dataclasses
import json
import os
import time

from pagoda.cli.screen import size
from pagoda.cli.words import read_words
from pagoda.deploy.download.cached import CachedModel, cached_models
from pagoda.errors import ConfigError

HELP = """\
Usage: pagoda list [--json]

Shows the models in the Hugging Face and ModelScope caches, and those that clients made of files (created): what
`pagoda serve NAME` starts without a network.

Examples:
  pagoda list
  HF_HOME=/data/hf pagoda list --json
"""


def run(argv: list[str]) -> int:
    """The command; the result is the exit code."""
    words = read_words("list", argv, (), ("help", "json"), {"-h": "help"})
    if "help" in words.switches:
        print(HELP, end="")
        return 0
    if words.plain:
        raise ConfigError(f"pagoda list takes no {words.plain[0]}", remedy="See: pagoda list --help")
    models = cached_models(os.environ)
    if "json" in words.switches:
        rows = [{**dataclasses.asdict(m), "folders": [str(folder) for folder in m.folders]} for m in models]
        print(json.dumps(rows, indent=1))
    elif models:
        print(text(models))
    else:
        print("No models yet. Fetch one: pagoda pull Qwen/Qwen3-0.6B")
    return 0


def text(models: list[CachedModel]) -> str:
    """A table: name, size, last use, cache."""
    rows = [("NAME", "SIZE", "USED", "CACHE")]
    rows += [(m.name, size(m.size_bytes), _ago(m.used_s), f"{m.cache} {m.state}".strip()) for m in models]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:<{widths[2]}}  {d}".rstrip() for a, b, c, d in rows)


def _ago(at_s: float) -> str:
    hours = max(0.0, time.time() - at_s) / 3600
    if hours < 1:
        return "now"
    return f"{hours:.0f} h ago" if hours < 48 else f"{hours / 24:.0f} days ago"
