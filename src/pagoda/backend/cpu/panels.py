"""What the matrices of a model become before they are repacked into panels: their types, and the orders of inputs."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from pagoda.arch import memory
from pagoda.backend.cpu import records as native
from pagoda.options.formats import EIGHT_BITS_OF_INT4, EXACT, QUANTIZE_ON_LOAD
from pagoda.weights.ggml import dequantize
from pagoda.weights.grouped import OrderedTensor
from pagoda.weights.source import Tensor

Places = npt.NDArray[np.int32]

FLOATS = ("F32", "F16", "BF16")

_INT4 = MappingProxyType(dict.fromkeys(("embed", "head", "layer_embed", *EIGHT_BITS_OF_INT4), "Q8_0"))
"""What int4 makes of the matrices that suffer most from rounding; Q4_1 of the others."""

FUSED = MappingProxyType(
    {
        "qkv": ("q", "q_a", "kv_a", "k", "v", "q_gate", "z", "beta", "decay", "b", "u", "c"),
        "q_b": ("q_b",),
        "o": ("o",),
        "gate_up": ("gate", "up"),
        "down": ("down",),
        "gate_up_experts": ("gate_experts", "up_experts"),
        "gate_up_shared": ("gate_shared", "up_shared"),
    }
)
"""The products of a layer, and the slots that each is stacked from, where the layer has them."""


def panel_type(slot: str, tensor: Tensor, quantization: str | None) -> str:
    """What a matrix is once it is repacked. `quantization` int8 or int4 makes 8 or 4 bits of float ones."""
    kind = tensor.type if tensor.type in native.TYPES else "F32"
    part = slot.rpartition(".")[2]
    if part in EXACT and kind == "BF16":
        return "F32"  # products in bf16 may round their input to bf16
    if quantization not in QUANTIZE_ON_LOAD or kind not in FLOATS or tensor.shape[-1] % 32 or part in EXACT:
        return kind
    return "Q8_0" if quantization == "int8" else _INT4.get(part, "Q4_1")


def kind_of_cache(asked: str, tensors: Mapping[str, Tensor]) -> int:
    """What attention keeps keys and values in. `auto` is bfloat16 (where the processor multiplies it) unless all
    matrices are finer floats."""
    if memory.kv_type(asked) == "int8":
        return native.KV_INT8
    exact = all(t.type in ("F32", "F16") for t in tensors.values() if len(t.shape) > 1)
    return native.KV_F16 if asked == "float16" or (asked == "auto" and exact) else native.KV_BF16


def in_their_order(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Places]]:
    """The tensors, with the packed form of those that have their inputs in an order of their own, and these orders by
    product. Matrices of one product that do not share an order stay as they are, in float32.
    """
    out, orders = dict(tensors), {}
    # the layers of decoders: what the operations of an encoder give is put in no order
    prefixes = {slot.rpartition(".")[0] for slot in tensors if slot.endswith((".gate", ".router"))}
    for prefix in prefixes:
        for name, parts in FUSED.items():
            found = {slot: tensors[slot] for slot in (f"{prefix}.{part}" for part in parts) if slot in tensors}
            ordered = {slot: t for slot, t in found.items() if isinstance(t, OrderedTensor)}
            first = next(iter(ordered.values()), None)
            # an input that others read keeps its order: x, where no norm is in front, and that of a mixture
            free = name in ("o", "down") or (f"{prefix}.attn_norm" in tensors and name != "gate_up_shared")
            if first and len(ordered) == len(found) and free:
                if all(np.array_equal(t.order, first.order) for t in ordered.values()):
                    out |= {slot: t.packed for slot, t in ordered.items()}
                    orders[f"{prefix}.{name}"] = first.order
    return out, orders


def runnable(tensor: Tensor, panel_type: str) -> Tensor:
    """The tensor in a type that the kernels run; others, and what is to be in float32, are widened."""
    if tensor.type == panel_type or (tensor.type in native.TYPES and panel_type != "F32"):
        return tensor
    values = np.ascontiguousarray(dequantize(tensor), dtype=np.float32)
    return Tensor(tensor.name, tensor.shape, "F32", values.view(np.uint8).ravel())
