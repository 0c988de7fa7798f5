"""MiniCPM3 4B: latent attention, dense MLPs, and the multipliers of MiniCPM."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pagoda.arch import mla
from pagoda.arch.fields import Fields
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor

# what no GGUF file says
_SCALE_EMB, _SCALE_DEPTH, _BASE = 12.0, 1.4, 256


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, "config.json")
    hidden = fields.integer("hidden_size")
    own = {"v_head_dim": fields.integer("v_head_dim", hidden // fields.integer("num_attention_heads"))}
    table = Fields({"tie_word_embeddings": True, "rms_norm_eps": 1e-5, **config, **own}, fields.where)
    return _scaled(
        mla.from_config("minicpm3", table, interleaved=False),
        fields.number("scale_emb", _SCALE_EMB),
        fields.number("scale_depth", _SCALE_DEPTH),
        fields.integer("dim_model_base", _BASE),
    )


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    fields = Fields(metadata, "GGUF metadata", "minicpm3.")
    size = fields.integer("embedding_length") // fields.integer("attention.head_count")
    table = {"minicpm3.attention.value_length": size, **metadata}
    spec = mla.from_gguf("minicpm3", "minicpm3", table, tensors, interleaved=False)
    return _scaled(spec, _SCALE_EMB, _SCALE_DEPTH, _BASE)


def _scaled(spec: ModelSpec, embeddings: float, depth: float, base: int) -> ModelSpec:
    """As Granite's multipliers: x is kept divided by that of what the layers add."""
    added = depth / math.sqrt(len(spec.layers))
    return replace(
        spec,
        norm_eps=spec.norm_eps / added**2,
        embed_scale=embeddings / added,
        logit_scale=base / spec.hidden_size,
    )
