"""ERNIE 4.5 with experts (21B-A3B, 300B-A47B): its dense layers, from one on with a mixture and a shared expert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import decoder, mixture
from pagoda.arch.fields import Fields
from pagoda.arch.models import ernie4_5
from pagoda.arch.spec import Experts, ModelSpec
from pagoda.weights.source import Tensor

_GGUF = "ernie4_5-moe"
_SOFTMAX = 1


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, "config.json")
    if fields.flag("use_bias", False):
        raise fields.error("use_bias", "is true, which is not supported with experts")
    spec = ernie4_5.of_config("ernie4_5_moe", config)
    first, every = fields.integer("moe_layer_start_index", 1, least=0), fields.integer("moe_layer_interval", 1)
    last = fields.get("moe_layer_end_index")
    last = len(spec.layers) - 1 if last in (None, -1) else fields.integer("moe_layer_end_index", least=0)
    size = fields.integer("moe_intermediate_size")
    experts = Experts(
        fields.integer("moe_num_experts"),
        fields.integer("moe_k"),
        normalized=True,
        shared=fields.integer("moe_num_shared_experts", 2, least=0) * size,
        shared_gate=False,
        choice_bias=True,
    )
    sparse = [first <= i <= last and (i + 1) % every == 0 for i in range(len(spec.layers))]
    return mixture.with_mixtures(spec, size, experts, sparse)


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    spec = decoder.from_gguf("ernie4_5_moe", metadata, tensors, interleaved=True, prefix=_GGUF)
    # what no key says: shares are a softmax, and those of the chosen ones add up to 1
    own = {f"{_GGUF}.expert_gating_func": _SOFTMAX, f"{_GGUF}.expert_weights_norm": True}
    return mixture.grouped_from_gguf(spec, Fields({**metadata, **own}, "GGUF metadata", f"{_GGUF}."), tensors)
