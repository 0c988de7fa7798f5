"""The vision encoder of Qwen's models in PyTorch: one image at a time, from pixels to the vectors of its tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pagoda.arch.memory import MOST_IMAGE_TOKENS, VISION_TILE
from pagoda.arch.spec import Vision
from pagoda.backend.torch.batch import Seen
from pagoda.backend.torch.norms import LayerNorm, RmsNorm
from pagoda.backend.vision import Encoded, Layout, layout, patch_bytes
from pagoda.types import Image, Int32, PlannedImage

Norm = LayerNorm | RmsNorm


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

    def mlp(self, x: Tensor) -> Tensor:
        """By tiles: its inner values are the widest of all."""
        return torch.cat([self._tile(tile) for tile in torch.split(x, VISION_TILE)])

    def _tile(self, x: Tensor) -> Tensor:
        x = self.mlp_norm(x)
        up = self.up(x)
        return self.down(up * torch.sigmoid(1.702 * up) if self.gate is None else F.silu(self.gate(x)) * up)


@dataclass(frozen=True, slots=True)
class Places:
    """A Layout on the device. `segments`: rows [count, length] of segments of one length, for each of the lengths."""

    cos: Tensor  # float32 [N, 1, head size / 2]
    sin: Tensor
    frames: tuple[Tensor, ...]
    windows: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class VisionEncoder:
    vision: Vision
    patch: Product
    layers: tuple[VisionLayer, ...]
    merge_norm: Norm
    merge_up: Product
    merge_down: Product

    @property
    def device(self) -> torch.device:
        return self.patch.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.patch.weight.dtype

    def encode(self, image: Image) -> Tensor:
        """The vectors [tokens, hidden size of the model] that stand for an image; they depend on it alone."""
        v, laid = self.vision, layout(image.grid, self.vision)
        places = placed(laid, self.device)
        x = self.patch(self._patches(image, laid))
        for i, layer in enumerate(self.layers):
            x = x + layer.o(self._attend(layer, x, places, places.frames if v.sees_all(i) else places.windows))
            x = x + layer.mlp(x)
        merged = self.merge_norm(x).view(-1, v.merged_size)
        vectors = self.merge_down(F.gelu(self.merge_up(merged)))
        return torch.empty_like(vectors).index_copy_(0, torch.from_numpy(laid.order).to(self.device), vectors)

    def _patches(self, image: Image, laid: Layout) -> Tensor:
        """Normalized patches [N, patch values] in the order of the layout; bytes travel, not floats."""
        v = self.vision
        stored = patch_bytes(image, v).reshape(len(laid.order), -1)[laid.order].reshape(-1, 3, v.patch_values // 3)
        mean, std = (torch.tensor(x, device=self.device).unsqueeze(-1) * 255 for x in (v.mean, v.std))
        values = (torch.from_numpy(stored).to(self.device).float() - mean) / std
        return values.flatten(1).to(self.dtype)

    def _attend(self, layer: VisionLayer, x: Tensor, places: Places, segments: Iterable[Tensor]) -> Tensor:
        """Each patch over those of its segment."""
        heads, size = self.vision.heads, self.vision.head_dim
        q, k, v = torch.unflatten(layer.qkv(layer.attn_norm(x)), -1, (3, heads, size)).unbind(1)
        q, k = turned(q, places), turned(k, places)
        out = torch.empty_like(q)
        for rows in segments:
            own = [torch.unflatten(y[rows.flatten()], 0, rows.shape).transpose(1, 2) for y in (q, k, v)]
            seen = F.scaled_dot_product_attention(own[0], own[1], own[2], scale=size**-0.5)
            out[rows.flatten()] = seen.transpose(1, 2).flatten(0, 1)
        return out.flatten(1)


def turned(x: Tensor, places: Places) -> Tensor:
    """Heads [N, heads, head size] with their pairs (i, i + head size / 2) turned, computed in float32."""
    first, second = x.float().chunk(2, dim=-1)
    both = (first * places.cos - second * places.sin, second * places.cos + first * places.sin)
    return torch.cat(both, dim=-1).to(x.dtype)


def placed(laid: Layout, device: torch.device) -> Places:
    cos, sin = (torch.from_numpy(table).to(device).unsqueeze(1) for table in (laid.cos, laid.sin))
    frames = by_length(laid.frames, device)
    return Places(cos, sin, frames, frames if laid.windows is laid.frames else by_length(laid.windows, device))


def by_length(starts: Int32, device: torch.device) -> tuple[Tensor, ...]:
    """The rows of segments, those of one length together."""
    lengths = np.diff(starts)
    firsts = {int(n): starts[:-1][lengths == n] for n in np.unique(lengths)}
    return tuple(torch.from_numpy(first[:, None] + np.arange(n)).to(device) for n, first in firsts.items())


class Sight:
    """An encoder, and what it made of the images that came lately."""

    def __init__(self, encoder: VisionEncoder, most_bytes: int) -> None:
        self.encoder = encoder
        self._encoded: Encoded[Tensor] = Encoded(most_bytes)

    def seen(self, parts: Iterable[PlannedImage]) -> Seen:
        """The vectors that take the place of embeddings in a step, and the first row of each run of them."""
        found = []
        for part in parts:
            vectors = self._encoded.vectors(part.image, self.encoder.encode)
            found.append((part.row, vectors[part.first : part.first + part.count]))
        return tuple(found)

    def try_largest(self, max_model_len: int) -> int:
        """Encode a picture as large as memory is set aside for; what its vectors take is what is kept at most."""
        merge = self.encoder.vision.merge_size
        side = math.isqrt(min(max_model_len, MOST_IMAGE_TOKENS)) * merge
        pixels = bytes(side * side * self.encoder.vision.patch_size**2 * 3)
        image = Image(start=0, tokens=side * side // merge**2, grid=(1, side, side), pixels=pixels, digest=b"")
        return self.encoder.encode(image).nbytes

    def clear(self) -> None:
        self._encoded.clear()
