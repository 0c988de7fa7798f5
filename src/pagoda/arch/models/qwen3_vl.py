"""Qwen3-VL: Qwen3 with three positions for each token, and an encoder that feeds the first layers too (DeepStack)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pagoda.arch import decoder, visual, visual_gguf
from pagoda.arch.fields import Fields
from pagoda.arch.spec import ModelSpec
from pagoda.arch.vision_spec import Vision
from pagoda.errors import ModelError
from pagoda.weights.source import Tensor

_HALF = (0.5, 0.5, 0.5)
_DEEP_LAYERS = (8, 16, 24)


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = language_fields(config)
    bias = fields.flag("attention_bias", False)
    parts = decoder.Parts(qkv_bias=bias, out_bias=bias, qk_norm=True)
    spec = decoder.from_config("qwen3_vl", fields, parts, head_dim=128)
    return visual.with_encoder(spec, encoder(config), visual.encoder_fields(config).integer("out_hidden_size", 3584))


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    spec = replace(decoder.from_gguf("qwen3vl", metadata, tensors, qk_norm=True), model_type="qwen3_vl")
    return visual_gguf.seeing(spec, metadata, tensors)


def language_fields(config: Mapping[str, Any]) -> Fields:
    return Fields(visual.language(config, sections=(24, 20, 20), theta=5e5, cyclic=True), "config.json")


def encoder(config: Mapping[str, Any], *, deep_layers: tuple[int, ...] = _DEEP_LAYERS) -> Vision:
    """`deep_layers`: what a file means that does not say."""
    fields, table = visual.encoder_fields(config), Fields(config, "config.json")
    visual.check_activation(fields, "gelu_pytorch_tanh")
    positions = fields.integer("num_position_embeddings", 2304)
    side = int(positions**0.5)
    if side**2 != positions or side < 2:
        raise fields.error("num_position_embeddings", f"is {positions}, must be the square of 2 or more")
    deep = fields.get("deepstack_visual_indexes")
    return Vision(
        **visual.shape(fields, patch_size=16, depth=27),
        **visual.image_tokens(config),
        hidden_size=fields.integer("hidden_size", 1152),
        intermediate_size=fields.integer("intermediate_size", 4304),
        activation="gelu_tanh",
        gated=False,
        norm="layer",
        norm_eps=1e-6,
        patch_bias=True,
        grid_side=side,
        deep_layers=deep_layers if deep is None else _layers(fields, fields.token_ids("deepstack_visual_indexes")),
        frame_tokens=(
            table.integer("vision_start_token_id", 151652, least=0),
            table.integer("vision_end_token_id", 151653, least=0),
        ),
        mean=_HALF,
        std=_HALF,
    )


def _layers(fields: Fields, chosen: tuple[int, ...]) -> tuple[int, ...]:
    if list(chosen) != sorted(set(chosen)) or any(layer >= fields.integer("depth", 27) for layer in chosen):
        raise ModelError(f"{fields.where}: deepstack_visual_indexes {list(chosen)} are no layers in their order")
    return chosen
