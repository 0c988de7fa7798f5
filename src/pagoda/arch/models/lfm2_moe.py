"""LFM2 with experts (8B-A1B): behind its first few layers DeepSeek-V3's kind of experts, without a shared one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import mixture
from pagoda.arch.fields import Fields
from pagoda.arch.models import lfm2
from pagoda.arch.spec import Experts, ModelSpec
from pagoda.weights.source import Tensor

DEFAULT_DENSE = 2


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = lfm2.settings(config)
    spec = lfm2.of_config("lfm2_moe", fields)
    first = fields.integer("num_dense_layers", DEFAULT_DENSE, least=0)
    experts = Experts(
        fields.integer("num_experts"),
        fields.integer("num_experts_per_tok"),
        fields.flag("norm_topk_prob", True),
        sigmoid=True,
        scale=fields.number("routed_scaling_factor", 1.0),
        choice_bias=fields.flag("use_expert_bias", True),
    )
    sparse = [i >= first for i in range(len(spec.layers))]
    return mixture.with_mixtures(spec, fields.integer("moe_intermediate_size"), experts, sparse)


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    spec = lfm2.of_gguf("lfm2_moe", metadata, tensors)
    # the shares of the chosen ones always add up to 1, which no key says
    table = {**metadata, "lfm2moe.expert_weights_norm": True}
    return mixture.grouped_from_gguf(spec, Fields(table, "GGUF metadata", "lfm2moe."), tensors)
