"""From the hidden states of a request to its vector, and through the head of a scoring model to its scores."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from pagoda.arch.pooled_spec import Pooling
from pagoda.arch.registry import bind
from pagoda.arch.spec import ModelSpec
from pagoda.backend.activations import ACTIVATIONS
from pagoda.types import Float32
from pagoda.weights.ggml import dequantize
from pagoda.weights.source import Tensor, TensorSource


class Head:
    """The layers behind the pooling, in float32; computed for each request alone."""

    def __init__(self, spec: ModelSpec, pooling: Pooling, tensors: Mapping[str, Tensor]) -> None:
        own = (slot for slot in tensors if slot.startswith(("pool_", "score", "project.")))
        self._weights = {slot: dequantize(tensors[slot]) for slot in own}
        self._pooling, self._eps = pooling, spec.norm_eps
        if pooling.tokens is not None:
            rows = _rows(tensors["head" if "head" in tensors else "embed"], pooling.tokens)
            self._weights["score"] = rows[1:] - rows[:1]
        if pooling.answers:
            self._weights["score"] = -np.diff(self._weights["score"], axis=0)

    def __call__(self, vector: Float32) -> Float32:
        """A logit for each label, or the embedding."""
        for i, each in enumerate(self._pooling.projections):
            vector = self._linear(f"project.{i}", vector)
            vector = np.tanh(vector) if each.activation == "tanh" else vector
        if self._pooling.dense:
            act = self._pooling.activation
            vector = self._linear("pool_dense", vector)
            vector = np.tanh(vector) if act == "tanh" else ACTIVATIONS[act](vector)
        if self._pooling.dense_norm:
            vector = self._normed(vector)
        return np.asarray(self._linear("score", vector) if self._pooling.labels else vector, np.float32)

    def _linear(self, slot: str, vector: Float32) -> Float32:
        return np.asarray(self._weights[slot] @ vector + self._weights.get(slot + "_bias", 0), np.float32)

    def _normed(self, vector: Float32) -> Float32:
        """Layer norm, as encoders have it."""
        centred = vector - vector.mean()
        scaled = centred / np.sqrt(np.square(centred).mean() + np.float32(self._eps))
        return np.asarray(scaled * self._weights["pool_norm"] + self._weights.get("pool_norm_bias", 0), np.float32)


def head(spec: ModelSpec, source: TensorSource) -> Head | None:
    """None where what is pooled is the answer."""
    p = spec.pooling
    return Head(spec, p, bind(spec, source)) if p is not None and (p.labels or p.projections) else None


def _rows(matrix: Tensor, places: tuple[int, ...]) -> Float32:
    """Some rows of a matrix, without dequantizing the others."""
    row_bytes = matrix.nbytes // matrix.shape[0]
    width = matrix.shape[1]
    parts = [
        Tensor(matrix.name, (width,), matrix.type, matrix.data[place * row_bytes : (place + 1) * row_bytes])
        for place in places
    ]
    return np.stack([dequantize(part) for part in parts])
