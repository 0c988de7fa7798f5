"""Qwen2-VL: Qwen2 with three positions for each token, and an encoder of layer norms and quick gelu."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pagoda.arch import decoder, visual, visual_gguf
from pagoda.arch.spec import ModelSpec
from pagoda.arch.vision_spec import Vision
from pagoda.weights.source import Tensor


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = visual.encoder_fields(config)
    wide = fields.integer("embed_dim", 1280)
    activation = fields.get("hidden_act") or "quick_gelu"
    if activation != "quick_gelu":
        raise fields.error("hidden_act", f"is {activation!r}; this encoder is supported with quick_gelu only")
    vision = Vision(
        **visual.shape(fields),
        **visual.image_tokens(config),
        hidden_size=wide,
        intermediate_size=int(wide * fields.number("mlp_ratio", 4)),
        activation="quick_gelu",
        gated=False,
        norm="layer",
        norm_eps=1e-6,
    )
    spec = visual.language_model("qwen2_vl", config)
    return visual.with_encoder(spec, vision, fields.integer("hidden_size", 3584))


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    """Of Qwen2.5-VL too: only the encoder tells which of the two it is."""
    kind = "qwen2_5_vl" if visual_gguf.projector(metadata) == "qwen2.5vl_merger" else "qwen2_vl"
    spec = replace(decoder.from_gguf("qwen2vl", metadata, tensors), model_type=kind)
    return visual_gguf.seeing(spec, metadata, tensors)
