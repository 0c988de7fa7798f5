"""Arcee's AFM: Llama's layers with an MLP without a gate, whose activation is the square of what is above 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import decoder
from pagoda.arch.fields import Fields
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, "config.json")
    bias, mlp_bias = fields.flag("attention_bias", False), fields.flag("mlp_bias", False)
    parts = decoder.Parts(qkv_bias=bias, out_bias=bias, mlp_bias=mlp_bias, gated=False, activation="relu2")
    return decoder.from_config("arcee", fields, parts)


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    # as for Llama, converters reorder the rows of q and k
    parts = decoder.Parts(gated=False, activation="relu2", interleaved=True)
    return decoder.from_gguf("arcee", metadata, tensors, parts=parts)
