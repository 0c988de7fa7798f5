"""Jina embeddings v3 (arXiv 2409.10173) without its adapters: XLM-RoBERTa with rotary embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import encoder
from pagoda.arch.spec import Mlp, ModelSpec
from pagoda.weights.source import Tensor

_BASE = 20000.0


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    mlp = Mlp(0, "gelu", bias=True, gated=False)
    return encoder.turning("jina_embeddings_v3", config, mlp, theta=_BASE, bias=True)


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    return encoder.from_gguf("jina_embeddings_v3", metadata, tensors)
