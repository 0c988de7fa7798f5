"""The values of each token that the layers have for themselves (per-layer embeddings), in plain numpy and float32."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pagoda.arch.spec import ModelSpec
from pagoda.backend.activations import ACTIVATIONS
from pagoda.backend.reference_product import matmul, rms
from pagoda.types import Float32, Int32


def layer_values(spec: ModelSpec, weights: Mapping[str, Float32], x: Float32, tokens: Int32) -> Float32:
    """[T, layers, values] from embeddings [T, hidden size] and a second table: (norm of a product + row) / sqrt(2).

    The product is over the root of the hidden size, the row times the root of what a layer has of it.
    """
    shape = (len(x), len(spec.layers), spec.layer_embed)
    product = matmul(x, weights["layer_project"]) * np.float32(spec.hidden_size**-0.5)
    made = rms(product.reshape(shape), spec.norm_eps) * weights["layer_project_norm"]
    rows = weights["layer_embed"][tokens].reshape(shape) * np.float32(spec.layer_embed**0.5)
    return np.asarray((made + rows) * np.float32(2**-0.5))


def own_part(weights: Mapping[str, Float32], name: str, x: Float32, values: Float32) -> Float32:
    """What a layer makes of x and its values [T, n], before it is normed and added."""
    gate = ACTIVATIONS["gelu_tanh"](matmul(x, weights[name + "own_gate"]))
    return matmul(gate * values, weights[name + "own_out"])
