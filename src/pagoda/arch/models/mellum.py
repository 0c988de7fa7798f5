"""Mellum 2: Qwen3's layers with experts, some of them with a sliding window, whose rope is another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import decoder, mixture, rope
from pagoda.arch.fields import MOST_LAYERS, Fields
from pagoda.arch.models import olmo2
from pagoda.arch.spec import ModelSpec
from pagoda.errors import ModelError
from pagoda.weights.source import Tensor

DEFAULT_HEAD_DIM = 128


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    both = config.get("rope_parameters")
    if not isinstance(both, Mapping) or not {"full_attention", "sliding_attention"} <= both.keys():
        raise Fields(config, "config.json").error("rope_parameters", f"is {both!r}, must be of both kinds of layers")
    fields = Fields({**config, "rope_parameters": both["full_attention"]}, "config.json")
    count = fields.integer("num_hidden_layers", most=MOST_LAYERS)
    if set(fields.get("mlp_layer_types") or ()) - {"sparse"}:
        raise fields.error("mlp_layer_types", "has layers without experts, which are not supported here")
    sliding = decoder.layer_kinds(fields, [False] * count)
    windows = [fields.integer("sliding_window") if slides else None for slides in sliding]
    bias = fields.flag("attention_bias", False)
    parts = decoder.Parts(qkv_bias=bias, out_bias=bias, qk_norm=True)
    spec = decoder.from_config("mellum", fields, parts, head_dim=DEFAULT_HEAD_DIM, windows=windows)
    near = Fields({"rope_parameters": both["sliding_attention"]}, fields.where)
    turned, _ = rope.from_config(near, spec.layers[0].attention.head_dim, spec.max_position)
    spec = olmo2.with_local_rope(spec, sliding, turned)
    return mixture.from_config(spec, Fields({"norm_topk_prob": True, **config}, fields.where))


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    raise ModelError("Mellum 2 is not read from GGUF", remedy="Take the model's safetensors version")
