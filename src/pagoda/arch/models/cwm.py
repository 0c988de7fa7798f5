"""Code World Model: Llama's layers, three of four with a sliding window. In GGUF it is called llama."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import decoder
from pagoda.arch.fields import MOST_LAYERS, Fields
from pagoda.arch.models import llama
from pagoda.arch.spec import ModelSpec

PATTERN, DEFAULT_WINDOW = 4, 8192

from_gguf = llama.from_gguf


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, "config.json")
    count, window = (
        fields.integer("num_hidden_layers", most=MOST_LAYERS),
        fields.integer("sliding_window", DEFAULT_WINDOW),
    )
    sliding = decoder.layer_kinds(fields, [i % PATTERN != 0 for i in range(count)])
    windows = [window if slides else None for slides in sliding]
    parts = decoder.Parts(mlp_bias=fields.flag("mlp_bias", False))
    return decoder.from_config("cwm", fields, parts, head_dim=128, windows=windows)
