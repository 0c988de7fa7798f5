"""DeepSeek-V2 and V2-Lite: latent attention, and behind the first layers experts that may be chosen by groups.

GGUF has one name for these, for DeepSeek-V3, and for what is made like it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import mixture, mla
from pagoda.arch.fields import Fields
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor

_METHODS = ("greedy", "group_limited_greedy")


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, "config.json")
    if fields.flag("norm_topk_prob", False):
        raise fields.error("norm_topk_prob", "is true, which is not supported for this architecture")
    method = fields.get("topk_method") or "greedy"
    if method not in _METHODS:
        raise fields.error("topk_method", f"is {method!r}; supported: {', '.join(_METHODS)}")
    if method == "greedy":
        fields = Fields({**config, "n_group": 1, "topk_group": 1}, "config.json")
    return mixture.grouped_from_config(mla.from_config("deepseek_v2", fields), fields, sigmoid=False)


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    return mla.from_gguf("deepseek_v2", "deepseek2", metadata, tensors)
