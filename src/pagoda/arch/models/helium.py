"""Helium 1: Llama's layers, whose pairs for RoPE are neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import decoder
from pagoda.arch.fields import Fields
from pagoda.arch.spec import ModelSpec
from pagoda.errors import ModelError
from pagoda.weights.source import Tensor

DEFAULT_HEAD_DIM = 128


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields({"rope_theta": 1e5, "rms_norm_eps": 1e-8, **config}, "config.json")
    parts = decoder.Parts(
        qkv_bias=fields.flag("attention_bias", False), mlp_bias=fields.flag("mlp_bias", False), interleaved=True
    )
    return decoder.from_config("helium", fields, parts, head_dim=DEFAULT_HEAD_DIM)


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    raise ModelError("Helium is not read from GGUF", remedy="Take the model's safetensors version")
