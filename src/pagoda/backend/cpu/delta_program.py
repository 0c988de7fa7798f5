"""What the native program needs to know of a model's layers with a state: their shape, and their small tensors."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from pagoda.arch.delta import DeltaNet
from pagoda.arch.short_conv import ShortConv
from pagoda.arch.spec import ModelSpec
from pagoda.backend.cpu.records import Delta
from pagoda.errors import ModelError
from pagoda.weights.ggml import dequantize
from pagoda.weights.source import Tensor

PRODUCTS = ("q", "k", "v", "z", "beta", "decay")
"""The slots whose products with a token stand side by side, in the order of native/src/kernels.h."""
_LANES = 8
_MOST_CHANNELS = 256
"""Of a convolution that one thread goes through at once, or a few more."""


def delta_of(spec: ModelSpec) -> DeltaNet | ShortConv | None:
    """The shape that all layers with a state have."""
    return next((layer.delta for layer in spec.layers if layer.delta is not None), None)


def check_delta(spec: ModelSpec) -> None:
    """ModelError where the kernels cannot run the delta nets of a model."""
    found = {layer.delta for layer in spec.layers} - {None}
    if len(found) > 1:
        raise ModelError("the CPU backend needs all delta nets of one shape", remedy="Try --device reference")
    d = delta_of(spec)
    if isinstance(d, DeltaNet) and (d.key_dim % _LANES or d.value_dim % _LANES):
        raise ModelError(
            f"the CPU backend needs heads of linear attention in multiples of {_LANES}, not {d.key_dim} and "
            f"{d.value_dim}",
            remedy="Try --device reference",
        )


def delta_dims(spec: ModelSpec, states: int) -> Delta:
    """With room for so many states of requests."""
    d = delta_of(spec)
    if d is None:
        return Delta()
    layers = sum(layer.delta is not None for layer in spec.layers)
    if isinstance(d, ShortConv):
        parts = next(n for n in range(d.channels // _MOST_CHANNELS or 1, d.channels + 1) if not d.channels % n)
        return Delta(layers, parts, parts, 0, d.channels // parts, d.kernel, 0, states)
    return Delta(layers, d.key_heads, d.value_heads, d.key_dim, d.value_dim, d.kernel, int(d.tiled), states)


def product_width(d: DeltaNet | ShortConv) -> int:
    """Outputs of a layer's products."""
    if isinstance(d, ShortConv):
        return 3 * d.channels
    return d.width + d.value_width + 2 * d.value_heads


def taps(tensors: Mapping[str, Tensor], prefix: str) -> npt.NDArray[np.float32]:
    """The convolution of a layer, [kernel, channels]."""
    slots = [prefix + f"{letter}_conv" for letter in "qkvu"]
    parts = [dequantize(tensors[slot]) for slot in slots if slot in tensors]
    return np.ascontiguousarray(np.concatenate(parts).T, dtype=np.float32)


def of_heads(tensors: Mapping[str, Tensor], prefix: str) -> npt.NDArray[np.float32]:
    """rate and dt of each value head, then the norm of all."""
    parts = [dequantize(tensors[prefix + name]) for name in ("rate", "dt", "z_norm")]
    return np.ascontiguousarray(np.concatenate(parts), dtype=np.float32)
