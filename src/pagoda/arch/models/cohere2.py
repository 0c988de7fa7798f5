"""Command R7B and Command A: Command-R's layers; three of four have a sliding window, the others no RoPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import decoder
from pagoda.arch.fields import MOST_LAYERS, Fields
from pagoda.arch.models import cohere
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor

DEFAULT_WINDOW, DEFAULT_PATTERN = 4096, 4


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields({"tie_word_embeddings": True, **config}, "config.json")
    count = fields.integer("num_hidden_layers", most=MOST_LAYERS)
    pattern, window = (
        fields.integer("sliding_window_pattern", DEFAULT_PATTERN),
        fields.integer("sliding_window", DEFAULT_WINDOW),
    )
    sliding = decoder.layer_kinds(fields, _sliding(count, pattern))
    spec = cohere.scaled("cohere2", fields, [window if slides else None for slides in sliding])
    return decoder.without_rope(spec, [not slides for slides in sliding])


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    spec = cohere.scaled_gguf("cohere2", "cohere2", metadata, tensors)
    sliding = _sliding(len(spec.layers), DEFAULT_PATTERN)
    return decoder.without_rope(decoder.with_windows(spec, sliding), [not slides for slides in sliding])


def _sliding(count: int, pattern: int) -> list[bool]:
    return [(i + 1) % pattern != 0 for i in range(count)]
