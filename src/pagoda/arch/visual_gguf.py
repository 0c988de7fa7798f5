"""A vision model in GGUF: its language model, and the encoder that its mmproj file describes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from pagoda.arch import visual
from pagoda.arch.fields import MOST_LAYERS, Fields
from pagoda.arch.spec import ModelSpec
from pagoda.arch.vision_spec import Vision
from pagoda.errors import ModelError
from pagoda.weights.source import Tensor

_KINDS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "qwen2vl_merger": {"activation": "quick_gelu", "gated": False, "norm": "layer"},
        "qwen2.5vl_merger": {"activation": "silu", "gated": True, "norm": "rms", "tokens_per_second": 2.0},
        "qwen3vl_merger": {"activation": "gelu_tanh", "gated": False, "norm": "layer", "patch_bias": True},
    }
)
ANY = ("internvl", "idefics3", "glm4v")
"""Projectors that go with language models of any architecture, or of several."""
_OTHERS = ("gemma3", "pixtral", *ANY)
"""Projectors that are not Qwen's."""
POSITIONS = "v.position_embd.weight"


def projector(metadata: Mapping[str, Any]) -> str | None:
    """What joins encoder and language model; None without an encoder."""
    kind = metadata.get("clip.projector_type") or metadata.get("clip.vision.projector_type")
    if kind is not None and kind not in (*_KINDS, *_OTHERS):
        raise ModelError(
            f"the mmproj file has the projector {kind!r} (supported: {', '.join((*_KINDS, *_OTHERS))})",
            remedy="Take it out of the model's folder to serve the model for text alone",
        )
    return None if kind is None else str(kind)


def clip_fields(metadata: Mapping[str, Any], wanted: str, spec: ModelSpec) -> Fields:
    """What the mmproj file says, which must be one for this model."""
    kind = projector(metadata)
    clip = Fields(metadata, "GGUF metadata of the mmproj file", "clip.vision.")
    if kind != wanted:
        raise ModelError(f"the mmproj file, with a {kind}, is of another model", remedy="Take it away")
    width = clip.integer("projection_dim", spec.hidden_size)
    if width != spec.hidden_size:
        raise ModelError(
            f"the mmproj file gives vectors of {width}, and the model takes {spec.hidden_size}",
            remedy="Take the mmproj file of this very model",
        )
    return clip


def shape(clip: Fields) -> dict[str, Any]:
    """What all mmproj files say."""
    return {
        "patch_size": clip.integer("patch_size"),
        "hidden_size": clip.integer("embedding_length"),
        "heads": clip.integer("attention.head_count"),
        "depth": clip.integer("block_count", most=MOST_LAYERS),
        "intermediate_size": clip.integer("feed_forward_length"),
        "norm_eps": clip.number("attention.layer_norm_epsilon", 1e-6),
        "mean": _three(clip, "image_mean"),
        "std": _three(clip, "image_std"),
    }


def seeing(spec: ModelSpec, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    """The language model with its encoder; without one it takes text, whose tokens have one position."""
    kind = projector(metadata)
    if kind is None:
        return spec
    if kind in _OTHERS or (kind == "qwen3vl_merger") != spec.model_type.startswith("qwen3"):
        raise ModelError(f"the mmproj file, with a {kind}, is of another model", remedy="Take it away")
    clip = Fields(metadata, "GGUF metadata of the mmproj file", "clip.vision.")
    depth = clip.integer("block_count", most=MOST_LAYERS)
    about = dict(_KINDS[kind])
    if kind == "qwen2.5vl_merger":
        every = clip.integer("n_wa_pattern", 8)
        about["window_size"] = clip.integer("window_size", 112)
        about["full_layers"] = tuple(range(every - 1, depth, every))
    if kind == "qwen3vl_merger":
        if POSITIONS not in tensors:
            raise ModelError(f"the mmproj file lacks the tensor {POSITIONS}", remedy="Fetch it again")
        about["grid_side"] = int(tensors[POSITIONS].shape[0] ** 0.5)
        flags = clip.get("is_deepstack_layers")
        about["deep_layers"] = tuple(i for i, deep in enumerate([] if flags is None else flags) if deep)
        about["frame_tokens"] = (token(metadata, "<|vision_start|>"), token(metadata, "<|vision_end|>"))
    vision = Vision(
        **{**shape(clip), **about, "norm_eps": 1e-6},
        temporal_patch_size=2,
        merge_size=clip.integer("spatial_merge_size", 2),
        image_token_id=token(metadata, "<|image_pad|>"),
        video_token_id=token(metadata, "<|video_pad|>"),
    )
    rope = replace(spec.rope, sections=sections(spec, metadata), cyclic=kind == "qwen3vl_merger")
    merged = tensors.get("mm.2.weight")
    return visual.with_encoder(replace(spec, rope=rope), vision, merged.shape[0] if merged else spec.hidden_size)


def sections(spec: ModelSpec, metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """How many pairs turn by each of the three positions."""
    fields = Fields(metadata, "GGUF metadata", f"{metadata['general.architecture']}.")
    found = fields.token_ids("rope.dimension_sections")[:3]
    if len(found) != 3 or sum(found) != spec.rope.dim // 2:
        raise fields.error("rope.dimension_sections", f"is {list(found)}, must add up to {spec.rope.dim // 2}")
    return found


def _three(clip: Fields, name: str) -> tuple[float, float, float]:
    given = clip.get(name)
    values = [] if given is None else [float(value) for value in given]
    if len(values) != 3 or not all(0 < value <= 1 for value in values):
        raise clip.error(name, f"is {values}, must be three numbers above 0, at most 1")
    return values[0], values[1], values[2]


def token(metadata: Mapping[str, Any], text: str) -> int:
    """The number of a token that the model must have to see."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    for i, each in enumerate([] if tokens is None else tokens):
        if each == text:
            return i
    raise ModelError(f"the model's vocabulary has no {text}, and so no place for pictures")
