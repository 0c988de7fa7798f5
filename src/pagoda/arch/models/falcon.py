"""Falcon 7B, 11B, 40B and 180B: layer norms, attention and an MLP without a gate side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pagoda.arch import decoder
from pagoda.arch.fields import Fields
from pagoda.arch.spec import ModelSpec, Norms
from pagoda.errors import ModelError
from pagoda.weights.source import Tensor

_PARTS = decoder.Parts(gated=False, activation="gelu", norm="layer", norms="one")
DEFAULT_CONTEXT = 2048


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, "config.json")
    newer = fields.flag("new_decoder_architecture", False)
    if fields.flag("alibi", False):
        raise fields.error("alibi", "is true, which is not supported: a model with RoPE is")
    if not (newer or fields.flag("parallel_attn", True)):
        raise fields.error("parallel_attn", "is false, which is not supported")
    heads, hidden = fields.integer("num_attention_heads"), fields.integer("hidden_size")
    shared = 1 if fields.flag("multi_query", True) else heads
    own = {
        "num_key_value_heads": fields.integer("num_kv_heads", heads) if newer else shared,
        "intermediate_size": fields.integer("ffn_hidden_size", 4 * hidden),
        "max_position_embeddings": fields.integer("max_position_embeddings", DEFAULT_CONTEXT),
        "tie_word_embeddings": fields.flag("tie_word_embeddings", True),
        "hidden_act": fields.get("activation"),
    }
    two = newer and fields.integer("num_ln_in_parallel_attn", 2) == 2
    bias = fields.flag("bias", False)
    norms: Norms = "beside" if two else "one"
    parts = replace(_PARTS, qkv_bias=bias, out_bias=bias, mlp_bias=bias, norms=norms)
    return decoder.from_config("falcon", Fields({**config, **own}, fields.where), parts, norm_eps="layer_norm_epsilon")


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    if "blk.0.attn_norm_2.weight" in tensors:
        raise ModelError("Falcon with two norms (40B, 180B) is not read from GGUF", remedy="Take the safetensors")
    return decoder.from_gguf("falcon", metadata, tensors, parts=_PARTS)
