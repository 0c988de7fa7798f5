"""Qwen3.5 (dense): the layers of Qwen3-Next with plain MLPs, and Qwen3-VL's encoder, which feeds the first alone."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pagoda.arch import hybrid, visual, visual_gguf
from pagoda.arch.fields import Fields
from pagoda.arch.models import qwen3_vl
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor

_TOKENS = MappingProxyType(
    {
        "image_token_id": 248056,
        "video_token_id": 248057,
        "vision_start_token_id": 248053,
        "vision_end_token_id": 248054,
    }
)


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    return seeing(hybrid.from_config("qwen3_5", Fields(hybrid.text_fields(config), "config.json")), config)


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    spec = hybrid.from_gguf("qwen3_5", "qwen35", metadata, tensors, tiled=True)
    return visual_gguf.seeing(spec, metadata, tensors)


def seeing(spec: ModelSpec, config: Mapping[str, Any]) -> ModelSpec:
    """The language model with its encoder, or as it is where it has none."""
    if not visual.sees(config):
        return spec
    table = {**_TOKENS, **{name: value for name, value in config.items() if value is not None}}
    vision = qwen3_vl.encoder(table, deep_layers=())
    return visual.with_encoder(spec, vision, visual.encoder_fields(config).integer("out_hidden_size", 3584))
