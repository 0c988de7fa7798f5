"""Phi-1, Phi-1.5 and Phi-2: attention and an MLP without a gate side by side behind one layer norm, partial RoPE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pagoda.arch import decoder
from pagoda.arch.fields import Fields
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor

_PARTS = decoder.Parts(gated=False, activation="gelu_tanh", norm="layer", norms="one")
DEFAULT_SHARE = 0.5


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields({"partial_rotary_factor": DEFAULT_SHARE, **config}, "config.json")
    if fields.flag("qk_layernorm", False):
        raise fields.error("qk_layernorm", "is true, which is not supported")
    parts = replace(_PARTS, qkv_bias=True, out_bias=True, mlp_bias=True)
    return replace(decoder.from_config("phi", fields, parts, norm_eps="layer_norm_eps"), head_bias=True)


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    return decoder.from_gguf("phi", metadata, tensors, parts=_PARTS, prefix="phi2")
