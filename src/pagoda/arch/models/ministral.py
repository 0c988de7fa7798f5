"""Ministral 8B: Mistral's layers, some or all with a sliding window. In GGUF it is called llama."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pagoda.arch import decoder
from pagoda.arch.fields import Fields
from pagoda.arch.models import mistral
from pagoda.arch.spec import ModelSpec

from_gguf = mistral.from_gguf


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    spec = mistral.from_config(config)
    sliding = decoder.layer_kinds(Fields(config, "config.json"), [True] * len(spec.layers))
    return replace(decoder.with_windows(spec, sliding), model_type="ministral")
