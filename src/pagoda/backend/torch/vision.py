"""Vision encoders in PyTorch: one image at a time, from pixels to the vectors of its tokens."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pagoda.arch.memory import VISION_TILE, most_patches
from pagoda.arch.vision_spec import Vision
from pagoda.backend.torch.batch import Seen
from pagoda.backend.torch.norms import LayerNorm, RmsNorm
from pagoda.backend.vision import (
    WHOLE_S,
    Encoded,
    Layout,
    cubic_shares,
    grid_taps,
    in_one_go,
    layout,
    patch_bytes,
    vectors_taken,
)
from pagoda.types import Image, Int32, PlannedImage

Norm = LayerNorm | RmsNorm
T = TypeVar("T")
Pieces = Generator[None, None, T]
"""Work that can be left between its pieces, and what it gives in the end."""


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix [out, in] and its bias, in the type of computation: encoders are not quantized."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class VisionLayer:
    attn_norm: Norm
    qkv: Product
    o: Product
    mlp_norm: Norm
    gate: Product | None
    up: Product
    down: Product
    activation: Callable[[Tensor], Tensor]
    attn_scale: Tensor | None = None  # of what is added
    mlp_scale: Tensor | None = None

    def mlp(self, x: Tensor) -> Pieces[Tensor]:
        """By tiles: its inner values are the widest of all."""
        out = []
        for tile in torch.split(x, VISION_TILE):
            yield
            out.append(self._tile(tile))
        return torch.cat(out)

    def _tile(self, x: Tensor) -> Tensor:
        x = self.mlp_norm(x)
        up = self.up(x)
        if self.gate is not None:
            return scaled(self.down(self.activation(self.gate(x)) * up), self.mlp_scale)
        return scaled(self.down(self.activation(up)), self.mlp_scale)


@dataclass(frozen=True, slots=True)
class Merger:
    """Patches [N, hidden] to the vectors of tokens; the norm is of each patch, or of all that become a token."""

    norm: Norm | None
    down: Product
    size: int
    up: Product | None = None  # None where the patches are averaged, or one product makes a vector of them
    first: Product | None = None
    mean_norm: Norm | None = None
    middle: Callable[[Tensor], Tensor] | None = None  # what stands between `first` and a gated MLP
    gate: Product | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.norm is None:
            x = x.view(-1, self.size)
        else:
            wide = self.norm.weight.shape[0] == self.size
            x = self.norm(x.view(-1, self.size)) if wide else self.norm(x).view(-1, self.size)
        if self.mean_norm is not None:
            mean = x.view(len(x), -1, len(self.mean_norm.weight)).float().mean(1)
            x = self.mean_norm(mean).to(x.dtype)
        if self.first is not None:
            x = self.first(x)
        if self.middle is not None and self.gate is not None and self.up is not None:
            x = self.middle(x)
            return self.down(F.silu(self.gate(x)) * self.up(x))
        return self.down(x if self.up is None else F.gelu(self.up(x)))


@dataclass(frozen=True, slots=True)
class Segments:
    """Segments of one length that attention goes over at once: their patches, one segment after the other."""

    rows: Tensor | slice
    count: int
    length: int


@dataclass(frozen=True, slots=True)
class Places:
    """A Layout on the device."""

    cos: Tensor  # float32 [N, 1, head size / 2]
    sin: Tensor
    frames: tuple[Segments, ...]
    windows: tuple[Segments, ...]


@dataclass(frozen=True, slots=True)
class VisionEncoder:
    vision: Vision
    patch: Product
    layers: tuple[VisionLayer, ...]
    positions: Tensor | None  # [side²,  hidden] of a table that is spread over the picture
    merger: Merger
    deep: tuple[Merger, ...]
    first_norm: Norm | None = None

    @property
    def device(self) -> torch.device:
        return self.patch.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.patch.weight.dtype

    def encode(self, image: Image) -> Tensor:
        """The vectors that stand for an image, those of a token [tokens, ...] side by side; they depend on it alone."""
        return in_one_go(self.begin(image))

    def begin(self, image: Image) -> Callable[[float], Tensor | None]:
        """The same in pieces: what is given does some of them, for about so many seconds."""
        pieces = self._pieces(image)

        @torch.inference_mode()
        def go_on(most_s: float) -> Tensor | None:
            end = time.monotonic() + most_s
            try:
                while True:
                    next(pieces)
                    if self.device.type == "cuda" and most_s < WHOLE_S:
                        torch.cuda.synchronize(self.device)  # else it is queued, and nobody knows for how long
                    if time.monotonic() >= end:
                        return None
            except StopIteration as stop:
                vectors: Tensor = stop.value
                return vectors

        return go_on

    def _pieces(self, image: Image) -> Pieces[Tensor]:
        v, laid = self.vision, layout(image.grid, self.vision)
        places = placed(laid, v, self.device)
        x = yield from self._embedded(image, laid)
        deep: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            seen = yield from self._attend(layer, x, places, places.frames if v.sees_all(i) else places.windows)
            x = x + scaled(layer.o(seen), layer.attn_scale)
            yield
            x = x + (yield from layer.mlp(x))
            if i in v.deep_layers:
                yield
                deep.append(self.deep[len(deep)](x))
        yield
        vectors = torch.cat([self.merger(x[: laid.patches]), *deep], dim=-1)
        return torch.empty_like(vectors).index_copy_(0, torch.from_numpy(laid.order).to(self.device), vectors)

    def _embedded(self, image: Image, laid: Layout) -> Pieces[Tensor]:
        """The patches in the order of the layout, normalized and multiplied; bytes travel, not floats."""
        v = self.vision
        stored = patch_bytes(image, v).reshape(len(laid.order), -1)[laid.order].reshape(-1, 3, v.patch_values // 3)
        mean, std = (torch.tensor(x, device=self.device).unsqueeze(-1) * 255 for x in (v.mean, v.std))
        taps, shares = self._taps(image, laid)
        out = []
        for i, tile in enumerate(torch.split(torch.from_numpy(stored).to(self.device), VISION_TILE)):
            yield
            x = self.patch(((tile.float() - mean) / std).flatten(1).to(self.dtype))
            if self.positions is not None and taps:
                x = x + (self.positions[taps[i]].float() * shares[i].unsqueeze(-1)).sum(1).to(self.dtype)
            out.append(x if self.first_norm is None else self.first_norm(x))
        if v.class_token and self.positions is not None:
            last = self.positions[-1:]
            out.append(last if self.first_norm is None else self.first_norm(last))
        x = torch.cat(out)
        return x + self._cubic(image, laid) if v.grid == "cubic" else x

    def _cubic(self, image: Image, laid: Layout) -> Tensor:
        """See cubic_positions."""
        side, (_, height, width) = self.vision.grid_side, image.grid
        table = torch.zeros(0) if self.positions is None else self.positions.float()
        rows, columns = (torch.from_numpy(cubic_shares(n, side)).to(self.device) for n in (height, width))
        spread = columns @ (rows @ table.view(side, -1)).view(height, side, -1)
        row, column = (torch.from_numpy(at).to(self.device).long() for at in laid.places[1:])
        return spread[row, column].to(self.dtype)

    def _taps(self, image: Image, laid: Layout) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """See grid_taps, by tiles."""
        if self.positions is None or self.vision.grid == "cubic":
            return (), ()
        both = (torch.from_numpy(each).to(self.device) for each in grid_taps(laid, image.grid, self.vision.grid_side))
        taps, shares = (torch.split(each, VISION_TILE) for each in both)
        return taps, shares

    def _attend(self, layer: VisionLayer, x: Tensor, places: Places, segments: Iterable[Segments]) -> Pieces[Tensor]:
        """Each patch over those of its segment."""
        qkv = yield from self._heads(layer, x, places)
        out = torch.empty_like(qkv[0])
        for s in segments:
            q, k, v = (torch.unflatten(y[s.rows], 0, (s.count, s.length)).transpose(1, 2) for y in qkv)
            seen = []
            for tile in torch.split(q, VISION_TILE, dim=2):
                yield
                seen.append(F.scaled_dot_product_attention(tile, k, v, scale=self.vision.head_dim**-0.5))
            out[s.rows] = torch.cat(seen, dim=2).transpose(1, 2).flatten(0, 1)
        return out.flatten(1)

    def _heads(self, layer: VisionLayer, x: Tensor, places: Places) -> Pieces[Tensor]:
        """Queries, keys and values [3, N, heads, head size], turned; by tiles, for what is in float32 on the way."""
        heads, size = self.vision.heads, self.vision.head_dim
        out = x.new_empty(3, len(x), heads, size)
        for first in range(0, len(x), VISION_TILE):
            yield
            tile = slice(first, first + VISION_TILE)
            q, k, v = torch.unflatten(layer.qkv(layer.attn_norm(x[tile])), -1, (3, heads, size)).unbind(1)
            if self.vision.rope:
                cos, sin = places.cos[tile], places.sin[tile]
                q, k = turned(q, cos, sin), turned(k, cos, sin)
            out[0, tile], out[1, tile], out[2, tile] = q, k, v
        return out


def scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads [N, heads, head size] with their pairs (i, i + head size / 2) turned, computed in float32."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def placed(laid: Layout, vision: Vision, device: torch.device) -> Places:
    cos, sin = (torch.from_numpy(table).to(device).unsqueeze(1) for table in laid.turns(vision))
    frames = tuple(by_length(laid.frames, device))
    return Places(cos, sin, frames, frames if laid.windows is laid.frames else tuple(by_length(laid.windows, device)))


def by_length(starts: Int32, device: torch.device) -> Iterator[Segments]:
    """Segments of one length together, as many as have VISION_TILE patches, or one."""
    lengths = np.diff(starts)
    for length in np.unique(lengths).tolist():
        firsts, most = starts[:-1][lengths == length], max(1, VISION_TILE // length)
        for begin in range(0, len(firsts), most):
            some = firsts[begin : begin + most]
            alone = slice(int(some[0]), int(some[0]) + length)
            rows = torch.from_numpy((some[:, None] + np.arange(length)).ravel()).to(device)
            yield Segments(alone if len(some) == 1 else rows, len(some), length)


class Sight:
    """An encoder, and what it made of the images that came lately."""

    def __init__(self, encoder: VisionEncoder, most_bytes: int) -> None:
        self.encoder = encoder
        self._encoded: Encoded[Tensor] = Encoded(most_bytes, encoder.begin)

    def ready(self, image: Image, most_s: float) -> bool:
        return self._encoded.ready(image, most_s)

    def seen(self, parts: Iterable[PlannedImage]) -> Seen:
        """The vectors that take the place of embeddings in a step, and the rows that do."""
        found: list[tuple[slice | Tensor, Tensor]] = []
        for part in parts:
            vectors = self._encoded.vectors(part.image)
            rows, which = vectors_taken(part, self.encoder.vision)
            if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
                found.append((slice(rows[0], rows[-1] + 1), vectors[which[0] : which[-1] + 1]))
            elif len(rows):
                found.append((torch.from_numpy(rows).to(vectors.device), vectors[which[0] : which[-1] + 1]))
        return tuple(found)

    def try_largest(self, max_model_len: int) -> int:
        """Encode a picture as large as memory is set aside for; what its vectors take is what is kept at most."""
        vision = self.encoder.vision
        merge = vision.merge_size
        side = math.isqrt(most_patches(vision, max_model_len)) // merge * merge
        pixels = bytes(side * side * vision.patch_size**2 * 3)
        image = Image(start=0, tokens=side * side // merge**2, grid=(1, side, side), pixels=pixels, digest=b"")
        return self.encoder.encode(image).nbytes

    def clear(self) -> None:
        self._encoded.clear()
