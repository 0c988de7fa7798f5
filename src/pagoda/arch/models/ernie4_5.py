"""ERNIE 4.5 (dense): Llama's layers, whose pairs for RoPE are neighbours; biases everywhere or nowhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import decoder
from pagoda.arch.fields import Fields
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    return of_config("ernie4_5", config)


def of_config(model_type: str, config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields({"tie_word_embeddings": True, **config}, "config.json")
    bias = fields.flag("use_bias", False)
    parts = decoder.Parts(qkv_bias=bias, out_bias=bias, mlp_bias=bias, interleaved=True)
    return decoder.from_config(model_type, fields, parts)


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    return decoder.from_gguf("ernie4_5", metadata, tensors, interleaved=True)
