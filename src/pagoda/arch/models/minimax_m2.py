"""MiniMax-M2: Llama's layers with norms of q and k over all heads together, partial RoPE, and experts in all layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import decoder, mixture
from pagoda.arch.fields import Fields
from pagoda.arch.spec import Experts, ModelSpec
from pagoda.weights.source import Tensor

_PARTS = decoder.Parts(qk_norm=True, qk_norm_whole=True)
_ONLY = (("scoring_func", "sigmoid"), ("qk_norm_type", "per_layer"), ("shared_intermediate_size", 0))


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, "config.json")
    for name, usual in _ONLY:
        if (found := fields.get(name) or usual) != usual:
            raise fields.error(name, f"is {found!r}; this architecture is supported with {usual!r} only")
    if fields.get("rotary_dim") is not None:
        share = fields.integer("rotary_dim") / fields.integer("head_dim", 128)
        fields = Fields({**config, "partial_rotary_factor": share}, fields.where)
    spec = decoder.from_config("minimax_m2", fields, _PARTS, head_dim=128)
    count, active = fields.integer("num_local_experts"), fields.integer("num_experts_per_tok")
    experts = Experts(count, active, normalized=True, sigmoid=True, choice_bias=True)
    return mixture.with_mixtures(spec, fields.integer("intermediate_size"), experts)


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    spec = decoder.from_gguf("minimax_m2", metadata, tensors, parts=_PARTS, prefix="minimax-m2")
    # the shares of the chosen ones always add up to 1, which no key says
    table = {**metadata, "minimax-m2.expert_weights_norm": True}
    return mixture.grouped_from_gguf(spec, Fields(table, "GGUF metadata", "minimax-m2."), tensors)
