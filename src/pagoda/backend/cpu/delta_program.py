"""What the native program needs to know of a model's layers with a state: their shape, and their small tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from pagoda.arch.delta import DeltaNet
from pagoda.arch.mamba import Mamba
from pagoda.arch.recurrence import Recurrence
from pagoda.arch.short_conv import ShortConv
from pagoda.arch.spec import ModelSpec
from pagoda.backend.cpu import records as native
from pagoda.backend.cpu.records import Delta
from pagoda.errors import ModelError
from pagoda.weights.ggml import dequantize
from pagoda.weights.source import Tensor

_LANES, _COLUMNS = 8, 16
_MOST_CHANNELS = 256
"""Of a convolution that one thread goes through at once, or a few more."""


def delta_of(spec: ModelSpec) -> Recurrence | None:
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
    if isinstance(d, Mamba) and (d.key_dim % _LANES or d.value_dim % _COLUMNS):
        raise ModelError(
            f"the CPU backend needs state spaces in multiples of {_LANES}, their heads in multiples of {_COLUMNS}, "
            f"not {d.key_dim} and {d.value_dim}",
            remedy="Try --device reference",
        )


def delta_dims(spec: ModelSpec, states: int) -> Delta:
    """With room for so many states of requests."""
    d = delta_of(spec)
    if d is None:
        return Delta()
    layers = sum(layer.delta is not None for layer in spec.layers)
    if isinstance(d, ShortConv):
        parts = _parts(d.channels)
        return Delta(layers, parts, parts, 0, d.channels // parts, d.kernel, 0, states)
    if isinstance(d, Mamba):
        parts = _parts(d.width // _LANES, _MOST_CHANNELS // _LANES)
        return Delta(layers, d.groups, d.value_heads, d.key_dim, d.value_dim, d.kernel, 0, states, parts)
    return Delta(layers, d.key_heads, d.value_heads, d.key_dim, d.value_dim, d.kernel, int(d.tiled), states)


def _parts(count: int, most: int = _MOST_CHANNELS) -> int:
    return next(n for n in range(count // most or 1, count + 1) if not count % n)


def product_width(d: Recurrence) -> int:
    """Outputs of a layer's products."""
    if isinstance(d, ShortConv):
        return 3 * d.channels
    return d.width + d.value_width + (1 if isinstance(d, Mamba) else 2) * d.value_heads


def taps(tensors: Mapping[str, Tensor], prefix: str) -> npt.NDArray[np.float32]:
    """The convolution of a layer, [kernel, channels]; of a state space a row more, of biases."""
    slots = [prefix + f"{letter}_conv" for letter in "qkvu"]
    parts = [dequantize(tensors[slot]) for slot in slots if slot in tensors]
    out = np.ascontiguousarray(np.concatenate(parts).T, dtype=np.float32)
    if prefix + "skip" not in tensors:
        return out
    biases = [dequantize(tensors[slot + "_bias"]) for slot in slots if slot + "_bias" in tensors]
    return np.append(out, np.concatenate(biases or [np.zeros_like(out[0])])[None], axis=0)


def of_heads(tensors: Mapping[str, Tensor], prefix: str) -> npt.NDArray[np.float32]:
    """rate and dt of each value head, then the norm of all; of a state space skip of each in its place."""
    names = ("rate", "dt", "skip" if prefix + "skip" in tensors else "z_norm")
    parts = [dequantize(tensors[prefix + name]) for name in names]
    return np.ascontiguousarray(np.concatenate(parts), dtype=np.float32)


def state_space(emit: Callable[..., None], d: Mamba, p: str, in_: int, out: int, place: int, order: str) -> None:
    """The operations of a layer with one behind its products, which are in the buffer `in_`; `place` is its state's."""
    emit(native.CONVOLVE, in_=in_, out=in_, vector=p + "taps", layer=place)
    emit(native.SCAN, in_=in_, out=out, vector=p + "of_heads", layer=place)
    emit(native.NORM_GATED, in_=in_, out=out, vector=p + "z_norm", layer=d.width, window=d.groups, f=d.eps, order=order)
