"""DeepSeek-MoE 16B: Llama's layers, all but the first with many small experts and a shared one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import decoder, mixture
from pagoda.arch.fields import Fields
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, "config.json")
    if (found := fields.get("scoring_func") or "softmax") != "softmax":
        raise fields.error("scoring_func", f"is {found!r}; this architecture is supported with softmax only")
    bias = fields.flag("attention_bias", False)
    spec = decoder.from_config("deepseek", fields, decoder.Parts(qkv_bias=bias, out_bias=bias))
    return mixture.grouped_from_config(spec, fields, sigmoid=False)


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    # as for Llama, converters reorder the rows of q and k
    spec = decoder.from_gguf("deepseek", metadata, tensors, interleaved=True)
    return mixture.grouped_from_gguf(spec, Fields(metadata, "GGUF metadata", "deepseek."), tensors)
