"""BERT: MiniLM, e5, bge, gte and the many that share its layers. In GGUF RoBERTa and XLM-RoBERTa are BERT too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import encoder
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    return encoder.from_config("bert", config, padded=False)


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    return encoder.from_gguf("bert", metadata, tensors)
