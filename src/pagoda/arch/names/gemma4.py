"""The tensors of Gemma 4 as other decoders have them: gate and up apart, values where the keys are the values."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from types import MappingProxyType

import numpy as np

from pagoda.arch.spec import ModelSpec
from pagoda.weights.ggml import dequantize
from pagoda.weights.grouped import Bytes, MadeTensor
from pagoda.weights.parts import OUTPUTS, part
from pagoda.weights.source import Tensor

_LAYER = re.compile(r"(model\.layers\.|blk\.)(\d+)\.(.+)")
_KEYS, _VALUES = ("self_attn.k_proj.weight", "attn_k.weight"), ("self_attn.v_proj.weight", "attn_v.weight")
_OF_KEYS = (*_KEYS, *_VALUES, "self_attn.k_norm.weight", "attn_k_norm.weight")
_EXPERTS = MappingProxyType(
    {
        "experts.gate_up_proj": ("mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"),
        "ffn_gate_up_exps.weight": ("ffn_gate_exps.weight", "ffn_up_exps.weight"),
    }
)
_RENAMED = MappingProxyType(
    {
        "layer_scalar": "layer_scalar.weight",
        "experts.down_proj": "mlp.experts.*.down_proj.weight",
        "router.per_expert_scale": "router.expert_scale.weight",
        "ffn_down_exps.scale": "ffn_down_exps_scale.weight",
    }
)
_ROUTER_NORMS = MappingProxyType(
    {"router.scale": "router.norm.weight", "ffn_gate_inp.scale": "ffn_gate_inp_norm.weight"}
)
GEMMA4: Mapping[str, str] = MappingProxyType(
    {
        "mlp_norm": "pre_feedforward_layernorm",
        "shared_norm": "pre_feedforward_layernorm",
        "router": "router.proj",
        **{f"{name}_shared": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
    }
)
GGUF_GEMMA4: Mapping[str, str] = MappingProxyType({f"{name}_shared": f"ffn_{name}" for name in ("gate", "up", "down")})


def gemma4_tensors(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the model, one for each slot; layers that keep no keys may have been stored with theirs."""
    out = dict(found for name, tensor in tensors.items() for found in _each(spec, name, tensor))
    for i, layer in enumerate(spec.layers):
        for prefix, keys, values in zip((f"model.layers.{i}.", f"blk.{i}."), _KEYS, _VALUES, strict=True):
            if layer.attention.v_is_k and prefix + keys in out:
                out[prefix + values] = out[prefix + keys]
    return out


def _each(spec: ModelSpec, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    found = _LAYER.fullmatch(name)
    if found is None or int(found[2]) >= len(spec.layers):
        yield name, tensor
        return
    prefix, rest = f"{found[1]}{found[2]}.", found[3]
    if rest in _OF_KEYS and spec.layers[int(found[2])].attention.source is not None:
        return
    if rest in _EXPERTS and len(tensor.shape) == 3:
        half = tensor.shape[OUTPUTS] // 2
        for place, own in enumerate(_EXPERTS[rest]):
            yield prefix + own, part(tensor, OUTPUTS, place * half, (place + 1) * half)
    elif rest in _ROUTER_NORMS:
        own = prefix + _ROUTER_NORMS[rest]
        yield own, MadeTensor(own, tensor.shape, "F32", partial(_over_root, tensor))
    else:
        yield prefix + _RENAMED.get(rest, rest), tensor


def _over_root(tensor: Tensor) -> Bytes:
    """What a norm without weights is multiplied by: the weights over the root of their number."""
    return (dequantize(tensor) * np.float32(tensor.shape[0] ** -0.5)).reshape(-1).view(np.uint8)
