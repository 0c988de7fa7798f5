"""What the native program needs to know of a model's gated delta nets: their shape, and their small tensors packed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from pagoda.arch.delta import DeltaNet
from pagoda.arch.spec import ModelSpec
from pagoda.backend.cpu.library import Delta
from pagoda.errors import ModelError
from pagoda.weights.ggml import dequantize
from pagoda.weights.source import Tensor

PRODUCTS = ("q", "k", "v", "z", "beta", "decay")
"""The slots whose products with a token stand side by side, in the order of native/src/kernels.h."""
_LANES = 8


def delta_of(spec: ModelSpec) -> DeltaNet | None:
    """The shape that all delta nets of a model have."""
    return next((layer.delta for layer in spec.layers if layer.delta is not None), None)


def check_delta(spec: ModelSpec) -> None:
    """ModelError where the kernels cannot run the delta nets of a model."""
    found = {layer.delta for layer in spec.layers} - {None}
    if len(found) > 1:
        raise ModelError("the CPU backend needs all delta nets of one shape", remedy="Try --device reference")
    d = delta_of(spec)
    if d is not None and (d.key_dim % _LANES or d.value_dim % _LANES):
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
    return Delta(layers, d.key_heads, d.value_heads, d.key_dim, d.value_dim, d.kernel, int(d.tiled), states)


def product_width(d: DeltaNet) -> int:
    """Outputs of a layer's products."""
    return d.width + d.value_width + 2 * d.value_heads


def taps(tensors: Mapping[str, Tensor], prefix: str) -> npt.NDArray[np.float32]:
    """The convolution of a layer, [kernel, channels]."""
    parts = [dequantize(tensors[f"{prefix}{letter}_conv"]) for letter in "qkv"]
    return np.ascontiguousarray(np.concatenate(parts).T, dtype=np.float32)


def of_heads(tensors: Mapping[str, Tensor], prefix: str) -> npt.NDArray[np.float32]:
    """rate and dt of each value head, then the norm of all."""
    parts = [dequantize(tensors[prefix + name]) for name in ("rate", "dt", "z_norm")]
    return np.ascontiguousarray(np.concatenate(parts), dtype=np.float32)
