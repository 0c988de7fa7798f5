"""What GPT-2 checkpoints call their tensors, and what other decoders call the same: matrices turned, q, k, v apart."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from types import MappingProxyType

import numpy as np

from pagoda.errors import ModelError
from pagoda.weights.grouped import Bytes, MadeTensor
from pagoda.weights.parts import INPUTS, part
from pagoda.weights.source import Tensor

_ENDS = MappingProxyType({"wte": "embed_tokens", "wpe": "embed_positions", "ln_f": "norm"})
_PARTS = MappingProxyType(
    {
        "ln_1": "input_layernorm",
        "attn.c_proj": "self_attn.o_proj",
        "ln_2": "post_attention_layernorm",
        "mlp.c_fc": "mlp.up_proj",
        "mlp.c_proj": "mlp.down_proj",
    }
)
_NAME = re.compile(r"(?:transformer\.)?(?:h\.(\d+)\.)?(.+)\.(weight|bias)")
_MASKS = re.compile(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias")  # which tokens see which: buffers of old exporters
_FLOATS = ("F32", "F16", "BF16")


def gpt2_tensors(tensors: Mapping[str, Tensor], *, gguf: bool) -> dict[str, Tensor]:
    """A GPT-2's tensors under the spelling of other decoders; names that are not GPT-2's stay as they are."""
    each = _from_gguf if gguf else _from_hub
    return dict(found for name, tensor in tensors.items() for found in each(name, tensor))


def _from_gguf(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if ".attn_qkv." not in name:
        yield name, tensor
        return
    for letter, piece in _three(tensor, -len(tensor.shape)):
        yield name.replace("attn_qkv", f"attn_{letter}"), piece


def _from_hub(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    found = _NAME.fullmatch(name)
    if _MASKS.fullmatch(name):
        return
    layer, stem, suffix = found.groups() if found else (None, "", "")
    if layer is None:
        yield (f"model.{_ENDS[stem]}.{suffix}" if stem in _ENDS else name), tensor
    elif stem == "attn.c_attn":
        for letter, piece in _three(tensor, INPUTS):
            yield f"model.layers.{layer}.self_attn.{letter}_proj.{suffix}", _turned(piece)
    else:
        yield (f"model.layers.{layer}.{_PARTS[stem]}.{suffix}" if stem in _PARTS else name), _turned(tensor)


def _three(tensor: Tensor, axis: int) -> Iterator[tuple[str, Tensor]]:
    """What q, k and v each have of an axis that holds them one after the other."""
    each = tensor.shape[axis] // 3
    for i, letter in enumerate("qkv"):
        yield letter, part(tensor, axis, i * each, (i + 1) * each)


def _turned(tensor: Tensor) -> Tensor:
    """A matrix stored as [in, out], as GPT-2 has all in its layers, as [out, in]."""
    if len(tensor.shape) != 2:
        return tensor
    if tensor.type not in _FLOATS:
        raise ModelError(
            f"the tensor {tensor.name} is stored as {tensor.type}: quantized GPT-2 checkpoints are read from GGUF only",
            remedy="Take the model in floats, with --quantization int8 or int4 to make it smaller",
        )
    return MadeTensor(tensor.name, tensor.shape[::-1], tensor.type, partial(_transpose, tensor), tensor)


def _transpose(tensor: Tensor) -> Bytes:
    values = tensor.data.view("u4" if tensor.type == "F32" else "u2").reshape(tensor.shape)
    return np.ascontiguousarray(values.T).reshape(-1).view(np.uint8)
