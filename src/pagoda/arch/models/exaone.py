"""EXAONE 3.0, 3.5 and EXAONE Deep: Llama's layers under names of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import decoder
from pagoda.arch.fields import Fields
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    own = {
        "num_hidden_layers": config.get("num_hidden_layers") or config.get("num_layers"),
        "hidden_act": config.get("activation_function"),
        "rms_norm_eps": config.get("layer_norm_epsilon"),
    }
    return decoder.from_config("exaone", Fields({**config, **own}, "config.json"), decoder.Parts())


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    return decoder.from_gguf("exaone", metadata, tensors)
