"""Idefics 3 (arXiv 2408.12637) and SmolVLM (arXiv 2504.05299): Llama, and SigLIP over tiles of a picture."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pagoda.arch import inside, visual
from pagoda.arch.fields import MOST_LAYERS, Fields
from pagoda.arch.models import llama
from pagoda.arch.spec import ModelSpec
from pagoda.arch.vision_spec import Vision
from pagoda.weights.source import Tensor

_TEXT = MappingProxyType({"llama": llama.from_config})
_HALF = (0.5, 0.5, 0.5)
IDEFICS: Mapping[str, Any] = MappingProxyType(
    {
        "temporal_patch_size": 1,
        "activation": "gelu_tanh",
        "gated": False,
        "norm": "layer",
        "video_token_id": None,
        "patch_bias": True,
        "names": "idefics",
        "rope": None,
        "merge": "linear",
        "merge_bias": False,
        "in_line": True,
        "tiling": "grid",
        "mean": _HALF,
        "std": _HALF,
    }
)
TILES_OF_AN_EDGE = 4
"""Where a preprocessor_config.json does not say how long the longest edge is."""


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    spec = inside.language_model(config, _TEXT, "llama", {**inside.LLAMA, "rms_norm_eps": 1e-5})
    return visual.with_encoder(spec, encoder(config), spec.hidden_size) if visual.sees(config) else spec


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    raise inside.no_gguf("idefics3")


def encoder(config: Mapping[str, Any]) -> Vision:
    fields, table = visual.encoder_fields(config), Fields(config, "config.json")
    visual.check_activation(fields, "gelu_pytorch_tanh")
    patch, side = visual.square(fields, "patch_size", 32), visual.square(fields, "image_size", 224)
    return Vision(
        **IDEFICS,
        patch_size=patch,
        merge_size=table.integer("scale_factor", 2),
        hidden_size=fields.integer("hidden_size", 1152),
        heads=fields.integer("num_attention_heads", 16),
        depth=fields.integer("num_hidden_layers", 12, most=MOST_LAYERS),
        intermediate_size=fields.integer("intermediate_size", 3072),
        norm_eps=fields.number("layer_norm_eps", 1e-6),
        image_token_id=table.integer("image_token_id", 128257, least=0),
        grid_side=side // patch,
        side=side // patch,
        longest_edge=TILES_OF_AN_EDGE * side,
    )
