"""Nomic BERT (arXiv 2402.01613), nomic-embed-text: BERT with rotary embeddings, gated MLPs and no biases."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pagoda.arch import encoder
from pagoda.arch.fields import Fields
from pagoda.arch.spec import Mlp, ModelSpec
from pagoda.errors import ModelError
from pagoda.weights.source import Tensor

_BASE, _TRAINED = 1000.0, 2048
_OWN_NAMES = MappingProxyType(
    {
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
        "intermediate_size": "n_inner",
        "layer_norm_eps": "layer_norm_epsilon",
        "rope_theta": "rotary_emb_base",
    }
)
"""What its makers call the fields that transformers names as all others'."""
_FIXED = MappingProxyType(
    {
        "activation_function": "swiglu",
        "prenorm": False,
        "causal": False,
        "use_rms_norm": False,
        "parallel_block": False,
        "qkv_proj_bias": False,
        "mlp_fc1_bias": False,
        "mlp_fc2_bias": False,
        "rotary_emb_fraction": 1.0,
        "rotary_emb_interleaved": False,
        "moe_every_n_layers": 0,
    }
)
"""What the makers' own form may say of other models, which are not supported."""


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    if "n_embd" in config and "hidden_size" not in config:
        config = _renamed(config)
    return encoder.turning("nomic_bert", config, Mlp(0, "silu"), theta=_BASE, bias=False)


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    return encoder.from_gguf("nomic_bert", metadata, tensors)


def _renamed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Contexts longer than it was trained for would need other frequencies for each length: they are not served."""
    for name, usual in _FIXED.items():
        if config.get(name) not in (None, usual):
            raise ModelError(f"config.json: {name} is {config[name]!r}; nomic_bert is supported with {usual!r} only")
    fields = Fields(config, "config.json")
    longest = min(fields.integer("n_positions", _TRAINED), fields.integer("max_trained_positions", _TRAINED))
    own = {new: config[old] for new, old in _OWN_NAMES.items() if config.get(old) is not None}
    return {"type_vocab_size": config.get("type_vocab_size"), "vocab_size": config.get("vocab_size"), **own} | {
        "max_position_embeddings": longest
    }
