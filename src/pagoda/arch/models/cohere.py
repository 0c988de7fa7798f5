"""Command-R: attention and MLP side by side behind one layer norm without bias; the logits are scaled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pagoda.arch import decoder
from pagoda.arch.fields import Fields
from pagoda.arch.spec import ModelSpec
from pagoda.errors import ModelError
from pagoda.weights.source import Tensor

PARTS = decoder.Parts(norms="one", interleaved=True, norm="layer", norm_bias=False)
_NORMED = "norms on q and k of this kind (Command R+) are not supported"


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields({"tie_word_embeddings": True, **config}, "config.json")
    if fields.flag("use_qk_norm", False):
        raise fields.error("use_qk_norm", f"is true: {_NORMED}")
    return scaled("cohere", fields)


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    if "blk.0.attn_q_norm.weight" in tensors:
        raise ModelError(_NORMED, remedy="Take another model")
    return scaled_gguf("cohere", "command-r", metadata, tensors)


def scaled(model_type: str, fields: Fields, windows: list[int | None] | None = None) -> ModelSpec:
    bias = fields.flag("attention_bias", False)
    parts = replace(PARTS, qkv_bias=bias, out_bias=bias)
    spec = decoder.from_config(model_type, fields, parts, windows=windows, norm_eps="layer_norm_eps")
    return replace(spec, logit_scale=fields.number("logit_scale", 0.0625))


def scaled_gguf(model_type: str, prefix: str, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    spec = decoder.from_gguf(model_type, metadata, tensors, parts=PARTS, prefix=prefix)
    return replace(spec, logit_scale=Fields(metadata, "GGUF metadata", f"{prefix}.").number("logit_scale"))
