"""OLMo 2: Llama's layers with norms behind their halves, and norms of q and k over all heads together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pagoda.arch import decoder, rope
from pagoda.arch.fields import Fields
from pagoda.arch.spec import ModelSpec, Rope
from pagoda.weights.source import Tensor

PARTS = decoder.Parts(qk_norm=True, qk_norm_whole=True, norms="behind")
PATTERN = 4


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, "config.json")
    return decoder.from_config("olmo2", fields, parts_of(fields))


def parts_of(fields: Fields) -> decoder.Parts:
    bias = fields.flag("attention_bias", False)
    return replace(PARTS, qkv_bias=bias, out_bias=bias)


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    spec = decoder.from_gguf("olmo2", metadata, tensors, parts=PARTS)
    fields = Fields(metadata, "GGUF metadata", "olmo2.")
    if not fields.get("attention.sliding_window"):
        return spec
    sliding = [(i + 1) % PATTERN != 0 for i in range(len(spec.layers))]  # OLMo 3
    freq = rope.frequencies(spec.rope.dim, fields.number("rope.freq_base", 10000.0))
    return with_local_rope(decoder.with_windows(spec, sliding), sliding, Rope(spec.rope.dim, tuple(freq.tolist())))


def with_local_rope(spec: ModelSpec, sliding: list[bool], turned: Rope) -> ModelSpec:
    """The spec whose layers with a window are turned by a rope of their own, where it differs."""
    if turned == spec.rope:
        return spec
    chosen = zip(spec.layers, sliding, strict=True)
    layers = (replace(layer, attention=replace(layer.attention, local=local)) for layer, local in chosen)
    return replace(spec, layers=tuple(layers), local_rope=turned)
