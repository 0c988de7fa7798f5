"""Encoders (BERT, arXiv 1810.04805) in PyTorch: every token attends to all of its request, which is whole in a step."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from pagoda.arch.spec import Attention, ModelSpec
from pagoda.backend.base import Progress
from pagoda.backend.torch.batch import Batch
from pagoda.backend.torch.load import Loader
from pagoda.backend.torch.model import KvCache, Linear, PlainMlp
from pagoda.backend.torch.norms import Norm
from pagoda.errors import ModelError

_SHORTEST = 16


@dataclass(frozen=True, slots=True)
class EncoderLayer:
    attention: Attention
    qkv: Linear
    o: Linear
    attn_norm: Norm
    mlp: PlainMlp
    mlp_norm: Norm


@dataclass(frozen=True, slots=True)
class Padded:
    """Requests of similar length as one rectangle. The length depends on the request's own, so its bits do too."""

    rows: Tensor  # int64 [requests * length], the token at each place; of padding the first of its request
    real: Tensor  # bool [requests, length]
    whole: bool  # no place is padding

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor) -> None:
        """q, k, v and out [T, heads, head_dim]; fills the requests' rows of `out`."""
        q, k, v = (torch.unflatten(x[self.rows], 0, self.real.shape).transpose(1, 2) for x in (q, k, v))
        mask = None if self.whole else self.real[:, None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2).flatten(0, 1)
        real = self.real.flatten()
        out[self.rows[real]] = y[real]


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
    embed: Tensor
    positions: Tensor
    types: Tensor
    norm: Norm
    layers: tuple[EncoderLayer, ...]
    caches: list[KvCache] = field(default_factory=list)

    def hidden(self, batch: Batch) -> Tensor:
        """The final hidden states of the rows of a batch, [L, hidden]."""
        x = self.norm(self._embedded(batch))
        rectangles = padded(batch.starts.tolist(), x.device)
        for layer in self.layers:
            a = layer.attention
            q, k, v = torch.unflatten(layer.qkv(x), -1, (3, a.heads, a.head_dim)).unbind(1)
            seen = torch.empty_like(q)
            for one in rectangles:
                one.attend(q, k, v, a.scale, seen)
            x = layer.attn_norm(x + layer.o(seen.flatten(1)))
            x = layer.mlp_norm(x + layer.mlp(x))
        return x[batch.rows]

    def logits(self, hidden: Tensor) -> Tensor:
        raise ModelError("an encoder gives vectors and scores, no tokens")

    def _embedded(self, batch: Batch) -> Tensor:
        """Word, position and type of each token, added up."""
        first = 0 if self.spec.encoder is None else self.spec.encoder.first_position
        kinds = torch.zeros_like(batch.tokens) if batch.types is None else batch.types
        places, kinds = self.positions[batch.positions + first], self.types[kinds.clamp_max(len(self.types) - 1)]
        return self.embed[batch.tokens] + places + kinds


class EncoderLoader(Loader):
    """Sends an encoder to the device, one matrix after the other: they are small."""

    def encoder(self, progress: Progress | None) -> Encoder:
        layers = []
        for index, layer in enumerate(self._spec.layers):
            p = f"layers.{index}."
            layers.append(
                EncoderLayer(
                    attention=layer.attention,
                    qkv=self._linear(p + "q", p + "k", p + "v"),
                    o=self._linear(p + "o"),
                    attn_norm=self._norm(p + "attn_norm"),
                    mlp=self._plain_mlp(p, layer.mlp),
                    mlp_norm=self._norm(p + "mlp_norm"),
                )
            )
            if progress:
                progress("weights", (index + 1) / len(self._spec.layers))
        embed, positions, types = map(self._table, ("embed", "positions", "types"))
        return Encoder(self._spec, embed, positions, types, self._norm("norm"), tuple(layers))
