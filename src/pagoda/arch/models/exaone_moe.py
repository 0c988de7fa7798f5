"""K-EXAONE: EXAONE 4's attention with norms in front of the halves, and DeepSeek-V3's kind of experts."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pagoda.arch import decoder, mixture
from pagoda.arch.fields import Fields
from pagoda.arch.models import exaone4
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor

_PARTS = decoder.Parts(qk_norm=True)
_GGUF = "exaone-moe"
_USUAL = MappingProxyType(
    {"num_shared_experts": 1, "norm_topk_prob": True, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5}
)


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    table = {**_USUAL, **config}
    own = {"n_routed_experts": table.get("num_experts"), "n_shared_experts": table["num_shared_experts"]}
    spec = exaone4.of_config("exaone_moe", config, _PARTS)
    return mixture.grouped_from_config(spec, Fields({**table, **own}, "config.json"), sigmoid=True)


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    fields = Fields(metadata, "GGUF metadata", f"{_GGUF}.")
    # the last blocks predict several tokens at once
    count = fields.integer("block_count") - fields.integer("nextn_predict_layers", 0, least=0)
    table = {**metadata, f"{_GGUF}.block_count": count}
    spec = exaone4.of_gguf("exaone_moe", _GGUF, table, tensors, _PARTS)
    return mixture.grouped_from_gguf(spec, fields, tensors)
