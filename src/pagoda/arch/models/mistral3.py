"""Mistral Small 3.1 and 3.2 and Ministral 3 as they are published: the language model, without its eyes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from pagoda.arch.fields import Fields
from pagoda.arch.models import ministral3, mistral
from pagoda.arch.spec import ModelSpec

_OF_BOTH = ("eos_token_id", "bos_token_id", "tie_word_embeddings")
_TEXT = MappingProxyType({"mistral": mistral.from_config, "ministral3": ministral3.from_config})

from_gguf = ministral3.from_gguf


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise Fields(config, "config.json").error("text_config", f"is {text!r}, must be a table")
    kind = text.get("model_type", "mistral")
    if kind not in _TEXT:
        raise Fields(text, "config.json").error("model_type", f"is {kind!r} in text_config; known: {', '.join(_TEXT)}")
    shared = {name: config[name] for name in _OF_BOTH if config.get(name) is not None and text.get(name) is None}
    return replace(_TEXT[kind]({"sliding_window": None, **text, **shared}), model_type="mistral3")
