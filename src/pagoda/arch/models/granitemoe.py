"""Granite 3 with experts (1B-A400M, 3B-A800M): Granite's layers, the MLP of each a mixture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import mixture
from pagoda.arch.fields import Fields
from pagoda.arch.models import granite
from pagoda.arch.spec import Experts, ModelSpec
from pagoda.weights.source import Tensor


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, "config.json")
    spec = granite.of_config("granitemoe", config)
    # the shares are a softmax over the experts that are chosen: the same as their part of one over all
    experts = Experts(fields.integer("num_local_experts"), fields.integer("num_experts_per_tok"), normalized=True)
    return mixture.with_mixtures(spec, fields.integer("intermediate_size"), experts)


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    spec = granite.of_gguf("granitemoe", metadata, tensors)
    table = {**metadata, "granitemoe.expert_weights_norm": True}
    return mixture.grouped_from_gguf(spec, Fields(table, "GGUF metadata", "granitemoe."), tensors)
