"""Llama: Llama 1 to 3.x, SmolLM, TinyLlama and the many that share its layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import decoder, mixture, pixtral
from pagoda.arch.fields import Fields
from pagoda.arch.spec import Experts, ModelSpec
from pagoda.weights.source import Tensor


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, "config.json")
    bias = fields.flag("attention_bias", False)
    parts = decoder.Parts(qkv_bias=bias, out_bias=bias, mlp_bias=fields.flag("mlp_bias", False))
    return decoder.from_config("llama", fields, parts)


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    # converters to GGUF reorder the rows of q and k of this architecture, so that pairs are neighbours
    spec = decoder.from_gguf("llama", metadata, tensors, interleaved=True)
    fields = Fields(metadata, "GGUF metadata", "llama.")
    if count := fields.integer("expert_count", 0, least=0):  # Mixtral
        experts = Experts(count, fields.integer("expert_used_count"), normalized=True)
        return mixture.with_mixtures(spec, spec.layers[0].mlp.size, experts)
    return pixtral.seeing(spec, metadata, tensors)
