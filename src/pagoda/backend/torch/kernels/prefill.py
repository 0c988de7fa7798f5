"""Paged attention of prompts in Triton, by tiles of queries."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from pagoda.backend.torch.batch import Batch, Heads
from pagoda.backend.torch.kernels import fp8, launch
from pagoda.backend.torch.kernels.fold import LOG2_E, NO_WINDOW, cap_of, fold
from pagoda.backend.torch.kernels.launch import await_others, block_of, lines_of
from pagoda.backend.torch.kernels.tuning import Tile

_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def tile_of(starts: tl.tensor, tile: tl.tensor, requests: tl.tensor, R: tl.constexpr, TOKENS: tl.constexpr) -> Any:
    """The request of a tile, its first row, how many tokens it has, and the tile's first one of them.

    Request r owns the tiles from starts[r] // TOKENS + r on: enough of them, whatever the lengths are.
    """
    each = tl.arange(0, R)
    bounds = tl.load(starts + each, mask=each < requests, other=1 << 30) // TOKENS + each
    r = tl.sum((bounds <= tile).to(tl.int32), axis=0) - 1
    start = tl.load(starts + r)
    return r, start, tl.load(starts + r + 1) - start, (tile - start // TOKENS - r) * TOKENS


@triton.jit(do_not_specialize=["requests", "table_width"])
def _prefill(
    q: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    sinks: tl.tensor,
    starts: tl.tensor,
    contexts: tl.tensor,
    tables: tl.tensor,
    table_width: tl.tensor,
    out: tl.tensor,
    requests: tl.tensor,
    kv_heads: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    CAP: tl.constexpr,
    SINKS: tl.constexpr,
    R: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP2: tl.constexpr,
    M: tl.constexpr,
    HEAD: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """A tile of the tokens of one request under one KV head; single tokens are left to `_decode`."""
    await_others(CHAINED)
    TOKENS: tl.constexpr = M // GROUP2
    # the last tiles of a prompt see the most keys: they go first
    tile, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    r, start, count, first = tile_of(starts, tile, requests, R, TOKENS)
    if (first < count) & (count > 1):
        context, row, d = tl.load(contexts + r), tl.arange(0, M), tl.arange(0, D)
        token, member = first + row // GROUP2, row % GROUP2
        q_at = ((start + token).to(tl.int64) * kv_heads + head) * GROUP + member
        inside = ((token < count) & (member < GROUP))[:, None] & (d < HEAD)[None, :]
        rows = tl.load(q + q_at[:, None] * HEAD + d[None, :], mask=inside, other=0.0)
        most, total = tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.float32)
        acc, ends = tl.zeros((M, D), tl.float32), tl.minimum(context - count + token + 1, context)
        begins = tl.maximum(ends - window, 0)
        lowest, limit = context - count + first + 1, tl.minimum(context - count + first + TOKENS, context)
        begin = tl.maximum(lowest - window, 0) // TILE * TILE
        k_head, v_head, table = k_cache + head * HEAD, v_cache + head * HEAD, tables + r.to(tl.int64) * table_width
        # up to here every row of the tile sees every key, without a window
        whole = tl.where(window > limit, tl.maximum(lowest // TILE * TILE, begin), begin)
        for key in range(begin, whole, TILE):
            most, total, acc = fold(
                rows, most, total, acc, k_head, v_head, table, key, limit, begins, ends, kv_heads * HEAD, scale,
                CAP, False, HEAD, D, TILE,
            )  # fmt: skip
        for key in range(whole, limit, TILE):
            most, total, acc = fold(
                rows, most, total, acc, k_head, v_head, table, key, limit, begins, ends, kv_heads * HEAD, scale,
                CAP, True, HEAD, D, TILE,
            )  # fmt: skip
        if SINKS:
            sink = tl.load(sinks + head * GROUP + member, mask=member < GROUP, other=0.0) * _LOG2_E
            total += tl.where(total > 0, tl.exp2(sink - most), 0.0)
        result = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out + q_at[:, None] * HEAD + d[None, :], result.to(out.dtype.element_ty), mask=inside)


def run_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: Batch,
    shape: Heads,
    out: Tensor,
    tile: Tile,
    *,
    sinks: Tensor | None = None,
) -> None:
    """Writes what the tokens of prompts get to `out`."""
    group = shape.heads // shape.kv_heads
    rows = max(tile.m, block_of(group, 1))
    tiles = len(q) // (rows // block_of(group, 1)) + len(batch.contexts)
    _prefill[(tiles, shape.kv_heads)](
        q.contiguous(), fp8.known(k_cache), fp8.known(v_cache), q if sinks is None else sinks, batch.starts,
        batch.contexts, batch.block_tables, batch.block_tables.stride(0), out, len(batch.contexts), shape.kv_heads,
        shape.scale * LOG2_E, shape.window or NO_WINDOW, CAP=cap_of(shape), SINKS=sinks is not None,
        R=lines_of(len(batch.contexts)), GROUP=group, GROUP2=block_of(group, 1), M=rows, HEAD=shape.head_dim,
        D=block_of(shape.head_dim), TILE=tile.n, num_warps=tile.warps, num_stages=tile.stages,
        **launch.chained(q.device),
    )  # fmt: skip
