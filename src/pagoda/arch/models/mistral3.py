"""Mistral Small 3.1, 3.2 and 4 and Ministral 3 as they are published: their language model, and Pixtral's encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from pagoda.arch import inside, pixtral, visual
from pagoda.arch.models import ministral3, mistral, mistral4
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor

_TEXT = MappingProxyType(
    {"mistral": mistral.from_config, "ministral3": ministral3.from_config, "mistral4": mistral4.from_config}
)


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    return pixtral.seeing(ministral3.from_gguf(metadata, tensors), metadata, tensors)


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    spec = inside.language_model(config, _TEXT, "mistral", {"sliding_window": None})
    if spec.model_type != "mistral4":  # whose tensors have other names
        spec = replace(spec, model_type="mistral3")
    return (
        visual.with_encoder(spec, pixtral.encoder(config, spec.norm_eps), spec.hidden_size)
        if visual.sees(config)
        else spec
    )
