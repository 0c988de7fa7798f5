"""Qwen3-VL with experts: Qwen3-VL, the MLP of most of its layers a mixture of small ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pagoda.arch import mixture, visual_gguf
from pagoda.arch.fields import Fields
from pagoda.arch.models import qwen3_vl
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    spec = replace(qwen3_vl.from_config(config), model_type="qwen3_vl_moe")
    fields = qwen3_vl.language_fields(config)
    # its router always divides by the sum of the shares that it has chosen, whatever the file says
    return mixture.from_config(spec, Fields({**fields.values, "norm_topk_prob": True}, fields.where))


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    spec = mixture.from_gguf("qwen3vlmoe", metadata, tensors, normalized=True, qk_norm=True)
    return visual_gguf.seeing(replace(spec, model_type="qwen3_vl_moe"), metadata, tensors)
