"""Hunyuan, dense: Llama's layers, whose queries and keys are normed behind RoPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import decoder
from pagoda.arch.fields import Fields
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    return of_config("hunyuan_v1_dense", config)


def of_config(model_type: str, config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, "config.json")
    bias = fields.flag("attention_bias", False)
    parts = decoder.Parts(qkv_bias=bias, out_bias=bias, qk_norm=True, qk_norm_late=True)
    return decoder.from_config(model_type, fields, parts)


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    return of_gguf("hunyuan_v1_dense", "hunyuan-dense", metadata, tensors)


def of_gguf(
    model_type: str, architecture: str, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> ModelSpec:
    parts = decoder.Parts(qk_norm=True, qk_norm_late=True)
    return decoder.from_gguf(model_type, metadata, tensors, parts=parts, prefix=architecture)
