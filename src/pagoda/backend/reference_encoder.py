"""What an encoder means, in plain numpy and float32: BERT's layers (arXiv 1810.04805), one request at a time."""

from __future__ import annotations

import numpy as np

from pagoda.arch.spec import Attention, Layer
from pagoda.backend.reference import ReferenceExecutor, rotate, softmax
from pagoda.backend.rows import token_positions
from pagoda.types import Float32, StepPlan


class ReferenceEncoder(ReferenceExecutor):
    """A ReferenceExecutor without a cache: each request is whole in one step."""

    def hidden(self, plan: StepPlan) -> Float32:
        x = self.norm("embed_norm", self.embed(plan))
        for i, layer in enumerate(self.spec.layers):
            x = self.layer(i, layer, x, plan)
        return self.norm("norm", x[plan.rows])

    def layer(self, i: int, layer: Layer, x: Float32, plan: StepPlan) -> Float32:
        name = f"layers.{i}."
        if layer.norms == "sum":
            x = self.norm(name + "attn_norm", x + self.attend(name, layer.attention, x, plan))
            return self.norm(name + "mlp_norm", x + self.mlp(i, layer.mlp, x))
        y = self.attend(name, layer.attention, self.norm(name + "attn_norm", x), plan)
        x = x + self.norm(name + "attn_post_norm", y)
        y = self.mlp(i, layer.mlp, self.norm(name + "mlp_norm", x))
        return np.asarray(x + self.norm(name + "mlp_post_norm", y))

    def embed(self, plan: StepPlan) -> Float32:
        """Word, position and type of each token, added up."""
        x, kinds = super().embed(plan), self.weights.get("types")
        if kinds is None:
            return x
        positions = token_positions(plan)
        types = np.zeros(len(positions), np.intp)
        if plan.second_texts is not None:
            types = (positions >= np.repeat(plan.second_texts, np.diff(plan.starts))).astype(np.intp)
        return np.asarray(x + kinds[np.minimum(types, len(kinds) - 1)])

    def attend(self, name: str, a: Attention, x: Float32, plan: StepPlan) -> Float32:
        q, k, v = self.projected(name, a, x)
        if a.rope:
            cos, sin = self.turns(plan, token_positions(plan), a.local)
            q, k = rotate(q, cos, sin, self.spec.rope), rotate(k, cos, sin, self.spec.rope)
        k, v = (np.repeat(heads, a.heads // a.kv_heads, axis=1) for heads in (k, v))
        out = np.empty_like(q)
        for first, last in zip(plan.starts[:-1], plan.starts[1:], strict=True):
            request = slice(first, last)
            keys, values = k[request].transpose(1, 2, 0), v[request].transpose(1, 0, 2)
            scores = (q[request].transpose(1, 0, 2) @ keys) * np.float32(a.scale)
            if a.window is not None:
                places = np.arange(last - first)
                scores[:, np.abs(places - places[:, None]) >= a.window] = -np.inf
            out[request] = (softmax(scores) @ values).transpose(1, 0, 2)
        return self.linear(name + "o", out.reshape(len(x), a.heads * a.head_dim))
