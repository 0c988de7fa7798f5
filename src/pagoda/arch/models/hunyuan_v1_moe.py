"""Hunyuan with experts (A13B): its dense layers, the MLP of all of them a mixture with a shared one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import mixture
from pagoda.arch.fields import Fields
from pagoda.arch.models import hunyuan_v1_dense
from pagoda.arch.spec import Experts, ModelSpec
from pagoda.weights.source import Tensor


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    spec = hunyuan_v1_dense.of_config("hunyuan_v1_moe", config)
    fields = Fields(config, "config.json")
    size = fields.uniform_integer("moe_intermediate_size", spec.layers[0].mlp.size)
    shared = spec.layers[0].mlp.size * fields.uniform_integer("num_shared_expert", 1)
    count, active = fields.uniform_integer("num_experts"), fields.uniform_integer("moe_topk", 1)
    return mixture.with_mixtures(spec, size, Experts(count, active, True, shared, shared_gate=False))


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    fields = Fields(metadata, "GGUF metadata", "hunyuan-moe.")
    # the shares of the chosen ones always add up to 1, which no key says
    table = {**metadata, "hunyuan-moe.expert_weights_norm": True}
    spec = hunyuan_v1_dense.of_gguf("hunyuan_v1_moe", "hunyuan-moe", metadata, tensors)
    return mixture.grouped_from_gguf(spec, Fields(table, fields.where, fields.prefix), tensors)
