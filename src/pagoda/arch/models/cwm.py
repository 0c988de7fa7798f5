"""Code World Model: Llama's layers, three of four with a sliding window. In GGUF it is called llama."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pagoda.arch import decoder
from pagoda.arch.fields import MOST_LAYERS, Fields
from pagoda.arch.models import llama
from pagoda.arch.spec import ModelSpec

PATTERN, DEFAULT_WINDOW = 4, 8192
_ROPE = MappingProxyType(
    {
        "rope_type": "llama3",
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
)

from_gguf = llama.from_gguf


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    scaled = {} if config.get("rope_parameters") or config.get("rope_scaling") else {"rope_scaling": _ROPE}
    ends = {} if config.get("eos_token_id") is not None else {"eos_token_id": [128001, 128008, 128009]}
    fields = Fields({"rope_theta": 1e6, **config, **scaled, **ends}, "config.json")
    count = fields.integer("num_hidden_layers", most=MOST_LAYERS)
    window = fields.integer("sliding_window", DEFAULT_WINDOW)
    sliding = decoder.layer_kinds(fields, [i % PATTERN != 0 for i in range(count)])
    windows = [window if slides else None for slides in sliding]
    parts = decoder.Parts(mlp_bias=fields.flag("mlp_bias", False))
    return decoder.from_config("cwm", fields, parts, head_dim=128, windows=windows)
