"""Gemma: Llama's layers with a gated gelu, and embeddings times the root of their width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from pagoda.arch import decoder
from pagoda.arch.fields import Fields
from pagoda.arch.spec import ModelSpec
from pagoda.errors import ModelError
from pagoda.weights.source import Tensor

GELU = decoder.Parts(activation="gelu_tanh")
_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu")  # by tanh, whichever name a config has


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = settings(config)
    return scaled(decoder.from_config("gemma", fields, parts(fields), head_dim=256), embedded_as(config))


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    return scaled(decoder.from_gguf("gemma", metadata, tensors, parts=GELU), tensors[decoder.EMBEDDING].type)


def settings(config: Mapping[str, Any], **defaults: Any) -> Fields:
    """The fields of a config.json with what Gemma's leave out; the activation is checked here."""
    name = next((name for name in ("hidden_activation", "hidden_act") if config.get(name)), "")
    if name and config[name] not in _GELU:
        raise Fields(config, "config.json").error(name, f"is {config[name]!r}; Gemma has {', '.join(_GELU)} only")
    if config.get("use_bidirectional_attention"):
        raise ModelError("config.json: use_bidirectional_attention is true, which is not supported")
    return Fields({"tie_word_embeddings": True, **defaults, **config, "hidden_act": None}, "config.json")


def parts(fields: Fields, usual: decoder.Parts = GELU) -> decoder.Parts:
    bias = fields.flag("attention_bias", False)
    return replace(usual, qkv_bias=bias, out_bias=bias)


def embedded_as(config: Mapping[str, Any]) -> str:
    """The type that embeddings are scaled in, by the name of its storage."""
    return {"bfloat16": "BF16", "float16": "F16"}.get(str(config.get("dtype") or config.get("torch_dtype")), "F32")


def scaled(spec: ModelSpec, embedded: str) -> ModelSpec:
    """The spec with the scale of its embeddings, rounded to the type that they are scaled in."""
    return replace(spec, embed_scale=_rounded(spec.hidden_size**0.5, embedded))


def _rounded(value: float, kind: str) -> float:
    if kind == "F16":
        return float(np.float16(value))
    bits = np.float32(value).view(np.uint32)
    if kind == "BF16":
        bits = np.uint32((int(bits) + 0x7FFF + (int(bits) >> 16 & 1)) & 0xFFFF0000)
    return float(bits.view(np.float32))
