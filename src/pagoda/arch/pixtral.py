"""Pixtral's encoder (arXiv 2410.07073), of Mistral's models: pictures of any shape, whose rows end with a token."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pagoda.arch import visual, visual_gguf
from pagoda.arch.fields import MOST_LAYERS, Fields
from pagoda.arch.spec import ModelSpec
from pagoda.arch.vision_spec import ROPE_BASE, Vision
from pagoda.weights.source import Tensor

_PIXTRAL: Mapping[str, Any] = MappingProxyType(
    {
        "temporal_patch_size": 1,
        "gated": True,
        "norm": "rms",
        "video_token_id": None,
        "names": "pixtral",
        "rope": "alternating",
        "first_norm": True,
        "biased": False,
        "merge": "reduced",
        "in_line": True,
    }
)
_NORM_EPS = 1e-5
_BREAK, _END = 12, 13
"""Tokens behind the rows of a picture, which no config.json says."""


def encoder(config: Mapping[str, Any], eps: float) -> Vision:
    fields, table = visual.encoder_fields(config), Fields(config, "config.json")
    activation = fields.get("hidden_act") or "gelu"
    if activation not in ("gelu", "silu"):
        raise fields.error("hidden_act", f"is {activation!r}; this encoder is supported with gelu or silu")
    if table.get("projector_hidden_act") not in (None, "gelu") or table.get("vision_feature_layer") not in (None, -1):
        raise table.error("vision_feature_layer", "must be -1, and projector_hidden_act gelu: others are not supported")
    recipe = fields.get("rope_parameters") or fields.values
    if Fields(recipe, fields.where).number("rope_theta", ROPE_BASE) != ROPE_BASE:
        raise fields.error("rope_theta", f"must be {ROPE_BASE:g}")
    return Vision(
        **_PIXTRAL,
        patch_size=fields.integer("patch_size", 16),
        merge_size=table.integer("spatial_merge_size", 2),
        hidden_size=fields.integer("hidden_size", 1024),
        heads=fields.integer("num_attention_heads", 16),
        depth=fields.integer("num_hidden_layers", 24, most=MOST_LAYERS),
        intermediate_size=fields.integer("intermediate_size", 4096),
        activation="gelu" if activation == "gelu" else "silu",
        norm_eps=_NORM_EPS,
        image_token_id=table.integer("image_token_index", table.integer("image_token_id", 10, least=0), least=0),
        row_tokens=(_BREAK, _END),
        longest_edge=fields.integer("image_size", 1024),
        merge_bias=table.flag("multimodal_projector_bias", False),
        merge_eps=eps,
    )


def seeing(spec: ModelSpec, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    """The language model with the encoder of its mmproj file, if there is one."""
    if visual_gguf.projector(metadata) in (None, *visual_gguf.ANY):
        return spec
    clip = visual_gguf.clip_fields(metadata, "pixtral", spec)
    rows = (visual_gguf.token(metadata, "[IMG_BREAK]"), visual_gguf.token(metadata, "[IMG_END]"))
    vision = Vision(
        **{**_PIXTRAL, **visual_gguf.shape(clip)},
        merge_size=clip.integer("spatial_merge_size", 1),
        activation="silu" if metadata.get("clip.use_silu") else "gelu",
        image_token_id=visual_gguf.token(metadata, "[IMG]"),
        row_tokens=rows,
        longest_edge=clip.integer("image_size"),
        merge_bias="mm.1.bias" in tensors,
        merge_eps=spec.norm_eps,
    )
    return visual.with_encoder(spec, vision, spec.hidden_size)
