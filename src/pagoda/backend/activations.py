"""What the activations of an MLP mean, in plain numpy and float32."""

from __future__ import annotations

import math
from types import MappingProxyType

import numpy as np

from pagoda.types import Float32

_erf = np.frompyfunc(math.erf, 1, 1)


def silu(x: Float32) -> Float32:
    return np.asarray(x / (1 + np.exp(-x)))


def gelu(x: Float32) -> Float32:
    """x times the share of a normal distribution that is below it (arXiv 1606.08415)."""
    return np.asarray(x * 0.5 * (1 + _erf(x / math.sqrt(2)).astype(np.float32)), dtype=np.float32)


def gelu_tanh(x: Float32) -> Float32:
    """The same paper's form by tanh, which is near that."""
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x**3)
    return np.asarray(x * np.float32(0.5) * (1 + np.tanh(inner)))


def relu2(x: Float32) -> Float32:
    """The square of what is above 0 (arXiv 2109.08668)."""
    return np.asarray(np.square(np.maximum(x, np.float32(0))))


ACTIVATIONS = MappingProxyType({"silu": silu, "gelu": gelu, "gelu_tanh": gelu_tanh, "relu2": relu2})


def clamped_swiglu(gate: Float32, up: Float32) -> Float32:
    """The function of gpt-oss's experts."""
    gate, up = np.minimum(gate, np.float32(7)), np.clip(up, np.float32(-7), np.float32(7))
    return np.asarray(gate / (1 + np.exp(np.float32(-1.702) * gate)) * (up + 1))
