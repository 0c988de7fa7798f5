"""Qwen3-Next: a gated delta net in three of four layers, gated attention in the fourth, and a mixture in each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import hybrid, mixture
from pagoda.arch.fields import Fields
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields({"norm_topk_prob": True, **hybrid.text_fields(config)}, "config.json")
    spec = hybrid.from_config("qwen3_next", fields)
    return mixture.from_config(spec, fields, shared=fields.integer("shared_expert_intermediate_size"))


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    return hybrid.from_gguf("qwen3_next", "qwen3next", metadata, tensors, tiled=False, experts=True)
