"""Qwen3.5 (dense), its language model: the layers of Qwen3-Next with plain MLPs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import hybrid
from pagoda.arch.fields import Fields
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    return hybrid.from_config("qwen3_5", Fields(hybrid.text_fields(config), "config.json"))


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    return hybrid.from_gguf("qwen3_5", "qwen35", metadata, tensors, tiled=True)
