"""Granite 4 without experts and without state space layers (Granite 4 Micro): Granite 3 under other names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import decoder
from pagoda.arch.fields import Fields
from pagoda.arch.models import granite
from pagoda.arch.spec import ModelSpec
from pagoda.errors import ModelError
from pagoda.weights.source import Tensor


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, "config.json")
    kinds = fields.get("layer_types") or fields.get("layers_block_type") or ["mamba"]
    if not set(kinds) <= {"attention", "full_attention"}:
        raise fields.error("layer_types", "names layers other than attention, which are not supported")
    if fields.integer("num_local_experts", 0, least=0):
        raise fields.error("num_local_experts", "is not 0: Granite's experts are not supported")
    spec = granite.of_config(
        "granitemoehybrid", {**config, "intermediate_size": fields.integer("shared_intermediate_size", 1024)}
    )
    still = fields.get("position_embedding_type") != "rope"
    return decoder.without_rope(spec, [still] * len(spec.layers))


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    raise ModelError("Granite 4 hybrid models are not read from GGUF", remedy="Take the model's safetensors version")
