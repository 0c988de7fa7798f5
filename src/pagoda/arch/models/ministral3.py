"""Ministral 3: Mistral's layers; far positions make the queries larger, as Llama 4 has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import decoder
from pagoda.arch.fields import MOST_LAYERS, Fields
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor

DEFAULT_HEAD_DIM = 128


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, "config.json")
    window = None if config.get("sliding_window") is None else fields.integer("sliding_window")
    windows = [window] * fields.integer("num_hidden_layers", most=MOST_LAYERS)
    return decoder.from_config("ministral3", fields, decoder.Parts(), head_dim=DEFAULT_HEAD_DIM, windows=windows)


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    # as for Llama, converters reorder the rows of q and k
    return decoder.from_gguf("ministral3", metadata, tensors, interleaved=True, prefix="mistral3")
