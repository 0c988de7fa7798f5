"""Encoders in GGUF that go with several language models: InternVL's, GLM's, that of Idefics 3 and SmolVLM."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from pagoda.arch import visual, visual_gguf
from pagoda.arch.fields import Fields
from pagoda.arch.models.glm4v import GLM
from pagoda.arch.models.idefics3 import IDEFICS, TILES_OF_AN_EDGE
from pagoda.arch.models.internvl import INTERNVL
from pagoda.arch.spec import ModelSpec
from pagoda.arch.vision_spec import Vision
from pagoda.errors import ModelError
from pagoda.weights.source import Tensor

Tensors = Mapping[str, Tensor]


def seeing(spec: ModelSpec, metadata: Mapping[str, Any], tensors: Tensors) -> ModelSpec:
    """The language model with the encoder of its mmproj file, unless it knows that one itself, or there is none."""
    kind = visual_gguf.projector(metadata)
    if kind is None or spec.vision is not None:
        return spec
    if kind not in visual_gguf.ANY:
        raise ModelError(f"the mmproj file, with a {kind}, is of another model", remedy="Take it away")
    clip = visual_gguf.clip_fields(metadata, kind, spec)
    if kind == "glm4v":
        return _glm(spec, metadata, tensors, clip)
    side = clip.integer("image_size") // clip.integer("patch_size")
    sizes = {"grid_side": side, "side": side, "merge_size": clip.integer("projector.scale_factor", 2)}
    return visual.with_encoder(spec, _KINDS[kind](metadata, tensors, clip, sizes), spec.hidden_size)


def _glm(spec: ModelSpec, metadata: Mapping[str, Any], tensors: Tensors, clip: Fields) -> ModelSpec:
    wide, inner, merged = (
        tensors.get(name) for name in (visual_gguf.POSITIONS, "v.blk.0.ffn_up.weight", "mm.up.weight")
    )
    if spec.model_type not in ("glm4", "glm4_moe") or wide is None or inner is None or merged is None:
        raise ModelError("the mmproj file, with a glm4v, is of another model, or not whole", remedy="Take it away")
    newer = "4.6" in str(metadata.get("general.name") or metadata.get("general.basename"))
    about = {**GLM, **visual_gguf.shape(clip), "intermediate_size": inner.shape[0], "merge_width": merged.shape[0]}
    vision = Vision(
        **about,
        temporal_patch_size=2,
        merge_size=clip.integer("spatial_merge_size", 2),
        grid_side=math.isqrt(wide.shape[0]),
        image_token_id=visual_gguf.token(metadata, "<|image|>"),
        video_token_id=visual_gguf.token(metadata, "<|video|>"),
        time_format=visual.LATER_TIMES if newer else visual.TIMES,
    )
    seeing = replace(spec, rope=replace(spec.rope, sections=visual_gguf.sections(spec, metadata)))
    return visual.with_encoder(seeing, vision, spec.hidden_size)


def _internvl(metadata: Mapping[str, Any], tensors: Tensors, clip: Fields, sizes: Mapping[str, Any]) -> Vision:
    if "v.blk.0.attn_q_norm.weight" in tensors or "v.blk.0.ln1.bias" not in tensors:
        raise ModelError(
            "the mmproj file holds InternVL's encoder of 6 billion parameters, which is not supported",
            remedy="Take it out of the model's folder to serve the model for text alone",
        )
    about = {**INTERNVL, **visual_gguf.shape(clip), **sizes}
    about["video_text"] = ""  # these vocabularies have no token for a video
    about["most_tiles"] = clip.integer("preproc_max_tiles", INTERNVL["most_tiles"])
    return Vision(**about, image_token_id=visual_gguf.token(metadata, "<IMG_CONTEXT>"))


def _idefics(metadata: Mapping[str, Any], _: Tensors, clip: Fields, sizes: Mapping[str, Any]) -> Vision:
    about = {**IDEFICS, **visual_gguf.shape(clip), **sizes}
    about["longest_edge"] = clip.integer("preproc_image_size", TILES_OF_AN_EDGE * clip.integer("image_size"))
    return Vision(**about, image_token_id=visual_gguf.token(metadata, "<image>"))


_KINDS: Mapping[str, Callable[..., Vision]] = MappingProxyType({"internvl": _internvl, "idefics3": _idefics})
