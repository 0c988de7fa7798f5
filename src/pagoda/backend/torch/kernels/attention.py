"""Paged attention in Triton: prompts by tiles of queries, single tokens split over their keys and joined in order.

The heads that share a KV head are the rows of one tile, so a key is read once for all of them. The keys of a single
token are cut into runs whose length follows from its context alone, and the parts are joined in the order of the keys:
the answer does not depend on the rest of the batch.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pagoda.backend.torch.batch import Batch, Heads
from pagoda.backend.torch.kernels import launch
from pagoda.backend.torch.kernels.decode import Fresh, run_decode
from pagoda.backend.torch.kernels.launch import block_of
from pagoda.backend.torch.kernels.prefill import run_prefill
from pagoda.backend.torch.kernels.tuning import Tile, choose

_WIDE_SINCE, _NARROW_AGAIN = (9, 0), (12, 0)
_KEY_VALUES = 64 * 128
"""Of a tile of keys, on GPUs whose matrix units take them from registers: all but those between these two."""


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: Batch, shape: Heads, sinks: Tensor | None = None
) -> Tensor:
    """See ops.paged_attention."""
    out = torch.empty_like(q)
    if not len(q) or not len(batch.contexts):
        return out.zero_()
    theirs = batch.prompts is not None and batch.prompts.attend(q, k_cache, v_cache, shape, sinks, out)
    if batch.max_query > 1 and not theirs:
        run_prefill(q, k_cache, v_cache, batch, shape, out, _tile("prefill", q, shape), sinks=sinks)
    # a batch of one prompt has no single tokens
    if batch.max_query == 1 or len(batch.contexts) > 1:
        run_decode(q, k_cache, v_cache, batch, shape, out, _tile("decode", q, shape), sinks=sinks)
    return out


def attend_single(
    qkv: Tensor, fresh: Fresh, k_cache: Tensor, v_cache: Tensor, batch: Batch, shape: Heads, sinks: Tensor | None = None
) -> Tensor:
    """rope_and_cache and paged_attention of a batch of single tokens, in one kernel."""
    out = torch.empty(len(qkv), shape.heads, shape.head_dim, dtype=qkv.dtype, device=qkv.device)
    if not len(qkv) or not len(batch.contexts):
        return out.zero_()
    run_decode(qkv, k_cache, v_cache, batch, shape, out, _tile("decode", qkv, shape), sinks=sinks, fresh=fresh)
    return out


def _tile(kernel: str, q: Tensor, shape: Heads) -> Tile:
    return fitted(choose(kernel), block_of(shape.head_dim), q)


def fitted(tile: Tile, size: int, q: Tensor) -> Tile:
    """The tile cut down until its queries and the keys and values under way fit the shared memory of the GPU."""
    if q.dtype == torch.float32:  # it would not fit the registers
        tile = replace(tile, m=min(tile.m, 32), n=min(tile.n, 32))
    gpu = launch.gpu_of(q.device)
    if gpu.capability < _WIDE_SINCE or gpu.capability >= _NARROW_AGAIN:
        tile = replace(tile, n=min(tile.n, max(32, _KEY_VALUES // size)))
    room = gpu.shared_bytes // (size * q.element_size())
    while tile.m + 2 * tile.n * tile.stages > room:
        if tile.n > 32:
            tile = replace(tile, n=tile.n // 2)
        elif tile.m > 32:
            tile = replace(tile, m=tile.m // 2)
        elif tile.stages > 1:
            tile = replace(tile, stages=tile.stages - 1)
        else:
            break
    return tile
