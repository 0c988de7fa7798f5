"""Qwen2 and Qwen2.5 (dense): Llama's layers with biases on q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import decoder
from pagoda.arch.fields import Fields
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, "config.json")
    parts = decoder.Parts(qkv_bias=True)
    return decoder.from_config("qwen2", fields, parts, windows=decoder.sliding_windows(fields))


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    return decoder.from_gguf("qwen2", metadata, tensors)
