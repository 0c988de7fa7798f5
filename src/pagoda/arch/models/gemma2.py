"""Gemma 2: norms before and behind each half of a layer, soft caps, a window in every other layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pagoda.arch import decoder
from pagoda.arch.fields import MOST_LAYERS, Fields
from pagoda.arch.models import gemma
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor

PATTERN = 2
"""The last layer of so many sees all tokens, those before it a window."""
_SCORES, _LOGITS = "attn_logit_softcapping", "final_logit_softcapping"
_LAYERS_27B = 46
_PARTS = replace(gemma.GELU, norms="both")


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = gemma.settings(config, **{"sliding_window": 4096, _SCORES: 50.0, _LOGITS: 30.0})
    windows = windows_of(fields, PATTERN)
    spec = decoder.from_config("gemma2", fields, gemma.parts(fields, _PARTS), head_dim=256, windows=windows)
    scale = fields.number("query_pre_attn_scalar", 256) ** -0.5
    return capped(gemma.scaled(spec, gemma.embedded_as(config)), scale, cap(fields, _SCORES), cap(fields, _LOGITS))


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    fields = Fields({f"gemma2.{_SCORES}": 50.0, f"gemma2.{_LOGITS}": 30.0, **metadata}, "GGUF metadata", "gemma2.")
    spec = decoder.from_gguf("gemma2", metadata, tensors, parts=_PARTS)
    spec = decoder.with_windows(spec, sliding(len(spec.layers), PATTERN))
    spec = gemma.scaled(spec, tensors[decoder.EMBEDDING].type)
    return capped(spec, gguf_scale(spec, _LAYERS_27B), cap(fields, _SCORES), cap(fields, _LOGITS))


def sliding(count: int, pattern: int) -> list[bool]:
    return [(i + 1) % pattern > 0 for i in range(count)]


def windows_of(fields: Fields, pattern: int) -> list[int | None]:
    """The window of each layer, or none, by `layer_types`; without those by the pattern."""
    usual = sliding(fields.integer("num_hidden_layers", most=MOST_LAYERS), pattern)
    return [fields.integer("sliding_window") if has else None for has in decoder.layer_kinds(fields, usual)]


def cap(fields: Fields, name: str) -> float | None:
    return None if fields.get(name) is None else fields.number(name)


def gguf_scale(spec: ModelSpec, largest: int) -> float:
    """Of scores, which GGUF does not say: the largest model, told by its layers, goes by what a head would be wide
    if all were as wide together as the model."""
    a = spec.layers[0].attention
    width = spec.hidden_size // a.heads if len(spec.layers) == largest else a.head_dim
    return 1 / math.sqrt(width)


def capped(spec: ModelSpec, scale: float, scores: float | None, logits: float | None) -> ModelSpec:
    """The spec with the scale of its scores, and the caps of scores and logits."""
    layers = tuple(
        replace(layer, attention=replace(layer.attention, scale=scale, soft_cap=scores)) for layer in spec.layers
    )
    return replace(spec, layers=layers, logit_soft_cap=logits)
