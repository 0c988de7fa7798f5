"""MiMo 7B: Qwen2's layers. What predicts several tokens at once is left out. In GGUF it is called qwen2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pagoda.arch.models import qwen2
from pagoda.arch.spec import ModelSpec

from_gguf = qwen2.from_gguf


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    return replace(qwen2.from_config(config), model_type="mimo")
