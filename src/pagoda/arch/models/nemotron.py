"""Nemotron-4 and Minitron: layer norms stored less 1, partial RoPE, and an MLP of squares without a gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pagoda.arch import decoder
from pagoda.arch.fields import Fields
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor

PARTS = decoder.Parts(gated=False, activation="relu2", norm="layer")
DEFAULT_SHARE = 0.5


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields({"partial_rotary_factor": DEFAULT_SHARE, **config}, "config.json")
    bias = fields.flag("attention_bias", False)
    parts = replace(PARTS, qkv_bias=bias, out_bias=bias, mlp_bias=fields.flag("mlp_bias", False))
    return decoder.from_config("nemotron", fields, parts, norm_eps="norm_eps")


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    return decoder.from_gguf("nemotron", metadata, tensors, parts=PARTS)
