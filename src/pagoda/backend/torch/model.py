"""The decoder as the device runs it: the weights of a spec, and one pass from tokens to logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pagoda.arch.spec import Experts, ModelSpec
from pagoda.backend.torch import ops
from pagoda.backend.torch.adapters import Adapted, Adapters
from pagoda.backend.torch.batch import Batch, Heads, Routed, Seen
from pagoda.backend.torch.delta import Convolution, Delta, StateSpace
from pagoda.backend.torch.latent import LatentAttention
from pagoda.backend.torch.norms import Norm, RmsNorm
from pagoda.backend.torch.own import LayerValues, Own, attend_others, with_normed_values
from pagoda.backend.torch.packs import Dense, Weight
from pagoda.backend.torch.vision import Sight

KvCache = tuple[Tensor, Tensor]
"""Keys and values of one layer, each [num_blocks, BLOCK_SIZE, kv_heads, head_dim]; of a delta net its States."""
Block = Callable[[Tensor], Tensor]


class Embedding(Protocol):
    """Gives the vectors of tokens [T, hidden], those of images in their places."""

    def __call__(self, tokens: Tensor, seen: Seen) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Table:
    data: Tensor  # [vocab, hidden] in the type of computation
    scale: float = 1.0

    def rows(self, tokens: Tensor) -> Tensor:
        rows = self.data[tokens]
        return rows if self.scale == 1 else rows * self.scale

    def __call__(self, tokens: Tensor, seen: Seen) -> Tensor:
        return with_seen(self.rows(tokens), seen)


def with_seen(rows: Tensor, seen: Seen) -> Tensor:
    """With the vectors of images in their places; where a token has several, wide enough for all."""
    if seen:
        rows = F.pad(rows, (0, seen[0][1].shape[1] - rows.shape[1]))
    for places, vectors in seen:
        rows[places] = vectors
    return rows


@dataclass(frozen=True, slots=True)
class Linear:
    """Matrices that share an input, their outputs side by side: one where they are stored alike."""

    parts: tuple[Weight, ...]
    bias: Tensor | None = None
    adapted: Adapted | None = None

    def __call__(self, x: Tensor) -> Tensor:
        y = self._own(x)
        if self.adapted is not None and self.adapted.now:
            self.adapted.add(x, y)
        return y

    def _own(self, x: Tensor) -> Tensor:
        if len(self.parts) == 1:
            return ops.matmul(x, self.parts[0], self.bias)
        y = torch.cat([ops.matmul(x, part) for part in self.parts], dim=-1)
        return y if self.bias is None else y + self.bias

    @property
    def _plain(self) -> bool:
        return len(self.parts) == 1 and self.bias is None and not (self.adapted is not None and self.adapted.now)

    def has_coded_inputs(self, x: Tensor) -> bool:
        """Whether `gated` makes codes at once of as many rows."""
        return self._plain and ops.has_coded_inputs(x, self.parts[0])

    def gated(self, gate_up: Tensor, activation: str) -> Tensor:
        """The product with an activation of the first half of gate_up times the second."""
        if self._plain:
            return ops.gated_product(gate_up, activation, self.parts[0])
        return self(ops.gated(gate_up, activation))

    def behind(self, x: Tensor, residual: Tensor, norm: Norm, *, gated: bool = False) -> tuple[Tensor, Tensor]:
        """The product with x + residual, normed (`gated`: silu(gate) * up of it), and that sum."""
        if self._plain and isinstance(norm, RmsNorm):
            return ops.norm_matmul(x, residual, norm.weight, norm.eps, self.parts[0], gate=gated)
        normed, total = norm.of_sum(x, residual)
        y = self(normed)
        return (ops.gated(y, "silu") if gated else y), total


@dataclass(frozen=True, slots=True)
class GatedMlp:
    gate_up: Linear
    down: Linear
    gelu: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        return self.down.gated(self.gate_up(x), "gelu_tanh" if self.gelu else "silu")

    def behind(self, x: Tensor, residual: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
        """What it makes of x + residual, normed, and that sum."""
        if self.gelu or self.down.has_coded_inputs(x):
            gate_up, total = self.gate_up.behind(x, residual, norm)
            return self.down.gated(gate_up, "gelu_tanh" if self.gelu else "silu"), total
        hidden, total = self.gate_up.behind(x, residual, norm, gated=True)
        return self.down(hidden), total


@dataclass(frozen=True, slots=True)
class PlainMlp:
    """One without a gate."""

    up: Linear
    down: Linear
    activation: str

    def __call__(self, x: Tensor) -> Tensor:
        y = self.up(x)
        if self.activation == "relu2":
            return self.down(F.relu(y).square())
        return self.down(F.gelu(y, approximate="tanh" if self.activation == "gelu_tanh" else "none"))


@dataclass(frozen=True, slots=True)
class ExpertBiases:
    """Of a mixture whose experts have them, and `clamped_swiglu` in place of silu."""

    router: Tensor  # [experts]
    gate_up: Tensor  # [experts, 2 * size]
    down: Tensor  # [experts, hidden]; 0 but on the first of several GPUs


@dataclass(frozen=True, slots=True)
class Mixture:
    """The experts of a layer: tokens sorted by expert, one grouped product for each matrix."""

    experts: Experts
    router: Tensor  # [experts, hidden] in the type of computation
    gate_up: tuple[Weight, ...]  # [experts, 2 * size, hidden], or gate and up apart; or up alone
    down: Weight  # [experts, hidden, size]
    shared: GatedMlp | PlainMlp | None = None
    shared_router: Tensor | None = None  # [1, hidden]
    biases: ExpertBiases | None = None
    choice_bias: Tensor | None = None  # float32 [experts]
    squared: bool = False  # relu2 of up, without a gate

    def __call__(self, x: Tensor) -> Tensor:
        b = self.biases
        logits = ops.matmul(x, Dense(self.router), None if b is None else b.router)
        to = ops.routed(logits, self.experts, self.choice_bias)
        y = ops.grouped_matmul(self._inner(x, to), self.down, to.starts, bias=None if b is None else b.down)
        if self.shared is None:
            return ops.combined(y, to, x.dtype)
        own = self.shared(x).float()
        if self.shared_router is not None:
            own = own * torch.sigmoid(ops.matmul(x, Dense(self.shared_router)).float())
        return (ops.combined(y, to, torch.float32) + own).to(x.dtype)

    def _inner(self, x: Tensor, to: Routed) -> Tensor:
        if self.squared:
            return F.relu(ops.grouped_matmul(x, self.gate_up[0], to.starts, to.tokens)).square()
        bias, activation = (self.biases.gate_up, "clamped_swiglu") if self.biases else (None, "silu")
        if len(self.gate_up) == 1:
            own = self.gate_up[0]
            return ops.grouped_matmul(x, own, to.starts, to.tokens, bias=bias, activation=activation)
        hidden = torch.cat([ops.grouped_matmul(x, part, to.starts, to.tokens) for part in self.gate_up], dim=-1)
        return ops.gated(hidden if bias is None else hidden + bias.index_select(0, to.owners), activation)


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    heads: Heads
    attn_norm: Norm
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Block
    attn_post_norm: Norm
    mlp_norm: Norm | None  # None: the MLP has the attention's input
    beside: bool  # the MLP has what goes into the layer, and not also what its attention gives
    mlp: Block | None
    mlp_post_norm: Norm
    sinks: Tensor | None = None  # float32 [heads]
    delta: Delta | Convolution | StateSpace | None = None
    out_gate: bool = False
    latent: LatentAttention | None = None
    own: Own | None = None
    scale: float = 1.0  # of what the layer gives

    def attention(
        self,
        qkv: Tensor,
        tables: tuple[Tensor, ...],
        batch: Batch,
        cache: KvCache,
        query_scales: Tensor | None = None,
    ) -> Tensor:
        """What the layer makes of the tokens before one, by what it has in place of attention, if it has that."""
        if self.delta is not None:
            return self.attn_post_norm(self.o(self.delta(qkv, cache, batch)))
        if self.latent is not None:
            return self.attn_post_norm(self.o(self.latent(qkv, tables[0], batch, *cache, query_scales)))
        h, gate = self.heads, None
        if self.out_gate:
            width = (h.heads + 2 * h.kv_heads) * h.head_dim
            qkv, gate = qkv[:, :width].contiguous(), qkv[:, width:]
        cos_sin = tables[h.local]
        turned = cos_sin if h.rope else cos_sin[:, :0]
        if not h.keeps:
            out = attend_others(qkv, self.q_norm, turned, batch, *cache, h).flatten(1)
            return self.attn_post_norm(self.o(out))
        qkv = with_normed_values(qkv, h) if h.v_norm else qkv
        if query_scales is None:
            out = ops.attend(qkv, self.q_norm, self.k_norm, turned, batch, *cache, h, self.sinks).flatten(1)
        else:
            q = ops.rope_and_cache(qkv, self.q_norm, self.k_norm, turned, batch, *cache, h)
            q = q * query_scales[batch.positions].to(q.dtype)[:, None, None]
            out = ops.paged_attention(q, *cache, batch, h, self.sinks).flatten(1)
        out = out if gate is None else (out.float() * torch.sigmoid(gate.float())).to(out.dtype)
        return self.attn_post_norm(self.o(out))

    def ended(self, x: Tensor, total: Tensor, values: Tensor | None) -> tuple[Tensor, Tensor]:
        """x and total, whose sum is what the layer gives, with its own values and its scale."""
        if self.own is None and self.scale == 1:
            return x, total
        total = x + total
        if self.own is not None and values is not None:
            total = total + self.own(total, values)
        return torch.zeros_like(total), total * self.scale


@dataclass(frozen=True, slots=True)
class ThreePositions:
    """How tokens turn that have three positions each."""

    axes: Tensor  # int64 [rope dim / 2], which of them turns each pair
    inv_freq: Tensor  # float64 [rope dim / 2]
    factor: float

    def table(self, three: Tensor) -> Tensor:
        """cos and sin, float32 [T, rope dim], of positions int32 [3, T]."""
        angle = three[self.axes].t() * self.inv_freq
        return (torch.cat((angle.cos(), angle.sin()), dim=-1) * self.factor).float()


@dataclass(slots=True)
class Decoder:
    """All weights of a model. `caches` is empty until the executor knows how many blocks fit."""

    spec: ModelSpec
    embed: Embedding
    norm: Norm
    head: Block
    layers: tuple[DecoderLayer, ...]
    cos_sin: tuple[Tensor, ...]  # float32 [positions, rope dim], of each rope
    caches: list[KvCache]
    positions: Tensor | None = None  # [positions, hidden] in the type of computation, where they are learned
    three: ThreePositions | None = None
    sight: Sight | None = None
    query_scales: Tensor | None = None  # float32 [positions]
    adapters: Adapters | None = None
    layer_values: LayerValues | None = None
    begun: Callable[[Batch], Batch] | None = None
    """Gives the prompts of a batch to another kernel."""

    def hidden(self, batch: Batch) -> Tensor:
        """The normed final hidden states of the rows of a batch, [L, hidden]."""
        batch = ops.prepared(batch if self.begun is None else self.begun(batch))
        if self.adapters is not None:
            self.adapters.rows = batch.adapters
        total = self.embed(batch.tokens, batch.seen)
        if self.positions is not None:
            total = total + self.positions[batch.positions]
        cos_sin, batch = self._turns(batch)
        total, *deep = torch.split(total, self.spec.hidden_size, dim=-1)
        total = total.contiguous()
        x = torch.zeros_like(total)
        values = None if self.layer_values is None else self.layer_values(total, batch.tokens)
        for i, (layer, cache) in enumerate(zip(self.layers, self.caches, strict=True)):
            if 0 < i <= len(deep):
                x = x + deep[i - 1]
            if layer.mlp is not None and (layer.beside or layer.mlp_norm is None):
                normed, total = layer.attn_norm.of_sum(x, total)
                seen = layer.attention(layer.qkv(normed), cos_sin, batch, cache, self.query_scales)
                x = seen + layer.mlp(normed if layer.mlp_norm is None else layer.mlp_norm(total))
                continue
            qkv, total = layer.qkv.behind(x, total, layer.attn_norm)
            x = layer.attention(qkv, cos_sin, batch, cache, self.query_scales)
            if layer.mlp is None or layer.mlp_norm is None:
                continue
            if isinstance(layer.mlp, GatedMlp):
                x, total = layer.mlp.behind(x, total, layer.mlp_norm)
            else:
                x, total = layer.mlp_norm.of_sum(x, total)
                x = layer.mlp(x)
            x, total = layer.ended(layer.mlp_post_norm(x), total, None if values is None else values[:, i])
        if not batch.whole:
            x, total = x[batch.rows], total[batch.rows]
        return self.norm.of_sum(x, total)[0]

    def _turns(self, batch: Batch) -> tuple[tuple[Tensor, ...], Batch]:
        """The tables of angles, and the batch whose positions are rows of it."""
        if self.three is None:
            return self.cos_sin, batch
        # a table of this step alone: a video may stand anywhere in time, also beyond the longest context
        own = self.three.table(batch.positions.expand(3, -1) if batch.rope_positions is None else batch.rope_positions)
        return (own,), replace(batch, positions=torch.arange(len(own), dtype=torch.int32, device=own.device))

    def logits(self, hidden: Tensor) -> Tensor:
        """[L, vocab] in the type of computation, from final hidden states."""
        return ops.soft_capped(self.head(hidden), self.spec.logit_soft_cap)
