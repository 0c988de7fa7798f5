"""How large stored tensors are once they are on a GPU, before any is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

from pagoda.options.formats import INT4_GROUP, on_load_gpu
from pagoda.weights.fp8 import Scaled
from pagoda.weights.grouped import Grouped, MadeTensor, Stacked
from pagoda.weights.source import Tensor

W4_CHUNK = 256
"""Inputs whose 4-bit codes are kept together."""

FORMS: Mapping[str, tuple[int, int, bool]] = MappingProxyType(
    {
        "Q4_0": (4, 32, True),
        "Q4_1": (4, 32, True),
        "Q8_0": (8, 32, False),
        "IQ4_NL": (8, 32, False),
        "MXFP4": (4, 32, False),
        "Q4_K": (4, 32, True),
        "Q5_K": (8, 32, True),
        "Q6_K": (8, 16, False),
    }
)
"""What a GPU makes of GGUF blocks: bits of a code, values that share a scale, whether there are zero points."""

_SCALE_BYTES = 4


def is_product(slot: str, tensor: Tensor) -> bool:
    """True of what a product takes in its own bits: the matrices of the layers, and the head of its own."""
    exact = slot.endswith((".router", "_bias", "_conv", ".k_b", ".v_b"))
    other = slot in ("embed", "layer_embed", "positions", "types") or slot.startswith("vision.") or exact
    return len(tensor.shape) > 1 and not other


def tensor_bytes(slot: str, tensor: Tensor, quantization: str | None, itemsize: int) -> int:
    """`itemsize`: bytes of a number of the type that is computed in."""
    if is_product(slot, tensor):
        return _product_bytes(tensor, on_load_gpu(quantization, slot, tensor.shape[-1]), itemsize)
    vector = (len(tensor.shape) == 1 and not slot.endswith("_bias")) or slot.endswith("_conv")
    return math.prod(tensor.shape) * (4 if vector else itemsize)


def grouped_bytes(tensor: Tensor, bits: int, groups: int, itemsize: int) -> int:
    """Codes, and a scale and a zero point of each group."""
    return _codes_bytes(tensor, bits) + 2 * groups * _group_scale_bytes(itemsize)


def _product_bytes(tensor: Tensor, quantization: str | None, itemsize: int) -> int:
    count, outputs, item = math.prod(tensor.shape), math.prod(tensor.shape[:-1]), _group_scale_bytes(itemsize)
    match tensor.origin if isinstance(tensor, MadeTensor) else None:
        case Stacked(parts):
            return sum(_product_bytes(part, quantization, itemsize) for part in parts)
        case Grouped() as m if m.even:
            return grouped_bytes(tensor, m.bits, math.prod(m.scales.shape), itemsize)
        case Scaled() as m:
            return count + math.prod(m.scales.shape) * _SCALE_BYTES
    if tensor.type in FORMS:
        bits, group, has_zeros = FORMS[tensor.type]
        item = 1 if tensor.type == "MXFP4" else item
        return _codes_bytes(tensor, bits) + count // group * item * (1 + has_zeros)
    match quantization:
        case "int8" | "fp8":
            return count + outputs * _SCALE_BYTES
        case "int4":
            return grouped_bytes(tensor, 4, count // INT4_GROUP, itemsize)
        case "w8":
            return count + count // INT4_GROUP * item
    return count * itemsize


def _group_scale_bytes(itemsize: int) -> int:
    """Scales and zero points of groups are at least as exact as what is computed with them."""
    return 4 if itemsize == 4 else 2


def _codes_bytes(tensor: Tensor, bits: int) -> int:
    """Codes of 4 bits fill whole chunks."""
    inputs = tensor.shape[-1]
    return math.prod(tensor.shape[:-1]) * (inputs if bits == 8 else -(-inputs // W4_CHUNK) * W4_CHUNK // 2)
