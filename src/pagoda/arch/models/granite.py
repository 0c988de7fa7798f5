"""Granite 3 (dense): Llama's layers with four multipliers: of embeddings, scores, what layers add, and logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pagoda.arch import decoder
from pagoda.arch.fields import Fields
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    return of_config("granite", config)


def of_config(model_type: str, config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, "config.json")
    bias = fields.flag("attention_bias", False)
    parts = decoder.Parts(qkv_bias=bias, out_bias=bias, mlp_bias=fields.flag("mlp_bias", False))
    return _multiplied(
        decoder.from_config(model_type, fields, parts),
        embeddings=fields.number("embedding_multiplier", 1.0),
        scores=fields.number("attention_multiplier", 1.0),
        added=fields.number("residual_multiplier", 1.0),
        logits=1 / fields.number("logits_scaling", 1.0),
    )


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    return of_gguf("granite", metadata, tensors)


def of_gguf(
    model_type: str, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor], *, prefix: str = ""
) -> ModelSpec:
    # as for Llama, converters reorder the rows of q and k
    spec = decoder.from_gguf(model_type, metadata, tensors, interleaved=True, prefix=prefix)
    fields = Fields(metadata, "GGUF metadata", f"{prefix or model_type}.")
    return _multiplied(
        spec,
        embeddings=fields.number("embedding_scale", 1.0),
        scores=fields.number("attention.scale", spec.layers[0].attention.scale),
        added=fields.number("residual_scale", 1.0),
        logits=1 / fields.number("logit_scale", 1.0),
    )


def _multiplied(spec: ModelSpec, *, embeddings: float, scores: float, added: float, logits: float) -> ModelSpec:
    """x + added * y is added * (x / added + y), and a norm does not see a factor but in its eps: so x is kept divided
    by `added` from the embedding on, and nothing has to multiply what the layers add.
    """
    layers = (replace(layer, attention=replace(layer.attention, scale=scores)) for layer in spec.layers)
    return replace(
        spec,
        layers=tuple(layers),
        norm_eps=spec.norm_eps / added**2,
        embed_scale=embeddings / added,
        logit_scale=logits,
    )
