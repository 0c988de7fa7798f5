"""GTE's encoder of 2024 (arXiv 2407.19669), of snowflake-arctic-embed 2.0 too: BERT that turns, with a gated gelu."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import encoder
from pagoda.arch.spec import Mlp, ModelSpec
from pagoda.errors import ModelError
from pagoda.weights.source import Tensor

_BASE = 160000.0


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    given = {"position_embedding_type": "rope", "layer_norm_type": "layer_norm", "logn_attention_scale": False}
    for name, usual in given.items():
        if config.get(name) not in (None, usual):
            raise ModelError(f"config.json: {name} is {config[name]!r}; gte is supported with {usual!r} only")
    return encoder.turning("gte", config, Mlp(0, "gelu", down_bias=True), theta=_BASE, bias=True)


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    raise ModelError("gte models are not read from GGUF", remedy="Take the model's safetensors version")
