"""MiniCPM (1 and 2, 2B and 4B) and MiniCPM4: Granite's layers; its multipliers follow from the sizes of the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pagoda.arch.fields import MOST_LAYERS, Fields
from pagoda.arch.models import granite
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor

# of MiniCPM-2B, whose old GGUF files do not say them
_SCALE_EMB, _SCALE_DEPTH, _BASE = 12.0, 1.4, 256


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, "config.json")
    if fields.integer("num_experts", 0, least=0):
        raise fields.error("num_experts", "is not 0: MiniCPM with experts is not supported")
    if fields.get("sparse_config"):
        raise fields.error("sparse_config", "asks for sparse attention, which is not supported; without it all is seen")
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    own = {
        "embedding_multiplier": fields.number("scale_emb"),
        "attention_multiplier": fields.integer("head_dim", hidden // heads) ** -0.5,
        "residual_multiplier": _added(fields.number("scale_depth"), fields.integer("num_hidden_layers")),
        "logits_scaling": hidden / fields.integer("dim_model_base"),
    }
    return granite.of_config("minicpm", {"tie_word_embeddings": True, **config, **own})


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    fields = Fields(metadata, "GGUF metadata", "minicpm.")
    usual = {
        "minicpm.embedding_scale": _SCALE_EMB,
        "minicpm.residual_scale": _added(_SCALE_DEPTH, fields.integer("block_count", most=MOST_LAYERS)),
        "minicpm.logit_scale": fields.integer("embedding_length") / _BASE,
    }
    return granite.of_gguf("minicpm", {**usual, **metadata}, tensors)


def _added(depth: float, layers: int) -> float:
    return depth / math.sqrt(layers)
