"""LLaVA 1.5 (arXiv 2310.03744): a language model such as Vicuna, and CLIP without its last layer."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pagoda.arch import inside, visual
from pagoda.arch.fields import MOST_LAYERS, Fields
from pagoda.arch.models import llama, mistral, qwen2
from pagoda.arch.spec import ModelSpec
from pagoda.arch.vision_spec import Vision
from pagoda.weights.source import Tensor

_TEXT = MappingProxyType({"llama": llama.from_config, "mistral": mistral.from_config, "qwen2": qwen2.from_config})
CLIP: Mapping[str, Any] = MappingProxyType(
    {
        "temporal_patch_size": 1,
        "merge_size": 1,
        "gated": False,
        "norm": "layer",
        "video_token_id": None,
        "names": "clip",
        "rope": None,
        "first_norm": True,
        "class_token": True,
        "merge": "narrow",
        "merge_norm": None,
        "in_line": True,
        "cropped": True,
    }
)
_ACTIVATIONS: Mapping[Any, Any] = MappingProxyType({"quick_gelu": "quick_gelu", "gelu": "gelu", None: "quick_gelu"})


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    text = config.get("text_config")
    bare = isinstance(text, Mapping) and text.get("model_type", "llama") == "llama"
    spec = inside.language_model(config, _TEXT, "llama", inside.LLAMA if bare else {})
    return visual.with_encoder(spec, encoder(config), spec.hidden_size) if visual.sees(config) else spec


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    raise inside.no_gguf("llava")


def encoder(config: Mapping[str, Any]) -> Vision:
    fields, table = visual.encoder_fields(config), Fields(config, "config.json")
    visual.check_same(fields, {"model_type": "clip_vision_model"})
    visual.check_same(table, {"projector_hidden_act": "gelu", "vision_feature_select_strategy": "default"})
    if fields.get("hidden_act") not in _ACTIVATIONS:
        raise fields.error(
            "hidden_act", f"is {fields.get('hidden_act')!r}; this encoder is supported with quick_gelu or gelu"
        )
    patch, side = visual.square(fields, "patch_size", 14), visual.square(fields, "image_size", 336)
    return Vision(
        **CLIP,
        patch_size=patch,
        hidden_size=fields.integer("hidden_size", 1024),
        heads=fields.integer("num_attention_heads", 16),
        depth=_depth(table, fields.integer("num_hidden_layers", 24, most=MOST_LAYERS)),
        intermediate_size=fields.integer("intermediate_size", 4096),
        activation=_ACTIVATIONS[fields.get("hidden_act")],
        norm_eps=fields.number("layer_norm_eps", 1e-5),
        image_token_id=table.integer("image_token_index", table.integer("image_token_id", 32000, least=0), least=0),
        grid_side=side // patch,
        side=side // patch,
        merge_bias=table.flag("multimodal_projector_bias", True),
    )


def _depth(table: Fields, layers: int) -> int:
    """How many layers there are to `vision_feature_layer`; those behind it are not run."""
    layer = table.get("vision_feature_layer")
    layer = -2 if layer is None else layer
    if not isinstance(layer, int) or isinstance(layer, bool) or not -layers <= layer <= layers:
        raise table.error("vision_feature_layer", f"is {layer!r}; one layer of the {layers} is supported")
    return layer if layer >= 0 else layers + 1 + layer
