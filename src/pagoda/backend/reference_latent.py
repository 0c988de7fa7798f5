"""Latent attention in plain numpy and float32: queries taken to the space of what is kept, and the way back."""

from __future__ import annotations

import numpy as np

from pagoda.backend.reference_product import matmul
from pagoda.types import Float32


def latent_queries(q: Float32, k_b: Float32) -> Float32:
    """[T, heads, turned + rank] of queries [T, heads, nope + turned]: what is turned comes first, as in the keys."""
    nope = k_b.shape[-1]
    met = [matmul(q[:, head, :nope], own) for head, own in enumerate(k_b)]
    return np.concatenate((q[..., nope:], np.stack(met, axis=1)), axis=-1)


def expanded(out: Float32, v_b: Float32) -> Float32:
    """[T, heads * value size] of what attention gives each head, [T, heads, rank]."""
    return np.concatenate([matmul(out[:, head], own) for head, own in enumerate(v_b)], axis=-1)
