"""GLM-4.5 and 4.6: Llama's layers with partial RoPE, and behind the first few DeepSeek-V3's kind of experts."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pagoda.arch import decoder, mixture
from pagoda.arch.fields import Fields
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor

_USUAL = MappingProxyType({"partial_rotary_factor": 0.5, "norm_topk_prob": True, "first_k_dense_replace": 1})


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields({**_USUAL, **config}, "config.json")
    parts = decoder.Parts(qkv_bias=fields.flag("attention_bias", False), qk_norm=fields.flag("use_qk_norm", False))
    return mixture.grouped_from_config(decoder.from_config("glm4_moe", fields, parts), fields, sigmoid=True)


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    fields = Fields(metadata, "GGUF metadata", "glm4moe.")
    # the last blocks predict several tokens at once
    count = fields.integer("block_count") - fields.integer("nextn_predict_layers", 0, least=0)
    qk_norm = "blk.0.attn_q_norm.weight" in tensors
    table = {**metadata, "glm4moe.block_count": count}
    spec = decoder.from_gguf("glm4_moe", table, tensors, qk_norm=qk_norm, prefix="glm4moe")
    return mixture.grouped_from_gguf(spec, fields, tensors)
