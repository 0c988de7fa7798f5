"""What layers may have: values of each token for themselves, keys of another layer, experts with norms of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pagoda.arch.spec import Experts
from pagoda.backend.torch import ops
from pagoda.backend.torch.batch import Batch, Heads
from pagoda.backend.torch.norms import Norm, RmsNorm
from pagoda.backend.torch.packs import Dense, Weight

Product = Callable[[Tensor], Tensor]
PAD = 0
"""The token whose row of the second table those of pictures have."""


@dataclass(frozen=True, slots=True)
class LayerValues:
    """Gives the values of each token for each layer, [T, layers, n]."""

    table: Tensor  # [vocab, layers * n] in the type of computation
    scale: float
    project: Product
    norm: RmsNorm  # of a layer's values
    picture_token: int = -1

    def __call__(self, x: Tensor, tokens: Tensor) -> Tensor:
        made = self.norm(torch.unflatten(self.project(x), -1, (-1, len(self.norm.weight))))
        words = torch.where((tokens == self.picture_token) | (tokens < 0), PAD, tokens)
        return made + (self.table[words] * self.scale).view_as(made)


@dataclass(frozen=True, slots=True)
class Own:
    """What a layer makes of x and its values, normed."""

    gate: Product
    out: Product
    norm: Norm

    def __call__(self, x: Tensor, values: Tensor) -> Tensor:
        gated = F.gelu(self.gate(x).float(), approximate="tanh").to(x.dtype) * values
        return self.norm(self.out(gated))


@dataclass(frozen=True, slots=True)
class Beside:
    """Experts beside an MLP that all tokens go through: each norms x for itself, and is normed behind it."""

    experts: Experts
    router: Tensor  # [experts, hidden] in the type of computation
    shares: Tensor  # float32 [experts], of each expert
    gate_up: tuple[Weight, ...]  # [experts, 2 * size, hidden], or gate and up apart
    down: Weight
    shared: Product
    norms: tuple[Norm, ...]  # in front of the router, the experts, the MLP
    behind: tuple[Norm, ...]  # the experts, the MLP

    def __call__(self, x: Tensor) -> Tensor:
        routed, mixed, own = (norm(x) for norm in self.norms)
        to = ops.routed(ops.matmul(routed, Dense(self.router)), self.experts)
        to = replace(to, shares=to.shares * self.shares[to.owners[to.places.long()].long()])
        parts = [ops.grouped_matmul(mixed, part, to.starts, to.tokens) for part in self.gate_up]
        inner = ops.gated(parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1), "gelu_tanh")
        y = ops.combined(ops.grouped_matmul(inner, self.down, to.starts), to, x.dtype)
        return self.behind[0](y) + self.behind[1](self.shared(own))


def with_normed_values(qkv: Tensor, h: Heads) -> Tensor:
    """qkv with each head of v normed, without weights."""
    width = h.kv_heads * h.head_dim
    v = torch.unflatten(qkv[:, -width:], -1, (h.kv_heads, h.head_dim)).contiguous()
    normed = ops.rms_norm(v, torch.ones(h.head_dim, dtype=torch.float32, device=v.device), h.eps)
    return torch.cat((qkv[:, :-width], normed.flatten(1)), dim=-1)


def attend_others(
    q: Tensor, q_norm: Tensor | None, cos_sin: Tensor, batch: Batch, k_cache: Tensor, v_cache: Tensor, h: Heads
) -> Tensor:
    """Queries q [T, heads * head_dim], normed and turned, over what another layer has kept."""
    alone = replace(h, kv_heads=0)
    turned = ops.rope_and_cache(q, q_norm, q_norm, cos_sin, batch, k_cache[:, :, :0], v_cache[:, :, :0], alone)
    return ops.paged_attention(turned, k_cache, v_cache, batch, h)
