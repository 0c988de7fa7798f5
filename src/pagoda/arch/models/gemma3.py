"""Gemma 3: Gemma 2 with norms of q and k in place of the cap of scores; layers with a window have a rope of their own.

The larger ones see, with SigLIP (arXiv 2303.15343): a picture becomes 256 tokens, which see each other.
EmbeddingGemma is an encoder of these layers: all tokens see each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from pagoda.arch import decoder, rope, visual, visual_gguf
from pagoda.arch.fields import MOST_LAYERS, Fields
from pagoda.arch.models import gemma, gemma2
from pagoda.arch.spec import Encoder, ModelSpec, Rope
from pagoda.arch.vision_spec import Vision
from pagoda.errors import ModelError
from pagoda.weights.source import Tensor

PATTERN = 6
_LAYERS_27B = 62
_TOGETHER = 4
"""Patches of each direction that become one token, where a file does not say."""
_PARTS = replace(gemma.GELU, norms="both", qk_norm=True)
_BASE, _LOCAL_BASE = 1e6, 1e4
_OF_BOTH = ("eos_token_id", "bos_token_id", "dtype", "torch_dtype", "tie_word_embeddings")
_LOGITS = "final_logit_softcapping"
_EMBEDDING = "gemma-embedding"
_ENCODER = Encoder(embed_norm=False, final_norm=True)
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
    outer, text = config, config.get("text_config")
    if isinstance(text, Mapping):
        config = {**text, **{name: config[name] for name in _OF_BOTH if config.get(name) is not None}}
    everywhere, local = _recipes(config)
    both_ways = bool(config.get("use_bidirectional_attention"))
    own = {"rope_parameters": everywhere, "rope_scaling": None, "use_bidirectional_attention": None}
    fields = gemma.settings({**_DEFAULTS, **config, **own})
    windows = gemma2.windows_of(fields, fields.integer("sliding_window_pattern", PATTERN))
    if both_ways:
        windows = [None if window is None else _half(window) for window in windows]
    spec = decoder.from_config("gemma3", fields, gemma.parts(fields, _PARTS), head_dim=256, windows=windows)
    scale = fields.number("query_pre_attn_scalar", 256) ** -0.5
    spec = gemma2.capped(gemma.scaled(spec, gemma.embedded_as(config)), scale, None, gemma2.cap(fields, _LOGITS))
    near = Fields({"rope_parameters": local}, "config.json")
    turned = rope.from_config(near, spec.layers[0].attention.head_dim, spec.max_position)[0]
    spec = _with_local_rope(spec, turned, [window is not None for window in windows])
    if both_ways:
        return replace(spec, encoder=_ENCODER)
    return visual.with_encoder(spec, encoder(outer), spec.hidden_size) if visual.sees(outer) else spec


def _half(window: int) -> int:
    """Of a window that is said as a whole, half before a token and half behind: what it sees to each side."""
    return window // 2 + 1


def encoder(config: Mapping[str, Any]) -> Vision:
    fields, table = visual.encoder_fields(config), Fields(config, "config.json")
    visual.check_activation(fields, "gelu_pytorch_tanh")
    patch = fields.integer("patch_size", 16)
    side = fields.integer("image_size", 224) // patch
    tokens = math.isqrt(table.integer("mm_tokens_per_image", 256))
    if tokens > side:
        raise table.error("mm_tokens_per_image", f"is {tokens**2}; a picture has {side**2} patches only")
    return Vision(
        **siglip(side, side // tokens),
        patch_size=patch,
        hidden_size=fields.integer("hidden_size", 768),
        heads=fields.integer("num_attention_heads", 12),
        depth=fields.integer("num_hidden_layers", 12, most=MOST_LAYERS),
        intermediate_size=fields.integer("intermediate_size", 3072),
        norm_eps=fields.number("layer_norm_eps", 1e-6),
        image_token_id=table.integer(_either(config, "image_token_id", "image_token_index"), 262144, least=0),
        ends=(
            table.integer(_either(config, "boi_token_id", "boi_token_index"), 255999, least=0),
            table.integer(_either(config, "eoi_token_id", "eoi_token_index"), 256000, least=0),
        ),
    )


def siglip(side: int, merge_size: int) -> dict[str, Any]:
    """What all encoders of Gemma 3 are alike in; pictures have `side` patches in each direction."""
    return {
        "temporal_patch_size": 1,
        "merge_size": merge_size,
        "activation": "gelu_tanh",
        "gated": False,
        "norm": "layer",
        "video_token_id": None,
        "patch_bias": True,
        "grid_side": side,
        "side": side,
        "names": "siglip",
        "rope": None,
        "merge": "averaged",
        "merge_bias": False,
        "in_line": True,
        "both_ways": True,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
    }


def _either(config: Mapping[str, Any], new: str, old: str) -> str:
    """The spelling that a file has."""
    return old if config.get(new) is None else new


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    prefix = metadata["general.architecture"]
    # llama.cpp names it so; Ollama calls it gemma3, with a pooling
    both_ways = prefix == _EMBEDDING or f"{prefix}.pooling_type" in metadata
    if both_ways:
        window = f"{prefix}.attention.sliding_window"
        metadata = {**metadata, window: _half(Fields(metadata, "GGUF metadata").integer(window))}
    fields = Fields(metadata, "GGUF metadata", f"{prefix}.")
    spec = decoder.from_gguf("gemma3", metadata, tensors, parts=_PARTS, prefix=prefix)
    near = gemma2.sliding(len(spec.layers), fields.integer("attention.sliding_window_pattern", PATTERN))
    spec = gemma.scaled(decoder.with_windows(spec, near), tensors[decoder.EMBEDDING].type)
    spec = gemma2.capped(spec, gemma2.gguf_scale(spec, _LAYERS_27B), None, gemma2.cap(fields, _LOGITS))
    if fields.get("attention.sliding_window"):
        freq = rope.frequencies(spec.rope.dim, fields.number("rope.freq_base_swa", _LOCAL_BASE))
        spec = _with_local_rope(spec, Rope(spec.rope.dim, tuple(freq.tolist())), near)
    if both_ways:
        return replace(spec, encoder=_ENCODER)
    return spec if visual_gguf.projector(metadata) is None else _seeing(spec, metadata)


def _seeing(spec: ModelSpec, metadata: Mapping[str, Any]) -> ModelSpec:
    clip = visual_gguf.clip_fields(metadata, "gemma3", spec)
    patch = clip.integer("patch_size")
    side, together = clip.integer("image_size") // patch, clip.integer("projector.scale_factor", _TOGETHER)
    ends = (visual_gguf.token(metadata, "<start_of_image>"), visual_gguf.token(metadata, "<end_of_image>"))
    token = visual_gguf.token(metadata, "<image_soft_token>")
    return visual.with_encoder(
        spec,
        Vision(**{**siglip(side, together), **visual_gguf.shape(clip)}, image_token_id=token, ends=ends),
        spec.hidden_size,
    )


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
