"""OLMoE: Llama's layers with norms of q and k over all heads together, the MLP of each a mixture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import decoder, mixture
from pagoda.arch.fields import Fields
from pagoda.arch.spec import Experts, ModelSpec
from pagoda.weights.source import Tensor

_PARTS = decoder.Parts(qk_norm=True, qk_norm_whole=True)


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, "config.json")
    for name in ("clip_qkv", "attention_bias"):
        if fields.get(name):
            raise fields.error(name, f"is {fields.get(name)!r}, which is not supported")
    spec = decoder.from_config("olmoe", fields, _PARTS)
    count, active = fields.integer("num_experts"), fields.integer("num_experts_per_tok")
    experts = Experts(count, active, fields.flag("norm_topk_prob", False))
    return mixture.with_mixtures(spec, fields.integer("intermediate_size"), experts)


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    spec = decoder.from_gguf("olmoe", metadata, tensors, parts=_PARTS)
    return mixture.grouped_from_gguf(spec, Fields(metadata, "GGUF metadata", "olmoe."), tensors)
