"""XVERSE (dense): Llama's layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import decoder
from pagoda.arch.fields import Fields
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    return decoder.from_config("xverse", Fields(config, "config.json"), decoder.Parts())


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    # as for Llama, converters reorder the rows of q and k
    return decoder.from_gguf("xverse", metadata, tensors, interleaved=True)
