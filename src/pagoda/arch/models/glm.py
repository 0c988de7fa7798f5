"""GLM-4 (first generation) and GLM-Edge: Llama's layers with partial RoPE of neighbours; gate and up are one tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import decoder
from pagoda.arch.fields import Fields
from pagoda.arch.spec import ModelSpec, Norms
from pagoda.weights.source import Tensor

DEFAULT_HEAD_DIM, DEFAULT_SHARE = 128, 0.5


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    return of_config("glm", config, "before")


def of_config(model_type: str, config: Mapping[str, Any], norms: Norms) -> ModelSpec:
    fields = Fields({"partial_rotary_factor": DEFAULT_SHARE, **config}, "config.json")
    parts = decoder.Parts(qkv_bias=fields.flag("attention_bias", True), interleaved=True, norms=norms)
    return decoder.from_config(model_type, fields, parts, head_dim=DEFAULT_HEAD_DIM)


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    return decoder.from_gguf("glm", metadata, tensors, interleaved=True, prefix="chatglm")
