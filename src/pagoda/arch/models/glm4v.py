"""GLM-4.1V, 4.5V and 4.6V (arXiv 2507.01006): GLM-4, or 4.5, with three positions for each token, and an encoder."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pagoda.arch import inside, visual
from pagoda.arch.fields import Fields
from pagoda.arch.models import glm, glm4_moe
from pagoda.arch.spec import ModelSpec
from pagoda.arch.vision_spec import Vision
from pagoda.weights.source import Tensor

_SECTIONS, _THETA = (8, 12, 12), 10000.0
GLM: Mapping[str, Any] = MappingProxyType(
    {
        "activation": "silu",
        "gated": True,
        "norm": "rms",
        "frames_as_pictures": True,
        "patch_bias": True,
        "grid": "cubic",
        "names": "glm",
        "first_norm": True,
        "biased": False,
        "merge": "gated",
        "merge_bias": False,
    }
)
_EXPERTS, _DENSE = ("glm4v_moe", "glm4v_moe_text"), ("glm4v", "glm4v_text")


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    table = visual.language(config, sections=_SECTIONS, theta=_THETA)
    kind = table.get("model_type") or config.get("model_type")
    if kind not in (*_EXPERTS, *_DENSE):
        raise Fields(table, "config.json").error(
            "model_type", f"is {kind!r} in text_config; known: {_DENSE + _EXPERTS}"
        )
    table = {"head_dim": None, "attention_bias": True, "rms_norm_eps": 1e-5, **table}
    if kind in _EXPERTS:
        spec = glm4_moe.from_config(table)
    else:
        spec = glm.of_config("glm4", table, "both")
    seen = visual.encoder_fields(config).integer("out_hidden_size", 4096)
    return visual.with_encoder(spec, encoder(config), seen)


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    raise inside.no_gguf("glm4v")


def encoder(config: Mapping[str, Any]) -> Vision:
    fields, table = visual.encoder_fields(config), Fields(config, "config.json")
    visual.check_activation(fields, "silu")
    visual.check_same(fields, {"attention_bias": False})
    positions = visual.square(fields, "image_size", 336) // fields.integer("patch_size", 14)
    newer = config.get("model_type") == "glm46v"
    return Vision(
        **GLM,
        **visual.shape(fields, depth=24),
        hidden_size=fields.integer("hidden_size", 1536),
        intermediate_size=fields.integer("out_hidden_size", 4096),
        norm_eps=fields.number("rms_norm_eps", 1e-5),
        image_token_id=table.integer("image_token_id", 151343, least=0),
        video_token_id=table.integer("video_token_id", 151344, least=0),
        grid_side=positions,
        merge_width=fields.integer("intermediate_size", 13696),
        time_format=visual.LATER_TIMES if newer else visual.TIMES,
    )
