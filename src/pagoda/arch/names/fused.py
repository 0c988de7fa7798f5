"""Tensors that some checkpoints store as one and the slots of a spec have apart: q, k and v; gate and up."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import accumulate, pairwise
from types import MappingProxyType

from pagoda.arch.spec import Layer, ModelSpec
from pagoda.weights.parts import part
from pagoda.weights.source import Tensor

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_PIECES = MappingProxyType(
    {
        "self_attn.qkv_proj": _QKV,
        "self_attn.W_pack": _QKV,
        "attn_qkv": ("attn_q", "attn_k", "attn_v"),
        "block_sparse_moe.input_linear": ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"),
        "block_sparse_moe.output_linear": ("mlp.experts.*.down_proj",),
        "shared_mlp.input_linear": ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.experts.*.gate_up_proj": ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
        "ffn_up": ("ffn_gate", "ffn_up"),
        "ffn_gate_up_exps": ("ffn_gate_exps", "ffn_up_exps"),
    }
)
_NAME = re.compile(r"(model\.layers\.|blk\.)(\d+)\.(.+)\.(weight|bias)")


def cut_tensors(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, those that hold several slots cut between their outputs."""
    return dict(found for name, tensor in tensors.items() for found in _pieces(spec, name, tensor))


def _pieces(spec: ModelSpec, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    found = _NAME.fullmatch(name)
    prefix, layer, stem, suffix = found.groups() if found else ("", "", "", "")
    names = _PIECES.get(stem, ())
    axis = -min(len(tensor.shape), 2)  # of outputs; a bias has no other
    whole = tensor.shape[axis] if tensor.shape else 0
    known = names and int(layer) < len(spec.layers)
    sizes = _sizes(spec.layers[int(layer)], len(names), whole, shared=stem.startswith("shared")) if known else []
    if not sizes or sum(sizes) != whole:
        yield name, tensor
        return
    for own, (first, last) in zip(names, pairwise(accumulate(sizes, initial=0)), strict=True):
        yield f"{prefix}{layer}.{own}.{suffix}", part(tensor, axis, first, last)


def _sizes(layer: Layer, pieces: int, whole: int, *, shared: bool) -> list[int]:
    a, experts = layer.attention, layer.mlp.experts
    if pieces == 3:
        return [a.heads * a.head_dim, *[a.kv_heads * a.head_dim] * 2]
    size = experts.shared if shared and experts is not None else layer.mlp.size
    return [whole] if pieces == 1 else [size] * 2
