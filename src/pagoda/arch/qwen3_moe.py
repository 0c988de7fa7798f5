"""Qwen3 with experts: Qwen3's layers, the MLP of most of them a mixture of small ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pagoda.arch import decoder, qwen3
from pagoda.arch.fields import Fields
from pagoda.arch.spec import Experts, Layer, Mlp, ModelSpec
from pagoda.errors import ModelError
from pagoda.weights.source import Tensor


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, "config.json")
    spec = replace(qwen3.from_config(config), model_type="qwen3_moe")
    # newer transformers write it under the second name
    name = "num_local_experts" if fields.get("num_experts") is None else "num_experts"
    count, every = fields.integer(name, least=0), fields.integer("decoder_sparse_step", 1)
    dense = fields.get("mlp_only_layers") or []
    if count == 0:
        return spec
    experts = Experts(count, fields.integer("num_experts_per_tok"), fields.flag("norm_topk_prob", False))
    mlp = _mlp(experts, fields.integer("moe_intermediate_size"))
    sparse = [(i + 1) % every == 0 and i not in dense for i in range(len(spec.layers))]
    return replace(spec, layers=_layers(spec, [mlp if has else None for has in sparse]))


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    fields = Fields(metadata, "GGUF metadata", "qwen3moe.")
    size = fields.integer("expert_feed_forward_length")
    table = {"qwen3moe.feed_forward_length": size, **metadata}
    spec = replace(decoder.from_gguf("qwen3moe", table, tensors, qk_norm=True), model_type="qwen3_moe")
    experts = Experts(fields.integer("expert_count"), fields.integer("expert_used_count"), True)
    mlp = _mlp(experts, size)
    return replace(spec, layers=_layers(spec, [mlp for _ in spec.layers]))


def _mlp(experts: Experts, size: int) -> Mlp:
    if experts.active > experts.count:
        raise ModelError(f"a token cannot go through {experts.active} of {experts.count} experts")
    return Mlp(size, experts=experts)


def _layers(spec: ModelSpec, mlps: list[Mlp | None]) -> tuple[Layer, ...]:
    return tuple(replace(layer, mlp=mlp or layer.mlp) for layer, mlp in zip(spec.layers, mlps, strict=True))
