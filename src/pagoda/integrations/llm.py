"""`pagoda.LLM`: the engine in this process, of a model that may be named as on a hub and is fetched on first use."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pagoda.deploy.download.find_model import cached_model, find_model
from pagoda.deploy.download.hub import offline, split_name
from pagoda.deploy.download.pull import Report, pull, wanted
from pagoda.deploy.download.transfer import Progress
from pagoda.engine.llm import LLM as LocalLLM


class LLM(LocalLLM):
    """The engine's (its options and methods are told there), of a model that may also be named as on a hub."""

    def __init__(
        self, model: str, *, seed: int | None = None, vllm_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        given = {**(vllm_kwargs or {}), **options}
        path = model_here(model, given.get("revision"), given.get("download_dir"))
        super().__init__(path, seed=seed, vllm_kwargs=vllm_kwargs, **options)


def model_here(name: str, revision: str | None = None, download_dir: str | None = None) -> str:
    """The path of a model that is named by its path, or as on a hub; fetched where no cache has it."""
    if Path(name).expanduser().exists() or split_name(name) is None:
        return name
    environ = {**os.environ, **({"HF_HUB_CACHE": download_dir} if download_dir else {})}
    cached = cached_model(name, environ, revision)
    if cached is not None:
        return cached
    if offline(environ):
        return find_model(name, environ)
    want = replace(wanted(name), revision=revision)
    return str(pull(want, environ, Report(_Tenths(name), _say)).model)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class _Tenths:
    """A line for each tenth of a download: it may go to a notebook or a log, where no line can be written anew."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._told = -1

    def __call__(self, progress: Progress) -> None:
        tenth = 10 * progress.done_bytes // max(1, progress.total_bytes)
        if progress.bytes_got and tenth > self._told:
            self._told = tenth
            _say(f"{self._name}: {10 * tenth} % of {progress.total_bytes / 2**20:,.0f} MiB")
