"""LFM2: short convolutions in most layers, attention with norms of q and k in the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from pagoda.arch import decoder
from pagoda.arch.fields import MOST_LAYERS, Fields
from pagoda.arch.short_conv import ShortConv
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor

_PARTS = decoder.Parts(qk_norm=True)
_KINDS = ("conv", "full_attention")
DEFAULT_KERNEL, DEFAULT_BASE = 3, 1e6


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = settings(config)
    size = fields.integer("block_ff_dim", fields.integer("intermediate_size", 12288))
    if fields.flag("block_auto_adjust_ff_dim", True):
        size = int(fields.number("block_ffn_dim_multiplier", 1.0) * int(2 * size / 3))
        multiple = fields.integer("block_multiple_of", 256)
        size = -(-size // multiple) * multiple
    return of_config("lfm2", Fields({**fields.values, "intermediate_size": size}, fields.where))


def settings(config: Mapping[str, Any]) -> Fields:
    own = {} if config.get("tie_embedding") is None else {"tie_word_embeddings": config["tie_embedding"]}
    return Fields({"rope_theta": DEFAULT_BASE, "tie_word_embeddings": True, **config, **own}, "config.json")


def of_config(model_type: str, fields: Fields) -> ModelSpec:
    if fields.flag("conv_bias", False):
        raise fields.error("conv_bias", "is true, which is not supported")
    spec = decoder.from_config(model_type, fields, _PARTS, norm_eps="norm_eps")
    count = len(spec.layers)
    attends = fields.token_ids("full_attn_idxs") or range(count)
    kinds = fields.words("layer_types", _KINDS, [_KINDS[i in attends] for i in range(count)])
    kernel = fields.integer("conv_L_cache", DEFAULT_KERNEL, least=2, most=16)
    return _with_convolutions(spec, kernel, [kind == _KINDS[0] for kind in kinds])


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    return of_gguf("lfm2", metadata, tensors)


def of_gguf(model_type: str, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    """The layers without KV heads are those with a convolution."""
    prefix = model_type.replace("_", "")
    fields = Fields(metadata, "GGUF metadata", f"{prefix}.")
    count = fields.integer("block_count", most=MOST_LAYERS)
    convolves = [f"blk.{i}.shortconv.conv.weight" in tensors for i in range(count)]
    said = fields.get("attention.head_count_kv")
    heads = np.unique(np.atleast_1d(0 if said is None else said))
    own = {f"{prefix}.attention.head_count_kv": heads[heads > 0].tolist()}
    spec = decoder.from_gguf(model_type, {**metadata, **own}, tensors, parts=_PARTS, prefix=prefix)
    kernel = fields.integer("shortconv.l_cache", DEFAULT_KERNEL, least=2, most=16)
    return _with_convolutions(spec, kernel, convolves)


def _with_convolutions(spec: ModelSpec, kernel: int, convolves: list[bool]) -> ModelSpec:
    own = ShortConv(spec.hidden_size, kernel)
    chosen = zip(spec.layers, convolves, strict=True)
    return replace(spec, layers=tuple(replace(layer, delta=own if has else None) for layer, has in chosen))
