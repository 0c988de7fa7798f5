"""From the hidden states of a request to its vector, and through the head of a scoring model to its scores."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pagoda.arch.spec import Pooling
from pagoda.types import Float32
from pagoda.weights.ggml import dequantize
from pagoda.weights.source import Tensor

_HEAD = ("pool_dense", "pool_dense_bias", "score", "score_bias")


class Head:
    """The last layers of a scoring model, in float32; computed for each request alone."""

    def __init__(self, pooling: Pooling, tensors: Mapping[str, Tensor]) -> None:
        self._weights = {slot: dequantize(tensors[slot]) for slot in _HEAD if slot in tensors}
        if pooling.tokens is not None:
            rows = _rows(tensors["head" if "head" in tensors else "embed"], pooling.tokens)
            self._weights["score"] = rows[1:] - rows[:1]

    def __call__(self, vector: Float32) -> Float32:
        """A logit for each label."""
        weights = self._weights
        if "pool_dense" in weights:
            vector = np.tanh(weights["pool_dense"] @ vector + weights["pool_dense_bias"])
        scores = weights["score"] @ vector
        return np.asarray(scores + weights["score_bias"] if "score_bias" in weights else scores, np.float32)


def _rows(matrix: Tensor, places: tuple[int, ...]) -> Float32:
    """Some rows of a matrix, without dequantizing the others."""
    row_bytes = matrix.nbytes // matrix.shape[0]
    width = matrix.shape[1]
    parts = [
        Tensor(matrix.name, (width,), matrix.type, matrix.data[place * row_bytes : (place + 1) * row_bytes])
        for place in places
    ]
    return np.stack([dequantize(part) for part in parts])
