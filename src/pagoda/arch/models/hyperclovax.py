"""HyperCLOVA X SEED Think: Granite's layers and multipliers, with norms behind their halves too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pagoda.arch.fields import Fields
from pagoda.arch.models import granite
from pagoda.arch.spec import ModelSpec
from pagoda.errors import ModelError
from pagoda.weights.source import Tensor


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, "config.json")
    if fields.number("residual_multiplier", 1.0) != 1:
        raise fields.error("residual_multiplier", "is not 1, which is not supported for this architecture")
    size = fields.integer("head_dim", fields.integer("hidden_size") // fields.integer("num_attention_heads"))
    own = {
        "attention_multiplier": fields.number("attention_multiplier", size**-0.5),
        "logits_scaling": 1 / fields.number("logits_scaling", 1.0),  # a factor here, and a divisor there
    }
    spec = granite.of_config("hyperclovax", {**config, **own})
    if not fields.flag("use_post_norm", True):
        return spec
    return replace(spec, layers=tuple(replace(layer, norms="both") for layer in spec.layers))


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    raise ModelError("HyperCLOVA X is not read from GGUF", remedy="Take the model's safetensors version")
