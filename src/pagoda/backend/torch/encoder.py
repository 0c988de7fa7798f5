"""Encoders (BERT, arXiv 1810.04805) in PyTorch: every token attends to all of its request, which is whole in a step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from pagoda.arch.spec import Attention, Layer, Mlp, ModelSpec, Norms
from pagoda.backend.base import Progress
from pagoda.backend.torch import ops
from pagoda.backend.torch.batch import Batch
from pagoda.backend.torch.load import Loader
from pagoda.backend.torch.model import KvCache, Linear, Table
from pagoda.backend.torch.norms import Norm
from pagoda.errors import ModelError

_SHORTEST = 16


@dataclass(frozen=True, slots=True)
class ExactGeluMlp:
    """A gated one whose gate goes through the exact form of gelu, which only encoders have."""

    gate_up: Linear
    down: Linear

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.gelu(gate) * up)


@dataclass(frozen=True, slots=True)
class EncoderLayer:
    attention: Attention
    norms: Norms
    qkv: Linear
    q_norm: Norm
    k_norm: Norm
    o: Linear
    attn_norm: Norm
    attn_post_norm: Norm
    mlp: Callable[[Tensor], Tensor]
    mlp_norm: Norm
    mlp_post_norm: Norm

    def __call__(self, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """`attend` makes of the products q, k and v what goes into the product o."""
        if self.norms == "sum":
            x = self.attn_norm(x + self.o(attend(self.qkv(x))))
            return self.mlp_norm(x + self.mlp(x))
        x = x + self.attn_post_norm(self.o(attend(self.qkv(self.attn_norm(x)))))
        return x + self.mlp_post_norm(self.mlp(self.mlp_norm(x)))


@dataclass(frozen=True, slots=True)
class Padded:
    """Requests of similar length as one rectangle. The length depends on the request's own, so its bits do too."""

    rows: Tensor  # int64 [requests * length], the token at each place; of padding the first of its request
    real: Tensor  # bool [requests, length]
    whole: bool  # no place is padding

    def attend(self, q: Tensor, k: Tensor, v: Tensor, a: Attention, out: Tensor) -> None:
        """q and out [T, heads, head_dim], k and v [T, kv_heads, head_dim]; fills the requests' rows of `out`."""
        q, k, v = (torch.unflatten(x[self.rows], 0, self.real.shape).transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(a.heads // a.kv_heads, dim=1) for x in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self._seen(a.window), scale=a.scale)
        real = self.real.flatten()
        out[self.rows[real]] = y.transpose(1, 2).flatten(0, 1)[real]

    def _seen(self, window: int | None) -> Tensor | None:
        """Which keys each query sees; None for all."""
        length = self.real.shape[1]
        if window is None or window >= length:
            return None if self.whole else self.real[:, None, None, :]
        places = torch.arange(length, device=self.real.device)
        near = (places - places[:, None]).abs() < window
        return near & self.real[:, None, None, :]


def padded(starts: list[int], device: torch.device) -> list[Padded]:
    """The requests of a step by their length, rounded up to a power of two."""
    by_length: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for first, last in pairwise(starts):
        if last > first:
            by_length[max(_SHORTEST, 1 << (last - first - 1).bit_length())].append((first, last - first))
    return [_rectangle(length, torch.tensor(spans, device=device)) for length, spans in by_length.items()]


def _rectangle(length: int, spans: Tensor) -> Padded:
    places = torch.arange(length, device=spans.device)
    real = places < spans[:, 1:]
    rows = (spans[:, :1] + torch.where(real, places, 0)).flatten()
    return Padded(rows, real, bool(real.all()))


@dataclass(slots=True)
class Encoder:
    """All weights of an encoder. It keeps nothing between steps: `caches` stays empty."""

    spec: ModelSpec
    embed: Table
    positions: Tensor | None
    types: Tensor | None
    embed_norm: Norm
    norm: Norm
    layers: tuple[EncoderLayer, ...]
    cos_sin: tuple[Tensor, ...]  # float32 [positions, rope dim], of each rope
    caches: list[KvCache] = field(default_factory=list)

    def hidden(self, batch: Batch) -> Tensor:
        """The final hidden states of the rows of a batch, [L, hidden]."""
        x = self.embed_norm(self._embedded(batch))
        rectangles = padded(batch.starts.tolist(), x.device)
        turns = [table[batch.positions].unsqueeze(1) for table in self.cos_sin]
        for layer in self.layers:
            x = layer(x, partial(self._attended, layer, turns, rectangles))
        return self.norm(x[batch.rows])

    def logits(self, hidden: Tensor) -> Tensor:
        raise ModelError("an encoder gives vectors and scores, no tokens")

    def _attended(self, layer: EncoderLayer, turns: list[Tensor], rectangles: list[Padded], qkv: Tensor) -> Tensor:
        a = layer.attention
        q, k, v = torch.split(torch.unflatten(qkv, -1, (-1, a.head_dim)), [a.heads, a.kv_heads, a.kv_heads], dim=1)
        q, k = layer.q_norm(q.contiguous()), layer.k_norm(k.contiguous())
        if a.rope:
            q, k = (ops.rotate(x, turns[a.local], self.spec.rope.interleaved) for x in (q, k))
        seen = torch.empty_like(q)
        for one in rectangles:
            one.attend(q, k, v, a, seen)
        return seen.flatten(1)

    def _embedded(self, batch: Batch) -> Tensor:
        """Word, position and type of each token, added up."""
        x = self.embed.rows(batch.tokens)
        if self.positions is not None:
            first = 0 if self.spec.encoder is None else self.spec.encoder.first_position
            x = x + self.positions[batch.positions + first]
        if self.types is not None:
            kinds = torch.zeros_like(batch.tokens) if batch.types is None else batch.types
            x = x + self.types[kinds.clamp_max(len(self.types) - 1)]
        return x


class EncoderLoader(Loader):
    """Sends an encoder to the device, one matrix after the other: they are small."""

    def encoder(self, max_model_len: int, progress: Progress | None) -> Encoder:
        spec, layers = self._spec, []
        for index, layer in enumerate(spec.layers):
            layers.append(self._encoder_layer(f"layers.{index}.", layer))
            if progress:
                progress("weights", (index + 1) / len(spec.layers))
        positions, types = (self._table(name) if name in self._tensors else None for name in ("positions", "types"))
        words, tables = Table(self._table("embed"), spec.embed_scale), self._turns(max_model_len)
        ends = self._norm("embed_norm"), self._norm("norm")
        return Encoder(spec, words, positions, types, *ends, tuple(layers), tables)

    def _encoder_layer(self, p: str, layer: Layer) -> EncoderLayer:
        return EncoderLayer(
            attention=layer.attention,
            norms=layer.norms,
            qkv=self._linear(p + "q", p + "k", p + "v"),
            q_norm=self._norm(p + "q_norm"),
            k_norm=self._norm(p + "k_norm"),
            o=self._linear(p + "o"),
            attn_norm=self._norm(p + "attn_norm"),
            attn_post_norm=self._norm(p + "attn_post_norm"),
            mlp=self._encoder_mlp(p, layer.mlp),
            mlp_norm=self._norm(p + "mlp_norm"),
            mlp_post_norm=self._norm(p + "mlp_post_norm"),
        )

    def _encoder_mlp(self, p: str, mlp: Mlp) -> Callable[[Tensor], Tensor]:
        if mlp.gated and mlp.activation == "gelu":
            return ExactGeluMlp(self._linear(p + "gate", p + "up"), self._linear(p + "down"))
        return self._mlp(p, mlp)
