"""Granite with sliding windows in most of its layers, and sinks in all; layers may have no RoPE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pagoda.arch import decoder
from pagoda.arch.fields import Fields
from pagoda.arch.models import granite
from pagoda.arch.spec import ModelSpec
from pagoda.errors import ModelError
from pagoda.weights.source import Tensor

DEFAULT_WINDOW, DEFAULT_PATTERN = 128, 4


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields({"tie_word_embeddings": True, "rms_norm_eps": 1e-5, **config}, "config.json")
    bases = fields.get("layer_rope_theta") or []
    turning = {float(base) for base in bases if base}
    if len(turning) > 1:
        raise fields.error("layer_rope_theta", f"has {len(turning)} bases of RoPE; one is supported")
    if turning:
        given = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
        recipe = {**given, "rope_theta": turning.pop()}
        fields = Fields({**fields.values, "rope_parameters": recipe}, fields.where)
    spec = granite.of_config("granite_swa", fields.values)
    count, window = len(spec.layers), fields.integer("sliding_window", DEFAULT_WINDOW)
    if bases and len(bases) != count:
        raise fields.error("layer_rope_theta", f"has {len(bases)} numbers for {count} layers")
    sliding = decoder.layer_kinds(fields, [i % DEFAULT_PATTERN != 0 for i in range(count)])
    layers = tuple(
        replace(
            layer,
            attention=replace(
                layer.attention,
                window=window if slides and window < spec.max_position else None,
                sinks=True,
                rope=base != 0,
            ),
        )
        for layer, slides, base in zip(spec.layers, sliding, bases or [1] * count, strict=True)
    )
    return replace(spec, layers=layers)


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    raise ModelError("Granite with sinks is not read from GGUF", remedy="Take the model's safetensors version")
