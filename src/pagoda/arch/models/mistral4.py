"""Mistral Small 4: DeepSeek's latent attention and experts, with softmax shares, and Ministral 3's larger queries."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pagoda.arch import mixture, mla
from pagoda.arch.fields import Fields
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor

_USUAL = MappingProxyType({"norm_topk_prob": True, "n_shared_experts": 1, "first_k_dense_replace": 0})


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    # the share of a whole head that is turned: `qk_rope_head_dim` says it already
    given = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(given, Mapping):
        raise Fields(config, "config.json").error("rope_parameters", f"is {given!r}, must be a table")
    recipe = {**given, "partial_rotary_factor": 1.0}
    fields = Fields({**_USUAL, **config, "rope_parameters": recipe}, "config.json")
    if fields.integer("n_group", 1) != 1:
        raise fields.error("n_group", f"is {fields.get('n_group')!r}: groups of experts are not supported here")
    spec = mla.from_config("mistral4", fields, interleaved=fields.flag("rope_interleave", True))
    return mixture.grouped_from_config(spec, fields, sigmoid=False)


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    return mla.from_gguf("mistral4", "mistral4", metadata, tensors)
