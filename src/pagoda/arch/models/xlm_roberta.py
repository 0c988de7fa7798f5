"""XLM-RoBERTa: bge-m3, bge-reranker, multilingual-e5; BERT with positions counted behind the padding id."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import encoder
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    return encoder.from_config("xlm_roberta", config, padded=True)


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    return encoder.from_gguf("xlm_roberta", metadata, tensors)
