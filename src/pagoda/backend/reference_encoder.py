"""What an encoder means, in plain numpy and float32: BERT's layers (arXiv 1810.04805), one request at a time."""

from __future__ import annotations

import math

import numpy as np

from pagoda.arch.spec import Attention
from pagoda.backend.reference import ReferenceExecutor, token_positions
from pagoda.types import Float32, StepPlan

_erf = np.frompyfunc(math.erf, 1, 1)


class ReferenceEncoder(ReferenceExecutor):
    """A ReferenceExecutor without a cache: each request is whole in one step."""

    def hidden(self, plan: StepPlan) -> Float32:
        x = self.layer_norm("norm", self.embed(plan))
        for i, layer in enumerate(self.spec.layers):
            name = f"layers.{i}."
            x = self.layer_norm(name + "attn_norm", x + self.attend(name, layer.attention, x, plan))
            x = self.layer_norm(name + "mlp_norm", x + self.linear(name + "down", gelu(self.linear(name + "up", x))))
        return np.asarray(x[plan.rows])

    def embed(self, plan: StepPlan) -> Float32:
        """Word, position and type of each token, added up."""
        positions = token_positions(plan)
        types = np.zeros(len(positions), np.intp)
        if plan.second_texts is not None:
            types = (positions >= np.repeat(plan.second_texts, np.diff(plan.starts))).astype(np.intp)
        first = self.spec.encoder.first_position if self.spec.encoder is not None else 0
        words, kinds = self.weights["embed"][plan.tokens], self.weights["types"]
        places = self.weights["positions"][positions + first]
        return np.asarray(words + places + kinds[np.minimum(types, len(kinds) - 1)])

    def attend(self, name: str, a: Attention, x: Float32, plan: StepPlan) -> Float32:
        q, k, v = (self.linear(name + part, x).reshape(-1, a.heads, a.head_dim) for part in "qkv")
        out = np.empty_like(q)
        for first, last in zip(plan.starts[:-1], plan.starts[1:], strict=True):
            request = slice(first, last)
            keys, values = k[request].transpose(1, 2, 0), v[request].transpose(1, 0, 2)
            scores = (q[request].transpose(1, 0, 2) @ keys) * np.float32(a.scale)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            out[request] = (weights / weights.sum(axis=-1, keepdims=True) @ values).transpose(1, 0, 2)
        return self.linear(name + "o", out.reshape(len(x), a.heads * a.head_dim))

    def layer_norm(self, slot: str, x: Float32) -> Float32:
        centred = x - x.mean(axis=-1, keepdims=True)
        scale = np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + np.float32(self.spec.norm_eps))
        return np.asarray(centred / scale * self.weights[slot] + self.weights[slot + "_bias"])


def gelu(x: Float32) -> Float32:
    return np.asarray(x * 0.5 * (1 + _erf(x / math.sqrt(2)).astype(np.float32)), dtype=np.float32)
