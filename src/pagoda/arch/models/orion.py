"""Orion 14B: Llama's layers with layer norms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import decoder
from pagoda.arch.fields import Fields
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor

_PARTS = decoder.Parts(norm="layer")


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    # the name of its epsilon is the one of RMS norms all the same
    return decoder.from_config("orion", Fields(config, "config.json"), _PARTS)


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    return decoder.from_gguf("orion", metadata, tensors, parts=_PARTS)
