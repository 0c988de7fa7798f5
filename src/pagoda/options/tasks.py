"""What a model is run for, as the options --runner, --convert and --task say it together."""

from __future__ import annotations

from types import MappingProxyType
from typing import Literal, cast

Task = Literal["auto", "generate", "pooling", "embed", "score"]
"""`auto`: what its own files say; `pooling`: that, but a model that generates text is made to embed."""

_SAME = MappingProxyType({"classify": "score", "embedding": "embed"})


def task_of(model: str | None, runner: str, convert: str, task: str) -> Task:
    """A chat model with "rerank" in its name scores, unless something else is asked for."""
    for word in (runner, task, convert):
        word = _SAME.get(word, word)
        if word in ("generate", "embed", "score"):
            return cast(Task, word)
    if "rerank" in (model or "").rpartition("/")[2].lower():
        return "score"
    return "pooling" if runner == "pooling" else "auto"
