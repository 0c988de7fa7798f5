"""EXAONE 4: norms behind the halves of a layer and on each head of q and k; with windows, other layers have no RoPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import decoder
from pagoda.arch.fields import MOST_LAYERS, Fields
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor

_PARTS = decoder.Parts(qk_norm=True, norms="behind")
DEFAULT_PATTERN = 4


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    return of_config("exaone4", config, _PARTS)


def of_config(model_type: str, config: Mapping[str, Any], parts: decoder.Parts) -> ModelSpec:
    fields = Fields(config, "config.json")
    if fields.get("sliding_window") is None:
        return decoder.from_config(model_type, fields, parts)
    count, window = fields.integer("num_hidden_layers", most=MOST_LAYERS), fields.integer("sliding_window")
    pattern = fields.get("sliding_window_pattern")  # 4, or the same as LLLG
    every = len(pattern) if isinstance(pattern, str) else fields.integer("sliding_window_pattern", DEFAULT_PATTERN)
    sliding = decoder.layer_kinds(fields, [(i + 1) % every != 0 and i < count - 1 for i in range(count)])
    windows = [window if slides else None for slides in sliding]
    spec = decoder.from_config(model_type, fields, parts, windows=windows)
    return decoder.without_rope(spec, [not slides for slides in sliding])


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    return of_gguf("exaone4", "exaone4", metadata, tensors, _PARTS)


def of_gguf(
    model_type: str,
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    parts: decoder.Parts,
) -> ModelSpec:
    spec = decoder.from_gguf(model_type, metadata, tensors, parts=parts, prefix=architecture)
    if not metadata.get(f"{architecture}.attention.sliding_window"):
        return spec
    sliding = [(i + 1) % DEFAULT_PATTERN != 0 for i in range(len(spec.layers))]
    return decoder.without_rope(decoder.with_windows(spec, sliding), [not slides for slides in sliding])
