"""A decoder with random weights of a spec's shapes, made on the device: to measure speed without a checkpoint."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from pagoda.arch.spec import Layer, ModelSpec
from pagoda.backend.torch.model import Decoder, DecoderLayer, GatedMlp, Linear
from pagoda.backend.torch.ops import Heads
from pagoda.backend.torch.packs import F8, FP8, W4, Dense, Weight

Kind = Literal["float", "w4", "fp8"]
GROUP = 128
"""Inputs of a 4-bit group, and rows and columns of an FP8 block: what the public checkpoints have."""


class Maker:
    """Random weights of one kind."""

    def __init__(self, kind: Kind, dtype: torch.dtype, device: torch.device) -> None:
        self._kind, self._dtype, self._device = kind, dtype, device

    def floats(self, *shape: int) -> torch.Tensor:
        """Of the size that keeps hidden states near 1 (matrices: [out, in])."""
        return torch.randn(shape, dtype=self._dtype, device=self._device).mul_(shape[-1] ** -0.5)

    def ones(self, size: int) -> torch.Tensor:
        return torch.ones(size, dtype=torch.float32, device=self._device)

    def matrix(self, rows: int, columns: int) -> Weight:
        if self._kind == "float":
            return Dense(self.floats(rows, columns))
        if self._kind == "w4":
            groups = -(-columns // GROUP)
            codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device=self._device)
            scales = torch.full((groups, rows), 0.2 * columns**-0.5, dtype=self._dtype, device=self._device)
            return W4(codes, scales, torch.full_like(scales, 8.0))
        codes = self.floats(rows, columns).mul_(100).to(FP8)
        blocks = torch.full((-(-rows // GROUP), -(-columns // GROUP)), 0.01, device=self._device)
        return F8(codes, blocks, block=(GROUP, GROUP))

    def layer(self, layer: Layer, spec: ModelSpec) -> DecoderLayer:
        a, hidden = layer.attention, spec.hidden_size
        width = (a.heads + 2 * a.kv_heads) * a.head_dim
        norms = (self.ones(a.head_dim), self.ones(a.head_dim)) if a.qk_norm else (None, None)
        return DecoderLayer(
            heads=Heads(a.heads, a.kv_heads, a.head_dim, a.scale, a.window, spec.norm_eps, spec.rope.interleaved),
            attn_norm=self.ones(hidden),
            qkv=Linear((self.matrix(width, hidden),), self.floats(width) if a.qkv_bias else None),
            q_norm=norms[0],
            k_norm=norms[1],
            o=Linear((self.matrix(hidden, a.heads * a.head_dim),)),
            mlp_norm=self.ones(hidden),
            mlp=GatedMlp(
                Linear((self.matrix(2 * layer.mlp.size, hidden),)), Linear((self.matrix(hidden, layer.mlp.size),))
            ),
        )


def random_decoder(
    spec: ModelSpec, kind: Kind, *, dtype: torch.dtype, device: torch.device, max_model_len: int
) -> Decoder:
    """Embedding and output head are floats in all kinds, as in the public quantized checkpoints."""
    make = Maker(kind, dtype, device)
    embed = make.floats(spec.vocab_size, spec.hidden_size)
    head = embed if spec.tied else make.floats(spec.vocab_size, spec.hidden_size)
    table = torch.from_numpy(np.concatenate(spec.rope.tables(max_model_len), axis=1)).to(device)
    layers = tuple(make.layer(layer, spec) for layer in spec.layers)
    return Decoder(spec, embed, make.ones(spec.hidden_size), Linear((Dense(head),)), layers, table, [])
