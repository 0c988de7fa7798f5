"""Jais 2: Nemotron's MLP of squares and layer norms, biases everywhere, and RoPE of whole heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pagoda.arch import decoder
from pagoda.arch.fields import Fields
from pagoda.arch.models import nemotron
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, "config.json")
    bias = fields.flag("attention_bias", True)
    parts = replace(nemotron.PARTS, qkv_bias=bias, out_bias=bias, mlp_bias=fields.flag("mlp_bias", True))
    return decoder.from_config("jais2", fields, parts, norm_eps="layer_norm_eps")


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    return decoder.from_gguf("jais2", metadata, tensors, parts=nemotron.PARTS)
