"""GLM-4.7-Flash: DeepSeek-V3's layers, the first of them without experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch.models import deepseek_v2, deepseek_v3
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    return deepseek_v3.of_config("glm4_moe_lite", {"first_k_dense_replace": 1, **config})


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    return deepseek_v2.from_gguf(metadata, tensors)
