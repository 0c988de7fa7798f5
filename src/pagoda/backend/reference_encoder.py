"""What an encoder means, in plain numpy and float32: BERT's layers (arXiv 1810.04805), one request at a time."""

from __future__ import annotations

import numpy as np

from pagoda.arch.spec import Attention
from pagoda.backend.reference import ReferenceExecutor
from pagoda.backend.rows import token_positions
from pagoda.types import Float32, StepPlan


class ReferenceEncoder(ReferenceExecutor):
    """A ReferenceExecutor without a cache: each request is whole in one step."""

    def hidden(self, plan: StepPlan) -> Float32:
        x = self.norm("norm", self.embed(plan))
        for i, layer in enumerate(self.spec.layers):
            name = f"layers.{i}."
            x = self.norm(name + "attn_norm", x + self.attend(name, layer.attention, x, plan))
            x = self.norm(name + "mlp_norm", x + self.mlp(i, layer.mlp, x))
        return np.asarray(x[plan.rows])

    def embed(self, plan: StepPlan) -> Float32:
        """Word, position and type of each token, added up."""
        positions = token_positions(plan)
        types = np.zeros(len(positions), np.intp)
        if plan.second_texts is not None:
            types = (positions >= np.repeat(plan.second_texts, np.diff(plan.starts))).astype(np.intp)
        kinds = self.weights["types"]
        return np.asarray(super().embed(plan) + kinds[np.minimum(types, len(kinds) - 1)])

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
