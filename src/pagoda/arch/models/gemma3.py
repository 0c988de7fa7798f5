"""Gemma 3: Gemma 2 with norms of q and k in place of the cap of scores; layers with a window have a rope of their own.

Of models that see pictures this is the language model, with their tensors left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from pagoda.arch import decoder, rope
from pagoda.arch.fields import Fields
from pagoda.arch.models import gemma, gemma2
from pagoda.arch.spec import ModelSpec, Rope
from pagoda.errors import ModelError
from pagoda.weights.source import Tensor

PATTERN = 6
_LAYERS_27B = 62
_PARTS = replace(gemma.GELU, norms="both", qk_norm=True)
_BASE, _LOCAL_BASE = 1e6, 1e4
_OF_BOTH = ("eos_token_id", "bos_token_id", "dtype", "torch_dtype", "tie_word_embeddings")
_LOGITS = "final_logit_softcapping"
_DEFAULTS = MappingProxyType(
    {
        "vocab_size": 262208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    }
)
"""What the config.json of models that see pictures leaves out."""


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    text = config.get("text_config")
    if isinstance(text, Mapping):
        config = {**text, **{name: config[name] for name in _OF_BOTH if config.get(name) is not None}}
    everywhere, local = _recipes(config)
    fields = gemma.settings({**_DEFAULTS, **config, "rope_parameters": everywhere, "rope_scaling": None})
    windows = gemma2.windows_of(fields, fields.integer("sliding_window_pattern", PATTERN))
    spec = decoder.from_config("gemma3", fields, gemma.parts(fields, _PARTS), head_dim=256, windows=windows)
    scale = fields.number("query_pre_attn_scalar", 256) ** -0.5
    spec = gemma2.capped(gemma.scaled(spec, gemma.embedded_as(config)), scale, None, gemma2.cap(fields, _LOGITS))
    near = Fields({"rope_parameters": local}, "config.json")
    turned = rope.from_config(near, spec.layers[0].attention.head_dim, spec.max_position)[0]
    return _with_local_rope(spec, turned, [window is not None for window in windows])


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    fields = Fields(metadata, "GGUF metadata", "gemma3.")
    spec = decoder.from_gguf("gemma3", metadata, tensors, parts=_PARTS)
    near = gemma2.sliding(len(spec.layers), fields.integer("attention.sliding_window_pattern", PATTERN))
    spec = gemma.scaled(decoder.with_windows(spec, near), tensors[decoder.EMBEDDING].type)
    spec = gemma2.capped(spec, gemma2.gguf_scale(spec, _LAYERS_27B), None, gemma2.cap(fields, _LOGITS))
    if not fields.get("attention.sliding_window"):
        return spec
    freq = rope.frequencies(spec.rope.dim, fields.number("rope.freq_base_swa", _LOCAL_BASE))
    return _with_local_rope(spec, Rope(spec.rope.dim, tuple(freq.tolist())), near)


def _recipes(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rope parameters of layers that see all, and of those with a window, from either spelling."""
    both = config.get("rope_parameters")
    if not isinstance(both, Mapping):
        both = {"full_attention": config.get("rope_scaling")}
    found = [both.get(kind) or {} for kind in ("full_attention", "sliding_attention")]
    if not all(isinstance(each, Mapping) for each in found):
        raise ModelError(f"config.json: rope parameters are {found!r}, must be tables")
    base, near = config.get("rope_theta") or _BASE, config.get("rope_local_base_freq") or _LOCAL_BASE
    return {"rope_theta": base, **found[0]}, {"rope_theta": near, **found[1]}


def _with_local_rope(spec: ModelSpec, turned: Rope, local: list[bool]) -> ModelSpec:
    layers = tuple(
        replace(layer, attention=replace(layer.attention, local=near))
        for layer, near in zip(spec.layers, local, strict=True)
    )
    return replace(spec, layers=layers, local_rope=turned)
