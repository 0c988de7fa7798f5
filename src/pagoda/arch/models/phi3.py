"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: Llama's layers; q, k and v are stored as one tensor, and so are gate and up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import decoder
from pagoda.arch.fields import MOST_LAYERS, Fields
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, "config.json")
    window = None if config.get("sliding_window") is None else fields.integer("sliding_window")
    windows = [window] * fields.integer("num_hidden_layers", most=MOST_LAYERS)
    return decoder.from_config("phi3", fields, decoder.Parts(), windows=windows)


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    return decoder.from_gguf("phi3", metadata, tensors)
