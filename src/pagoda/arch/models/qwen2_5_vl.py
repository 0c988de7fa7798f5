"""Qwen2.5-VL: Qwen2 with three positions for each token, and an encoder of RMS norms, gated MLPs and windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import visual
from pagoda.arch.models.qwen2_vl import from_gguf as from_gguf
from pagoda.arch.spec import ModelSpec
from pagoda.arch.vision_spec import Vision

_FULL_LAYERS = (7, 15, 23, 31)


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = visual.encoder_fields(config)
    activation = fields.get("hidden_act") or "silu"
    if activation != "silu":
        raise fields.error("hidden_act", f"is {activation!r}; this encoder is supported with silu only")
    full = fields.get("fullatt_block_indexes")
    vision = Vision(
        **visual.shape(fields),
        **visual.image_tokens(config),
        hidden_size=fields.integer("hidden_size", 3584),
        intermediate_size=fields.integer("intermediate_size", 3420),
        activation="silu",
        gated=True,
        norm="rms",
        norm_eps=1e-6,
        window_size=fields.integer("window_size", 112),
        full_layers=_FULL_LAYERS if full is None else fields.token_ids("fullatt_block_indexes"),
        tokens_per_second=fields.number("tokens_per_second", 4),
    )
    spec = visual.language_model("qwen2_5_vl", config)
    return visual.with_encoder(spec, vision, fields.integer("out_hidden_size", 3584))
