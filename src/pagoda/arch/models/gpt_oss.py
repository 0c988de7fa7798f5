"""gpt-oss: sinks in the attention, every second layer with a window, and experts of a clamped gate with biases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pagoda.arch import decoder, mixture, rope
from pagoda.arch.fields import MOST_LAYERS, Fields
from pagoda.arch.spec import Experts, Mlp, ModelSpec
from pagoda.weights.source import Tensor

_KINDS = ("sliding_attention", "full_attention")
_FIXED = (("swiglu_alpha", 1.702), ("swiglu_limit", 7.0))


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, "config.json")
    for name, usual in _FIXED:
        if (found := fields.number(name, usual)) != usual:
            raise fields.error(name, f"is {found}; gpt-oss is supported with {usual} only")
    has_bias = fields.flag("attention_bias", True)
    parts = decoder.Parts(qkv_bias=has_bias, out_bias=has_bias)
    spec = decoder.from_config("gpt_oss", fields, parts, head_dim=64, windows=_windows(fields))
    # the shares are a softmax over the experts that are chosen: the same as their part of one over all
    experts = Experts(fields.integer("num_local_experts"), fields.integer("num_experts_per_tok"), normalized=True)
    return _with_gpt_oss_layers(mixture.with_mixtures(spec, fields.integer("intermediate_size"), experts))


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    spec = mixture.from_gguf("gpt-oss", metadata, tensors, normalized=True)
    fields, size = Fields(metadata, "GGUF metadata", "gpt-oss."), spec.layers[0].attention.head_dim
    # the file does not say that the ramp of its YaRN begins and ends between two pairs
    turns, _ = rope.from_gguf(fields, tensors, size, spec.max_position, interleaved=False, truncate=False)
    layers = (
        layer if i % 2 == 0 else replace(layer, attention=replace(layer.attention, window=None))
        for i, layer in enumerate(spec.layers)
    )
    return _with_gpt_oss_layers(replace(spec, model_type="gpt_oss", rope=turns, layers=tuple(layers)))


def _windows(fields: Fields) -> list[int | None]:
    count = fields.integer("num_hidden_layers", most=MOST_LAYERS)
    kinds = fields.words("layer_types", _KINDS, [_KINDS[i % 2] for i in range(count)])
    window = fields.integer("sliding_window", 128)
    return [window if kind == _KINDS[0] else None for kind in kinds]


def _with_gpt_oss_layers(spec: ModelSpec) -> ModelSpec:
    return replace(
        spec,
        layers=tuple(
            replace(
                layer,
                attention=replace(layer.attention, sinks=True),
                mlp=Mlp(layer.mlp.size, "clamped_swiglu", bias=True, experts=layer.mlp.experts),
            )
            for layer in spec.layers
        ),
    )
