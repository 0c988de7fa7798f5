"""ModernBERT (arXiv 2412.13663), gte-modernbert: norms in front, gated gelu, and windows in most of the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pagoda.arch import encoder, rope
from pagoda.arch.decoder import layer_kinds
from pagoda.arch.fields import Fields
from pagoda.arch.spec import Encoder, Layer, Mlp, ModelSpec, Rope
from pagoda.errors import ModelError
from pagoda.weights.source import Tensor

_BASE, _LOCAL_BASE = 160000.0, 10000.0
_PATTERN = 3
"""The first layer of so many sees all tokens, those behind it a window."""
_WINDOW = 128


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, "config.json")
    bias = fields.flag("attention_bias", False)
    act = encoder.activation(fields, "gelu", "hidden_activation")
    mlp = Mlp(fields.integer("intermediate_size"), act, bias=fields.flag("mlp_bias", False))
    layer = Layer(encoder.attention(fields, turned=True, bias=bias), mlp)
    spec = encoder.assembled("modernbert", fields, layer, _ENCODER, fields.number("norm_eps", 1e-5))
    pattern = fields.integer("global_attn_every_n_layers", _PATTERN)
    near = layer_kinds(fields, [i % pattern > 0 for i in range(len(spec.layers))])
    spec = replace(spec, norm_bias=fields.flag("norm_bias", False))
    return _with_windows(spec, near, fields.integer("local_attention", _WINDOW), *_ropes(fields, spec))


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    fields = encoder.gguf_fields(metadata, tensors)
    kind = encoder.activation(fields, "gelu", "hidden_activation")
    mlp = Mlp(fields.integer("feed_forward_length"), kind, bias="blk.0.ffn_up.bias" in tensors)
    layer = Layer(encoder.gguf_attention(fields, tensors, turned=True), mlp)
    spec = encoder.gguf_assembled("modernbert", fields, tensors, layer)
    spec = replace(spec, encoder=_ENCODER, norm_bias="output_norm.bias" in tensors)
    pattern = fields.integer("attention.sliding_window_pattern", _PATTERN)
    near = [i % pattern > 0 for i in range(len(spec.layers))]
    size = layer.attention.head_dim
    far = rope.from_gguf(fields, tensors, size, spec.max_position, False)[0]
    freq = rope.frequencies(far.dim, fields.number("rope.freq_base_swa", _LOCAL_BASE))
    window = fields.integer("attention.sliding_window", _WINDOW)
    return _with_windows(spec, near, window, far, Rope(far.dim, tuple(freq.tolist())))


_ENCODER = Encoder(final_norm=True)


def _ropes(fields: Fields, spec: ModelSpec) -> tuple[Rope, Rope]:
    """Of the layers that see all tokens, and of those with a window."""
    both = fields.get("rope_parameters") or {}
    bases = {
        "full_attention": fields.number("global_rope_theta", _BASE),
        "sliding_attention": fields.number("local_rope_theta", _LOCAL_BASE),
    }
    if fields.get("rope_scaling"):
        raise fields.error("rope_scaling", "is not supported here")
    found = []
    for kind, base in bases.items():
        recipe = both.get(kind) or {}
        if not isinstance(recipe, Mapping):
            raise ModelError(f"config.json: rope parameters of {kind} are {recipe!r}, must be a table")
        own = Fields({"rope_theta": base, "rope_parameters": recipe}, "config.json")
        found.append(rope.from_config(own, spec.layers[0].attention.head_dim, spec.max_position)[0])
    return found[0], found[1]


def _with_windows(spec: ModelSpec, near: Sequence[bool], window: int, far: Rope, local: Rope) -> ModelSpec:
    """`window` is the whole of it: half before a token and half behind. The first layer has no norm in front."""
    layers = []
    for i, layer in enumerate(spec.layers):
        seen = window // 2 + 1 if near[i] else None
        attention = replace(layer.attention, window=seen, local=near[i])
        layers.append(replace(layer, attention=attention, norms="before" if i else "second"))
    return replace(spec, layers=tuple(layers), rope=far, local_rope=local)
