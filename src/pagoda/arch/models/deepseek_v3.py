"""DeepSeek-V3 and R1: V2's layers, whose experts have sigmoid shares and a bias for the choice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import mixture, mla
from pagoda.arch.fields import Fields
from pagoda.arch.models import deepseek_v2
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    return of_config("deepseek_v3", config)


def of_config(model_type: str, config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields({"norm_topk_prob": True, **config}, "config.json")
    for name, usual in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        if (found := fields.get(name) or usual) != usual:
            raise fields.error(name, f"is {found!r}; this architecture is supported with {usual} only")
    spec = mla.from_config(model_type, fields, interleaved=fields.flag("rope_interleave", True))
    return mixture.grouped_from_config(spec, fields, sigmoid=True)


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    return deepseek_v2.from_gguf(metadata, tensors)
