"""dots.llm1: Qwen3's attention, and behind the first few layers DeepSeek-V3's kind of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import decoder, mixture
from pagoda.arch.fields import Fields
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor

DEFAULT_FULL_LAYERS = 62


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    usual = {"use_sliding_window": True, "max_window_layers": DEFAULT_FULL_LAYERS}
    fields = Fields({**usual, **config}, "config.json")
    bias = fields.flag("attention_bias", False)
    parts = decoder.Parts(qkv_bias=bias, out_bias=bias, qk_norm=True)
    spec = decoder.from_config("dots1", fields, parts, windows=decoder.sliding_windows(fields))
    return mixture.grouped_from_config(spec, fields, sigmoid=True)


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    spec = decoder.from_gguf("dots1", metadata, tensors, qk_norm=True)
    return mixture.grouped_from_gguf(spec, Fields(metadata, "GGUF metadata", "dots1."), tensors)
