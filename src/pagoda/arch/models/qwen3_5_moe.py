"""Qwen3.5 with experts, and its encoder: the layers of Qwen3-Next, whose experts' shares always add up to one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import hybrid, mixture, visual_gguf
from pagoda.arch.fields import Fields
from pagoda.arch.models import qwen3_5
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    table = hybrid.text_fields(config)
    # no MLP but the experts' is there
    fields = Fields(
        {**table, "norm_topk_prob": True, "intermediate_size": table.get("moe_intermediate_size")}, "config.json"
    )
    spec = hybrid.from_config("qwen3_5_moe", fields)
    spec = mixture.from_config(spec, fields, shared=fields.integer("shared_expert_intermediate_size"))
    return qwen3_5.seeing(spec, config)


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    spec = hybrid.from_gguf("qwen3_5_moe", "qwen35moe", metadata, tensors, tiled=True, experts=True)
    return visual_gguf.seeing(spec, metadata, tensors)
