"""Mistral Small 3.1 and 3.2 and Ministral 3 as they are published: their language model, and Pixtral's encoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from pagoda.arch import pixtral, visual
from pagoda.arch.fields import Fields
from pagoda.arch.models import ministral3, mistral
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor

_OF_BOTH = ("eos_token_id", "bos_token_id", "tie_word_embeddings")
_TEXT = MappingProxyType({"mistral": mistral.from_config, "ministral3": ministral3.from_config})


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    return pixtral.seeing(ministral3.from_gguf(metadata, tensors), metadata, tensors)


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise Fields(config, "config.json").error("text_config", f"is {text!r}, must be a table")
    kind = text.get("model_type", "mistral")
    if kind not in _TEXT:
        raise Fields(text, "config.json").error("model_type", f"is {kind!r} in text_config; known: {', '.join(_TEXT)}")
    shared = {name: config[name] for name in _OF_BOTH if config.get(name) is not None and text.get(name) is None}
    spec = replace(_TEXT[kind]({"sliding_window": None, **text, **shared}), model_type="mistral3")
    return (
        visual.with_encoder(spec, pixtral.encoder(config, spec.norm_eps), spec.hidden_size)
        if visual.sees(config)
        else spec
    )
