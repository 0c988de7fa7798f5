"""Qwen3 with experts: Qwen3's layers, the MLP of most of them a mixture of small ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pagoda.arch import mixture
from pagoda.arch.fields import Fields
from pagoda.arch.models import qwen3
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    spec = replace(qwen3.from_config(config), model_type="qwen3_moe")
    return mixture.from_config(spec, Fields(config, "config.json"))


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    spec = mixture.from_gguf("qwen3moe", metadata, tensors, normalized=True, qk_norm=True)
    return replace(spec, model_type="qwen3_moe")
