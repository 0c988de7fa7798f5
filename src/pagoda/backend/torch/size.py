"""How large stored tensors are once they are on the device, before any is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from pagoda.backend.torch.convert import GROUP, Target, is_product, on_load
from pagoda.backend.torch.gguf import FORMS
from pagoda.backend.torch.packs import W4_CHUNK
from pagoda.weights.fp8 import Scaled
from pagoda.weights.grouped import Grouped, MadeTensor, Stacked
from pagoda.weights.source import Tensor

_SCALE_BYTES = 4


def weight_bytes(bound: Mapping[str, Tensor], target: Target) -> int:
    """All tensors of a model, by slot."""
    total = 0
    for slot, tensor in bound.items():
        own = replace(target, quantization=on_load(target.quantization, slot, tensor.shape[-1]))
        total += _bytes(tensor, own) if is_product(slot, tensor) else _float_bytes(slot, tensor, target)
    return total


def _float_bytes(slot: str, tensor: Tensor, target: Target) -> int:
    vector = len(tensor.shape) == 1 and not slot.endswith("_bias")
    return math.prod(tensor.shape) * (4 if vector else target.dtype.itemsize)


def _bytes(tensor: Tensor, target: Target) -> int:
    count, outputs = math.prod(tensor.shape), math.prod(tensor.shape[:-1])
    item = target.scale_type.itemsize
    match tensor.origin if isinstance(tensor, MadeTensor) else None:
        case Stacked(parts):
            return sum(_bytes(part, target) for part in parts)
        case Grouped() as m if m.even:
            return _codes_bytes(tensor, m.bits) + 2 * math.prod(m.scales.shape) * item
        case Scaled() as m:
            return count + math.prod(m.scales.shape) * _SCALE_BYTES
    if tensor.type in FORMS:
        bits, group, has_zeros = FORMS[tensor.type]
        return _codes_bytes(tensor, bits) + count // group * item * (1 + has_zeros)
    match target.quantization:
        case "int8" | "fp8":
            return count + outputs * _SCALE_BYTES
        case "int4":
            return _codes_bytes(tensor, 4) + 2 * count // GROUP * item
        case "w8":
            return count + count // GROUP * item
    return count * target.dtype.itemsize


def _codes_bytes(tensor: Tensor, bits: int) -> int:
    """Codes of 4 bits fill whole chunks."""
    inputs = tensor.shape[-1]
    return math.prod(tensor.shape[:-1]) * (inputs if bits == 8 else -(-inputs // W4_CHUNK) * W4_CHUNK // 2)
