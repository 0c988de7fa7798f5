"""GPT-NeoX 20B and Pythia: layer norms and partial RoPE; attention and an MLP without a gate side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pagoda.arch import decoder
from pagoda.arch.fields import Fields
from pagoda.arch.spec import ModelSpec, Norms
from pagoda.weights.source import Tensor

_PARTS = decoder.Parts(gated=False, activation="gelu", norm="layer")
DEFAULT_SHARE = 0.25
_WIDTH_OF_20B = 6144


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    own = {
        "partial_rotary_factor": config.get("rotary_pct", DEFAULT_SHARE),
        "rope_theta": config.get("rotary_emb_base", config.get("rope_theta")),
    }
    fields = Fields({**own, **config, "num_key_value_heads": None}, "config.json")
    bias = fields.flag("attention_bias", True)
    norms = _norms(fields.flag("use_parallel_residual", True))
    given = fields.get("hidden_act") or _PARTS.activation
    activation = decoder.ACTIVATIONS.get(given, given)
    parts = replace(_PARTS, qkv_bias=bias, out_bias=bias, mlp_bias=True, norms=norms, activation=activation)
    return decoder.from_config("gpt_neox", fields, parts, norm_eps="layer_norm_eps")


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    fields = Fields(metadata, "GGUF metadata", "gptneox.")
    # no file says it: the 20B has the tanh form of gelu, Pythia, which is never so wide, the exact one
    activation = "gelu_tanh" if fields.integer("embedding_length") == _WIDTH_OF_20B else _PARTS.activation
    parts = replace(_PARTS, norms=_norms(fields.flag("use_parallel_residual", True)), activation=activation)
    return decoder.from_gguf("gpt_neox", metadata, tensors, parts=parts, prefix="gptneox")


def _norms(parallel: bool) -> Norms:
    return "beside" if parallel else "before"
