"""Qwen3 (dense): Llama's layers with an RMS norm on each head of q and k, and heads of their own size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import decoder
from pagoda.arch.fields import Fields
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor

DEFAULT_HEAD_DIM = 128


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, "config.json")
    bias = fields.flag("attention_bias", False)
    parts = decoder.Parts(qkv_bias=bias, out_bias=bias, qk_norm=True)
    windows = decoder.sliding_windows(fields)
    return decoder.from_config("qwen3", fields, parts, head_dim=DEFAULT_HEAD_DIM, windows=windows)


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    return decoder.from_gguf("qwen3", metadata, tensors, qk_norm=True)
