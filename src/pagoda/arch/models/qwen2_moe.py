"""Qwen1.5 and Qwen2 with experts: Qwen2's layers, a mixture in most of them, and an expert that every token shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pagoda.arch import decoder, mixture
from pagoda.arch.fields import Fields
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, "config.json")
    parts = decoder.Parts(qkv_bias=fields.flag("qkv_bias", True))
    spec = decoder.from_config("qwen2_moe", fields, parts, windows=decoder.sliding_windows(fields))
    return mixture.from_config(spec, fields, shared=fields.integer("shared_expert_intermediate_size"))


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    spec = mixture.from_gguf("qwen2moe", metadata, tensors, normalized=False)
    return replace(spec, model_type="qwen2_moe")
