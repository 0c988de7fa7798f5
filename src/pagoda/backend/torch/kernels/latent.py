"""Latent attention in Triton: all heads of a token over the one key and value that each token keeps."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagoda.backend.torch.batch import Batch, Heads
from pagoda.backend.torch.kernels import fp8, launch
from pagoda.backend.torch.kernels.attention import LOG2_E
from pagoda.backend.torch.kernels.launch import await_others, block_of
from pagoda.types import BLOCK_SIZE

_CELLS = tl.constexpr(BLOCK_SIZE)
_HEADS, _KEYS = 16, 32
"""Heads of a token that a program takes, and keys at a time."""


@triton.jit
def _keep(
    keys: tl.tensor,
    cache: tl.tensor,
    cells: tl.tensor,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    await_others(CHAINED)
    token, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    cell = tl.load(cells + token)
    values = tl.load(keys + token * SIZE + at, mask=at < SIZE, other=0)
    tl.store(cache + cell * SIZE + at, values, mask=(at < SIZE) & (cell >= 0))


@triton.jit
def _attend(
    q: tl.tensor,
    cache: tl.tensor,
    starts: tl.tensor,
    contexts: tl.tensor,
    tables: tl.tensor,
    table_width: tl.tensor,
    out: tl.tensor,
    requests: tl.tensor,
    heads: tl.tensor,
    scale: tl.tensor,
    TURNED: tl.constexpr,
    RANK: tl.constexpr,
    R: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    TILE: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """Some heads of one token over all keys up to its own."""
    await_others(CHAINED)
    SIZE: tl.constexpr = TURNED + RANK
    token, head = tl.program_id(0), tl.program_id(1) * M + tl.arange(0, M)
    each = tl.arange(0, R)
    r = tl.sum((tl.load(starts + each + 1, mask=each < requests, other=2147483647) <= token).to(tl.int32), axis=0)
    if r < requests:
        context = tl.load(contexts + r) - (tl.load(starts + r + 1) - 1 - token)
        d, c, inside = tl.arange(0, D), tl.arange(0, C), (head < heads)[:, None]
        line = (token.to(tl.int64) * heads + head)[:, None]
        first = tl.load(q + line * SIZE + d[None, :], mask=inside & (d < TURNED)[None, :], other=0.0)
        rest = tl.load(q + line * SIZE + TURNED + c[None, :], mask=inside & (c < RANK)[None, :], other=0.0)
        most, total = tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.float32)
        acc, table = tl.zeros((M, C), tl.float32), tables + r.to(tl.int64) * table_width
        for key in range(0, context, TILE):
            at = key + tl.arange(0, TILE)
            known = at < context
            block = tl.load(table + at // _CELLS, mask=known, other=0).to(tl.int64)
            cell = cache + (block * _CELLS + at % _CELLS) * SIZE
            k = tl.load(cell[None, :] + d[:, None], mask=known[None, :] & (d < TURNED)[:, None], other=0.0)
            v = tl.load(cell[:, None] + TURNED + c[None, :], mask=known[:, None] & (c < RANK)[None, :], other=0.0)
            k, v = fp8.floats(k, q.dtype.element_ty), fp8.floats(v, q.dtype.element_ty)
            scores = tl.dot(first, k, input_precision="ieee") + tl.dot(rest, tl.trans(v), input_precision="ieee")
            scores = tl.where(known[None, :], scores * scale, float("-inf"))
            new = tl.maximum(most, tl.max(scores, axis=1))
            weights, keep = tl.exp2(scores - new[:, None]), tl.exp2(most - new)
            acc = tl.dot(weights.to(v.dtype), v, acc * keep[:, None], input_precision="ieee")
            most, total = new, total * keep + tl.sum(weights, axis=1)
        result = (acc / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + line * RANK + c[None, :], result, mask=inside & (c < RANK)[None, :])


def keep(keys: Tensor, cache: Tensor, cells: Tensor) -> None:
    """Keys [T, 1, size], as they are kept, to their cells [cells, 1, size]; none to the cell -1."""
    size, whole = keys.shape[-1], keys.contiguous()
    if whole.element_size() == 1:
        whole, cache = whole.view(torch.uint8), cache.view(torch.uint8)
    if len(keys):
        _keep[(len(keys),)](
            whole, cache, cells, SIZE=size, BLOCK=block_of(size), num_warps=4, **launch.chained(keys.device)
        )


def latent_attention(q: Tensor, k_cache: Tensor, batch: Batch, shape: Heads) -> Tensor:
    """See ops.paged_attention: here a value is what its key has behind the first `shape.turned`."""
    rank, requests = shape.head_dim - shape.turned, len(batch.contexts)
    out = q.new_zeros(len(q), shape.heads, rank)
    if len(q) and requests:
        _attend[(len(q), triton.cdiv(shape.heads, _HEADS))](
            q.contiguous(), fp8.known(k_cache), batch.starts, batch.contexts, batch.block_tables,
            batch.block_tables.stride(0), out, requests, shape.heads, shape.scale * LOG2_E, TURNED=shape.turned,
            RANK=rank, R=block_of(requests), M=_HEADS, D=block_of(shape.turned), C=block_of(rank), TILE=_KEYS,
            num_warps=8, num_stages=1, **launch.chained(q.device),
        )  # fmt: skip
    return out
