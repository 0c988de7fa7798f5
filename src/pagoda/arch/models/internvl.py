"""InternVL 3 and 3.5 (arXiv 2504.10479): a language model of Qwen or Llama, and a vision transformer over tiles."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pagoda.arch import inside, visual
from pagoda.arch.fields import MOST_LAYERS, Fields
from pagoda.arch.models import llama, qwen2, qwen3, qwen3_moe
from pagoda.arch.spec import ModelSpec
from pagoda.arch.vision_spec import Vision
from pagoda.weights.source import Tensor

_TEXT = MappingProxyType(
    {
        "qwen2": qwen2.from_config,
        "qwen3": qwen3.from_config,
        "qwen3_moe": qwen3_moe.from_config,
        "llama": llama.from_config,
    }
)
INTERNVL: Mapping[str, Any] = MappingProxyType(
    {
        "temporal_patch_size": 1,
        "activation": "gelu",
        "gated": False,
        "norm": "layer",
        "video_token_id": None,
        "video_text": "<video>",
        "patch_bias": True,
        "names": "internvl",
        "rope": None,
        "class_token": True,
        "layer_scale": True,
        "merge": "narrow",
        "merge_norm": "joined",
        "merge_eps": 1e-5,
        "in_line": True,
        "tiling": "nearest",
        "most_tiles": 12,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
    }
)
_ONLY = MappingProxyType(
    {
        "hidden_act": "gelu",
        "norm_type": "layer_norm",
        "use_qk_norm": False,
        "attention_bias": True,
        "use_absolute_position_embeddings": True,
        "use_mean_pooling": True,
    }
)
"""What the smaller encoder has, of 300 million parameters; the one of 6 billion is another."""


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    spec = inside.language_model(config, _TEXT, "qwen2", {"tie_word_embeddings": True})
    return visual.with_encoder(spec, encoder(config), spec.hidden_size) if visual.sees(config) else spec


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    raise inside.no_gguf("internvl")


def encoder(config: Mapping[str, Any]) -> Vision:
    fields, table = visual.encoder_fields(config), Fields(config, "config.json")
    visual.check_same(fields, _ONLY)
    visual.check_same(
        table, {"projector_hidden_act": "gelu", "vision_feature_layer": -1, "vision_feature_select_strategy": "default"}
    )
    patch, side = visual.square(fields, "patch_size", 14), visual.square(fields, "image_size", 448)
    return Vision(
        **INTERNVL,
        patch_size=patch,
        merge_size=round(1 / table.number("downsample_ratio", 0.5)),
        hidden_size=fields.integer("hidden_size", 1024),
        heads=fields.integer("num_attention_heads", 16),
        depth=fields.integer("num_hidden_layers", 24, most=MOST_LAYERS),
        intermediate_size=fields.integer("intermediate_size", 4096),
        norm_eps=fields.number("layer_norm_eps", 1e-6),
        image_token_id=table.integer("image_token_id", 151667, least=0),
        grid_side=side // patch,
        side=side // patch,
    )
