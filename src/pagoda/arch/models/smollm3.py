"""SmolLM3: Llama's layers, of which every fourth has no RoPE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import decoder
from pagoda.arch.fields import Fields
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor

DEFAULT_INTERVAL = 4


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields({"tie_word_embeddings": True, **config}, "config.json")
    bias = fields.flag("attention_bias", False)
    parts = decoder.Parts(qkv_bias=bias, out_bias=bias, mlp_bias=fields.flag("mlp_bias", False))
    spec = decoder.from_config("smollm3", fields, parts, windows=decoder.sliding_windows(fields))
    turned = fields.get("no_rope_layers")  # despite its name: 1 where a layer has RoPE
    if turned is None:
        return _still(spec, fields.integer("no_rope_layer_interval", DEFAULT_INTERVAL))
    if not isinstance(turned, list) or len(turned) < len(spec.layers) or any(turn not in (0, 1) for turn in turned):
        raise fields.error("no_rope_layers", "must hold 0 or 1 for each layer")
    return decoder.without_rope(spec, [not turn for turn in turned[: len(spec.layers)]])


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    # as for Llama, converters reorder the rows of q and k
    return _still(decoder.from_gguf("smollm3", metadata, tensors, interleaved=True), DEFAULT_INTERVAL)


def _still(spec: ModelSpec, interval: int) -> ModelSpec:
    return decoder.without_rope(spec, [(i + 1) % interval == 0 for i in range(len(spec.layers))])
