"""What DeepSeek's kind of models have in their checkpoints beside the tensors of their layers, or as one of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from types import MappingProxyType

import numpy as np

from pagoda.arch.latent import Latent
from pagoda.arch.spec import ModelSpec
from pagoda.weights.fp8 import Scaled
from pagoda.weights.ggml import dequantize
from pagoda.weights.grouped import Bytes, MadeTensor, Stacked
from pagoda.weights.parts import OUTPUTS, part
from pagoda.weights.source import Tensor

FAMILIES = frozenset(
    {
        *("glm4_moe", "glm4_moe_lite", "deepseek_v2", "deepseek_v3"),
        *("dots1", "ernie4_5_moe", "exaone_moe", "minimax_m2", "solar_open", "youtu"),
        *("bailing_moe", "deepseek", "hy_v3", "exaone4_5", "mellum", "mimo", "minicpm3", "mistral4"),
    }
)
_LAYER = re.compile(r"(model\.layers\.|blk\.)(\d+)\.(.+)")
_AHEAD = re.compile(r"(model\.)?mtp[._].+")
"""What predicts several tokens at once, where it is no layer."""
_CHOICE_BIAS = re.compile(r"(.+\.e_score_correction)_(bias)")
_BARE_CHOICE = "exp_probs_b"  # as Hunyuan 3's files have it
_BOTH = MappingProxyType(
    {
        "self_attn.kv_b_proj.weight": ("self_attn.k_b_proj.weight", "self_attn.v_b_proj.weight"),
        "attn_kv_b.weight": ("attn_k_b.weight", "attn_v_b.weight"),
    }
)
"""One tensor that has, head by head, what makes keys and what makes values."""
_ITEMS = MappingProxyType({"F32": "u4", "F16": "u2", "BF16": "u2"})


def deepseek_tensors(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the model's layers, one for each slot, under the spelling of other decoders."""
    return dict(found for name, tensor in tensors.items() for found in _each(spec, name, tensor))


def _each(spec: ModelSpec, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    found = _LAYER.fullmatch(name)
    if found is None:
        if not _AHEAD.fullmatch(name):
            yield name, tensor
        return
    prefix, index, rest = found[1], int(found[2]), found[3]
    if index >= len(spec.layers):
        return  # of blocks that predict several tokens at once, which no step does
    a = spec.layers[index].attention
    if rest in _BOTH and a.latent is not None:
        yield from _apart(f"{prefix}{index}.", _BOTH[rest], a.heads, a.latent, tensor)
    else:
        yield f"{name}.bias" if rest == _BARE_CHOICE else _CHOICE_BIAS.sub(r"\1.\2", name), tensor


def _apart(
    prefix: str, names: tuple[str, str], heads: int, latent: Latent, tensor: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """k_b and v_b; one of a wrong shape is left for the complaint about it."""
    k, v, each = prefix + names[0], prefix + names[1], latent.nope + latent.value_dim
    if tensor.shape != (heads * each, latent.rank):
        yield k, tensor
        return
    starts, tensor = range(0, heads * each, each), _cuttable(tensor, each, latent.nope)
    keys = tuple(_turned(part(tensor, OUTPUTS, at, at + latent.nope)) for at in starts)
    yield k, Stacked(keys).tensor(k)
    yield v, Stacked(tuple(part(tensor, OUTPUTS, at + latent.nope, at + each) for at in starts)).tensor(v)


def _cuttable(tensor: Tensor, *sizes: int) -> Tensor:
    """The tensor, as plain values where its blocks of FP8 do not end with the heads."""
    m = tensor.origin if isinstance(tensor, MadeTensor) else None
    if isinstance(m, Scaled) and m.block is not None and any(size % m.block[0] for size in sizes):
        return MadeTensor(tensor.name, tensor.shape, tensor.type, lambda: tensor.data)
    return tensor


def _turned(tensor: Tensor) -> Tensor:
    """The transpose; of quantized values, which do not lie along it, in 16 bits."""
    kind = tensor.type if tensor.type in _ITEMS else "F16"
    return MadeTensor(tensor.name, tensor.shape[::-1], kind, partial(_transposed, tensor))


def _transposed(tensor: Tensor) -> Bytes:
    if tensor.type in _ITEMS:
        values = tensor.data.view(_ITEMS[tensor.type]).reshape(tensor.shape).T
    else:
        values = dequantize(tensor).astype("<f2").view("<u2").T
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)
