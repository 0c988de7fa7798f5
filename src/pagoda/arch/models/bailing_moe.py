"""Ling-lite, Ling-plus, Ling-mini 2.0 and what is made like them: Llama's layers, most with experts and a shared one.

Those from 2.0 on have norms of q and k, partial RoPE, and DeepSeek-V3's kind of experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pagoda.arch import decoder, mixture
from pagoda.arch.fields import Fields
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor

_SCORES = ("softmax", "sigmoid")


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    own = {"n_routed_experts": config.get("num_experts"), "n_shared_experts": config.get("num_shared_experts")}
    fields = Fields({**config, **own}, "config.json")
    for name in ("norm_head", "multi_gate", "use_sliding_window"):
        if fields.flag(name, False):
            raise fields.error(name, "is true, which is not supported")
    score = fields.get("score_function") or fields.get("scoring_func") or _SCORES[0]
    if score not in _SCORES:
        raise fields.error("score_function", f"is {score!r}; supported: {', '.join(_SCORES)}")
    bias = fields.flag("use_bias", False)
    parts = decoder.Parts(
        qkv_bias=fields.flag("use_qkv_bias", bias),
        out_bias=bias,
        mlp_bias=bias,
        qk_norm=fields.flag("use_qk_norm", False),
    )
    sigmoid = score == "sigmoid"
    spec = mixture.grouped_from_config(decoder.from_config("bailing_moe", fields, parts), fields, sigmoid=sigmoid)
    if sigmoid and not fields.flag("moe_router_enable_expert_bias", True):
        return mixture.with_experts(spec, lambda e: replace(e, choice_bias=False))
    return spec


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    newer = metadata.get("general.architecture") == "bailingmoe2"
    prefix = "bailingmoe2" if newer else "bailingmoe"
    # of the first ones converters reorder the rows of q and k, as for Llama
    parts = decoder.Parts(qk_norm=newer, interleaved=not newer)
    fields = Fields(metadata, "GGUF metadata", f"{prefix}.")
    # the last blocks predict several tokens at once
    count = fields.integer("block_count") - fields.integer("nextn_predict_layers", 0, least=0)
    table = {**metadata, f"{prefix}.block_count": count}
    # heads as wide as what is turned of them; newer files say their size
    if not newer and (width := fields.get("rope.dimension_count")):
        table = {f"{prefix}.attention.key_length": width, f"{prefix}.attention.value_length": width, **table}
    spec = decoder.from_gguf("bailing_moe", table, tensors, parts=parts, prefix=prefix)
    return mixture.grouped_from_gguf(spec, fields, tensors)
