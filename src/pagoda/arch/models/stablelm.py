"""StableLM: layer norms and partial RoPE; in some, attention and MLP stand side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pagoda.arch import decoder
from pagoda.arch.fields import Fields
from pagoda.arch.spec import ModelSpec, Norms
from pagoda.errors import ModelError
from pagoda.weights.source import Tensor

DEFAULT_SHARE = 0.25
_NORMED = "norms on q and k of this kind (StableLM 2 12B) are not supported"


def from_config(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields({"partial_rotary_factor": DEFAULT_SHARE, **config}, "config.json")
    if fields.flag("qk_layernorm", False):
        raise fields.error("qk_layernorm", f"is true: {_NORMED}")
    parallel, bias = fields.flag("use_parallel_residual", False), fields.flag("use_qkv_bias", False)
    parts = decoder.Parts(qkv_bias=bias, norm="layer", norms="one" if parallel else "before")
    return decoder.from_config("stablelm", fields, parts, norm_eps="layer_norm_eps")


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ModelSpec:
    if "blk.0.attn_q_norm.weight" in tensors:
        raise ModelError(_NORMED, remedy="Take another model")
    norms: Norms = "before" if "blk.0.ffn_norm.weight" in tensors else "one"
    return decoder.from_gguf("stablelm", metadata, tensors, parts=decoder.Parts(norm="layer", norms=norms))
