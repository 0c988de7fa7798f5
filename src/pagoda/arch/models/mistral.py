"""Mistral (dense): Llama's layers, with a sliding window in the first generation. In GGUF it is called llama."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import decoder
from pagoda.arch.fields import MOST_LAYERS, Fields
from pagoda.arch.models import llama
from pagoda.arch.spec import ModelSpec

DEFAULT_WINDOW = 4096

from_gguf = llama.from_gguf


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, "config.json")
    # absent and null differ here: absent is the first generation's default
    window = None if config.get("sliding_window", 0) is None else fields.integer("sliding_window", DEFAULT_WINDOW)
    count = fields.integer("num_hidden_layers", most=MOST_LAYERS)
    return decoder.from_config("mistral", fields, decoder.Parts(), windows=[window] * count)
