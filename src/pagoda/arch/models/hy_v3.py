"""Hunyuan 3: Qwen3's attention, and behind the first layer experts with sigmoid shares and a shared one."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pagoda.arch import decoder, mixture
from pagoda.arch.fields import Fields
from pagoda.arch.spec import ModelSpec
from pagoda.weights.source import Tensor

DEFAULT_HEAD_DIM = 128
_GGUF = "hy_v3"
_USUAL = MappingProxyType(
    {
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "n_shared_experts": 1,
        "routed_scaling_factor": 2.826,
        "rope_theta": 11158840.0,
        "rms_norm_eps": 1e-5,
    }
)
"""What a config may leave out."""
# what configs call the fields of experts, and what DeepSeek's do
_OWN = MappingProxyType(
    {
        "n_routed_experts": "num_experts",
        "n_shared_experts": "num_shared_experts",
        "routed_scaling_factor": "router_scaling_factor",
    }
)


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    own = {usual: config[name] for usual, name in _OWN.items() if config.get(name) is not None}
    fields = Fields({**_USUAL, **config, **own}, "config.json")
    bias = fields.flag("attention_bias", False)
    parts = decoder.Parts(qkv_bias=bias, out_bias=bias, mlp_bias=fields.flag("mlp_bias", False), qk_norm=True)
    spec = decoder.from_config("hy_v3", fields, parts, head_dim=DEFAULT_HEAD_DIM)
    return mixture.grouped_from_config(spec, fields, sigmoid=True)


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    fields = Fields(metadata, "GGUF metadata", f"{_GGUF}.")
    # the last blocks predict several tokens at once
    count = fields.integer("block_count") - fields.integer("nextn_predict_layers", 0, least=0)
    spec = decoder.from_gguf("hy_v3", {**metadata, f"{_GGUF}.block_count": count}, tensors, qk_norm=True)
    return mixture.grouped_from_gguf(spec, fields, tensors)
