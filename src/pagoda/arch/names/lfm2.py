"""What LFM2's checkpoints call their tensors, and what other decoders call the same; a convolution's products apart."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType

from pagoda.arch.spec import ModelSpec
from pagoda.weights.parts import OUTPUTS, part
from pagoda.weights.source import Tensor

_LAYER = re.compile(r"(model\.layers\.|blk\.)(\d+)\.(.+)")
_WHOLE = MappingProxyType(
    {
        "model.embedding_norm.weight": "model.norm.weight",
        "token_embd_norm.weight": "output_norm.weight",
    }
)
_RENAMED = MappingProxyType(
    {
        "operator_norm.": "input_layernorm.",
        "ffn_norm.": "post_attention_layernorm.",
        "self_attn.out_proj.": "self_attn.o_proj.",
        "self_attn.q_layernorm.": "self_attn.q_norm.",
        "self_attn.k_layernorm.": "self_attn.k_norm.",
        "feed_forward.expert_bias": "mlp.gate.e_score_correction.bias",
        "feed_forward.": "mlp.",
    }
)
_MATRICES = MappingProxyType({".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj."})
_ORDER = ("b", "c", "u")
"""Of what `in_proj` gives."""


def lfm2_tensors(spec: ModelSpec, tensors: Mapping[str, Tensor], *, gguf: bool) -> dict[str, Tensor]:
    """The tensors of the model under the spelling of other decoders, one for each slot."""
    return dict(found for name, tensor in tensors.items() for found in _each(spec, name, tensor, gguf))


def _each(spec: ModelSpec, name: str, tensor: Tensor, gguf: bool) -> Iterator[tuple[str, Tensor]]:
    found = _LAYER.fullmatch(name)
    if found is None:
        yield _WHOLE.get(name, name), tensor
        return
    prefix, rest = f"{found[1]}{found[2]}.", found[3]
    own, n = f"{prefix}linear_attn.", spec.hidden_size
    match rest.removeprefix("short"):
        case "conv.in_proj.weight" if tensor.shape == (3 * n, n):
            for place, slot in enumerate(_ORDER):
                yield own + slot, part(tensor, OUTPUTS, place * n, (place + 1) * n)
        case "conv.conv.weight":
            yield f"{own}u_conv", replace(tensor, shape=(tensor.shape[0], tensor.shape[-1]))
        case "conv.out_proj.weight":
            yield f"{own}o", tensor
        case _:
            yield prefix + (rest if gguf else _plain(rest)), tensor


def _plain(rest: str) -> str:
    old = next((old for old in _RENAMED if rest.startswith(old)), "")
    rest = _RENAMED.get(old, "") + rest.removeprefix(old)
    for own, usual in _MATRICES.items():
        rest = rest.replace(own, usual)
    return rest
