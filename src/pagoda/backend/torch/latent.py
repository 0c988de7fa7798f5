"""Latent attention on tensors, in plain PyTorch: between the products with x and what a head gives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pagoda.arch.latent import Latent
from pagoda.backend.torch import ops
from pagoda.backend.torch.batch import Batch, Heads
from pagoda.backend.torch.norms import RmsNorm
from pagoda.backend.torch.packs import Weight


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """What the layer has beside the products with x: q_a (or q) and kv_a side by side."""

    shape: Latent
    heads: Heads
    kv_a_norm: RmsNorm
    k_b: Tensor  # [heads, rank, nope] in the type of computation
    v_b: Tensor  # [heads, value size, rank]
    q_a_norm: RmsNorm | None
    q_b: Weight | None

    def __call__(
        self, x: Tensor, cos_sin: Tensor, batch: Batch, k_cache: Tensor, v_cache: Tensor, scales: Tensor | None
    ) -> Tensor:
        """[T, heads * value size] of products x [T, q + rank + turned]."""
        h, rank = self.heads, self.shape.rank
        q, c, r = torch.split(x, [x.shape[-1] - rank - h.turned, rank, h.turned], dim=-1)
        if self.q_b is not None and self.q_a_norm is not None:
            q = ops.matmul(self.q_a_norm(q.contiguous()), self.q_b)
        nope, turned = torch.split(torch.unflatten(q, -1, (h.heads, -1)), [self.shape.nope, h.turned], dim=-1)
        query = torch.cat((turned, ops.by_head(nope, self.k_b)), dim=-1)
        key = torch.cat((r, self.kv_a_norm(c.contiguous())), dim=-1)
        query = ops.rope_and_keep(query, key, cos_sin, batch, k_cache, h)
        if scales is not None:
            query = query * scales[batch.positions].to(query.dtype)[:, None, None]
        return ops.by_head(ops.paged_attention(query, k_cache, v_cache, batch, h), self.v_b).flatten(1)
