"""IQuest-Coder: Llama under another name. In GGUF it is called llama."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pagoda.arch.fields import Fields
from pagoda.arch.models import llama
from pagoda.arch.spec import ModelSpec

from_gguf = llama.from_gguf


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, "config.json")
    for name in ("clip_qkv", "use_sliding_window"):
        if fields.get(name):
            raise fields.error(name, f"is {fields.get(name)!r}, which is not supported")
    return replace(llama.from_config({"head_dim": 128, **config}), model_type="iquestcoder")
