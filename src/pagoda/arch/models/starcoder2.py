"""StarCoder2: layer norms, biases everywhere, and an MLP without a gate; RoPE and grouped queries as Llama has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pagoda.arch import decoder
from pagoda.arch.fields import MOST_LAYERS, Fields
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor

_PARTS = decoder.Parts(gated=False, activation="gelu_tanh", norm="layer")


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, "config.json")
    bias = fields.flag("use_bias", True)
    parts = replace(_PARTS, qkv_bias=bias, out_bias=bias, mlp_bias=bias)
    window = None if config.get("sliding_window") is None else fields.integer("sliding_window")
    windows = [window] * fields.integer("num_hidden_layers", most=MOST_LAYERS)
    return decoder.from_config("starcoder2", fields, parts, windows=windows, norm_eps="norm_epsilon")


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    return decoder.from_gguf("starcoder2", metadata, tensors, parts=_PARTS)
