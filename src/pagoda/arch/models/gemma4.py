"""Gemma 4: Gemma 3's layers, with heads, KV heads and rope of their own where a layer sees all tokens.

The last layers may read keys and values of earlier ones; values are normed, and may come from the product of keys; the
small models (E2B, E4B) have values of each token for each layer, the 26B a mixture beside the MLP of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np

from pagoda.arch import decoder, rope
from pagoda.arch.fields import MOST_LAYERS, Fields
from pagoda.arch.models import gemma, gemma2
from pagoda.arch.spec import Experts, Layer, Mlp, ModelSpec, Rope
from pagoda.errors import ModelError
from pagoda.weights.source import Tensor

PATTERN = 6
_PARTS = replace(gemma.GELU, norms="both", qk_norm=True)
_OF_BOTH = ("eos_token_id", "bos_token_id", "dtype", "torch_dtype", "tie_word_embeddings")
_LOGITS = "final_logit_softcapping"
_ALL, _NEAR = "full_attention", "sliding_attention"
_RECIPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        _ALL: {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
        _NEAR: {"rope_type": "default", "rope_theta": 1e4},
    }
)
_DEFAULTS = MappingProxyType(
    {
        "vocab_size": 262144,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 30,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "sliding_window": 512,
        "hidden_size_per_layer_input": 256,
    }
)
"""What a config.json leaves out."""
_DEFAULTS_12B = MappingProxyType({"sliding_window": 1024, "hidden_size_per_layer_input": 0})
"""... of the 12B, whose encoders are one product each (`gemma4_unified`)."""


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    text = config.get("text_config")
    if isinstance(text, Mapping):
        config = {**text, **{name: config[name] for name in _OF_BOTH if config.get(name) is not None}}
    fields = _settings(config)
    size = fields.integer("head_dim", 256)
    windows = gemma2.windows_of(fields, PATTERN)
    windows[-1] = None  # whatever the config says of the last layer
    spec = decoder.from_config("gemma4", fields, gemma.parts(fields, _PARTS), head_dim=size, windows=windows)
    spec = gemma2.capped(gemma.scaled(spec, gemma.embedded_as(config)), 1.0, None, gemma2.cap(fields, _LOGITS))
    kv_heads, head_dim = _wide_heads(fields, windows)
    turned = rope.from_config(_recipe(config, _ALL), head_dim, spec.max_position)[0]
    near, v_is_k = [window is not None for window in windows], fields.flag("attention_k_eq_v", False)
    spec = _with_two_kinds(spec, near, kv_heads, head_dim, turned, v_is_k=v_is_k)
    spec = _sharing(spec, fields.integer("num_kv_shared_layers", 0, least=0))
    spec = replace(spec, layer_embed=fields.integer("hidden_size_per_layer_input", least=0))
    rows = fields.integer("vocab_size_per_layer_input", spec.vocab_size)
    if spec.layer_embed and rows != spec.vocab_size:
        raise fields.error("vocab_size_per_layer_input", f"is {rows}, must be that of all tokens, {spec.vocab_size}")
    spec = _scaled_layers(spec, [True] * len(spec.layers))
    if fields.flag("enable_moe_block", False):
        sizes = (fields.integer(name) for name in ("moe_intermediate_size", "num_experts", "top_k_experts"))
        return _with_experts(spec, *sizes)
    return _double(spec) if fields.flag("use_double_wide_mlp", False) else spec


def _settings(config: Mapping[str, Any]) -> Fields:
    both_ways = config.get("use_bidirectional_attention")
    if both_ways not in (None, False, "vision"):
        raise ModelError(f"config.json: use_bidirectional_attention is {both_ways!r}, which is not supported")
    unified = "unified" in str(config.get("model_type"))
    own = {"rope_parameters": _recipe(config, _NEAR).get("rope_parameters"), "use_bidirectional_attention": None}
    return gemma.settings({**_DEFAULTS, **(_DEFAULTS_12B if unified else {}), **config, **own})


def _recipe(config: Mapping[str, Any], kind: str) -> Fields:
    """The rope parameters of layers of a kind."""
    given = config.get("rope_parameters") or _RECIPES
    found = given.get(kind) if isinstance(given, Mapping) else None
    if not isinstance(found, Mapping):
        raise ModelError(f"config.json: rope_parameters are {given!r}, must have a table for {kind}")
    return Fields({"rope_parameters": dict(found)}, "config.json")


def _wide_heads(fields: Fields, windows: Sequence[int | None]) -> tuple[int, int]:
    """KV heads, and the size of a head, in layers that see all tokens: said once, or for each layer of them."""
    each = fields.get("per_layer_config")
    if not each:
        shared = fields.flag("attention_k_eq_v", False)
        heads = fields.integer("num_key_value_heads")
        heads = fields.integer("num_global_key_value_heads", heads) if shared else heads
        return heads, fields.integer("global_head_dim", 512)
    table = {str(number): found for number, found in each.items()} if isinstance(each, Mapping) else {}
    wide = [table.get(str(i), {}) for i, window in enumerate(windows) if window is None]
    if len(wide) != len(table) or any(found != wide[0] for found in wide):
        raise fields.error("per_layer_config", f"is {each!r}, must be the same for all layers of {_ALL} alone")
    own = Fields({**fields.values, **wide[0]}, fields.where)
    return own.integer("num_key_value_heads"), own.integer("head_dim", 256)


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    fields = Fields(metadata, "GGUF metadata", "gemma4.")
    count = fields.integer("block_count", most=MOST_LAYERS)
    near = _near_of(fields, count)
    heads = [int(n) for n in np.broadcast_to(fields.get("attention.head_count_kv"), count)]
    sizes = [int(n) for n in np.broadcast_to(fields.get("feed_forward_length"), count)]
    wide = near.index(False)
    table = {**metadata, "gemma4.attention.head_count_kv": heads[wide], "gemma4.feed_forward_length": sizes[0]}
    spec = decoder.from_gguf("gemma4", table, tensors, parts=_PARTS)
    spec = gemma.scaled(decoder.with_windows(spec, near), tensors[decoder.EMBEDDING].type)
    spec = gemma2.capped(spec, 1.0, None, gemma2.cap(fields, _LOGITS))
    head_dim, turned = spec.layers[0].attention.head_dim, spec.rope
    size = fields.integer("attention.key_length_swa", head_dim)
    freq = rope.frequencies(fields.integer("rope.dimension_count_swa", size), fields.number("rope.freq_base_swa", 1e4))
    narrow = heads[near.index(True)] if True in near else heads[wide]
    layers = (
        replace(layer, attention=replace(layer.attention, kv_heads=narrow, head_dim=size), mlp=Mlp(each, "gelu_tanh"))
        for layer, each in zip(spec.layers, sizes, strict=True)
    )
    spec = replace(spec, layers=tuple(layers), rope=Rope(2 * len(freq), tuple(freq.tolist())))
    v_is_k = f"blk.{wide}.attn_v.weight" not in tensors
    spec = _with_two_kinds(spec, near, heads[wide], head_dim, turned, v_is_k=v_is_k)
    spec = _sharing(spec, fields.integer("attention.shared_kv_layers", 0, least=0))
    spec = replace(spec, layer_embed=fields.integer("embedding_length_per_layer_input", 0, least=0))
    spec = _scaled_layers(spec, [f"blk.{i}.layer_output_scale.weight" in tensors for i in range(count)])
    if not fields.get("expert_count"):
        return spec
    names = ("expert_feed_forward_length", "expert_count", "expert_used_count")
    return _with_experts(spec, *(fields.integer(name) for name in names))


def _near_of(fields: Fields, count: int) -> list[bool]:
    """Which layers have a window: said for each."""
    said = fields.get("attention.sliding_window_pattern")
    if np.ndim(said) != 1 or len(said) != count or all(said):
        raise fields.error(
            "attention.sliding_window_pattern", f"is {said!r}, must say of each layer whether it has one"
        )
    return [bool(each) for each in said]


def _with_two_kinds(
    spec: ModelSpec, near: Sequence[bool], kv_heads: int, head_dim: int, turned: Rope, *, v_is_k: bool
) -> ModelSpec:
    """The spec, which is that of layers with a window, with the others as they are."""
    layers = []
    for layer, local in zip(spec.layers, near, strict=True):
        a = replace(layer.attention, local=local, v_norm=True)
        if not local:
            a = replace(a, kv_heads=kv_heads, head_dim=head_dim, window=None, v_is_k=v_is_k)
        if a.heads % a.kv_heads:
            raise ModelError(f"{a.heads} attention heads cannot share {a.kv_heads} KV heads evenly")
        layers.append(replace(layer, attention=a))
    return replace(spec, layers=tuple(layers), rope=turned, local_rope=spec.rope)


def _sharing(spec: ModelSpec, count: int) -> ModelSpec:
    """The last `count` layers read what the last layer of their kind before them has kept."""
    first = len(spec.layers) - count
    kept = {layer.attention.local: i for i, layer in enumerate(spec.layers[: max(0, first)])}
    layers = list(spec.layers)
    for i in range(max(0, first), len(layers)):
        a = layers[i].attention
        if a.local not in kept:
            raise ModelError(f"no layer in front of the last {count} keeps keys and values that layer {i} could read")
        layers[i] = replace(layers[i], attention=replace(a, source=kept[a.local]))
    return replace(spec, layers=tuple(layers))


def _scaled_layers(spec: ModelSpec, scaled: Sequence[bool]) -> ModelSpec:
    layers = (replace(layer, scaled=has) for layer, has in zip(spec.layers, scaled, strict=True))
    return replace(spec, layers=tuple(layers))


def _double(spec: ModelSpec) -> ModelSpec:
    """The spec with MLPs twice as wide in the layers that keep no keys and values."""

    def own(layer: Layer) -> Layer:
        return (
            layer if layer.attention.source is None else replace(layer, mlp=replace(layer.mlp, size=2 * layer.mlp.size))
        )

    return replace(spec, layers=tuple(own(layer) for layer in spec.layers))


def _with_experts(spec: ModelSpec, size: int, count: int, active: int) -> ModelSpec:
    """The spec with experts in all layers, beside whose MLPs they stand."""
    if active > count:
        raise ModelError(f"a token cannot go through {active} of {count} experts")
    shared = spec.layers[0].mlp.size
    experts = Experts(count, active, normalized=True, shared=shared, shared_gate=False, own_norms=True)
    mlp = Mlp(size, "gelu_tanh", experts=experts)
    return replace(spec, layers=tuple(replace(layer, mlp=mlp) for layer in spec.layers))
