"""Latent attention in Triton: all heads of a token over the one key and value that each token keeps. Single tokens are
split over their keys and joined in order, prompts go by tiles of tokens and heads.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagoda.backend.torch.batch import Batch, Heads
from pagoda.backend.torch.kernels import fp8, launch
from pagoda.backend.torch.kernels.decode import LEAST_RUN, MOST_RUNS, count_runs, join, owner, run_length
from pagoda.backend.torch.kernels.fold import LOG2_E
from pagoda.backend.torch.kernels.launch import arrivals, await_others, block_of, lines_of
from pagoda.backend.torch.kernels.prefill import tile_of
from pagoda.backend.torch.kernels.tuning import Tile
from pagoda.types import BLOCK_SIZE

_CELLS = tl.constexpr(BLOCK_SIZE)
_HEADS = 16
"""Heads of a token in a tile of a prompt."""
_ROOMY_BYTES = 160 << 10
_PROGRAMS = 4


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
def _fold(
    first: tl.tensor,
    rest: tl.tensor,
    most: tl.tensor,
    total: tl.tensor,
    acc: tl.tensor,
    cache: tl.tensor,
    table: tl.tensor,
    key: tl.tensor,
    limit: tl.tensor,
    ends: tl.tensor,
    scale: tl.tensor,
    TURNED: tl.constexpr,
    RANK: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    TILE: tl.constexpr,
) -> Any:
    """Take the keys key .. key + TILE into the running maximum, sum and weighted values of each row."""
    at, d, c = key + tl.arange(0, TILE), tl.arange(0, D), tl.arange(0, C)
    known = at < limit
    block = tl.load(table + at // _CELLS, mask=known, other=0).to(tl.int64)
    cell = cache + (block * _CELLS + at % _CELLS) * (TURNED + RANK)
    k = tl.load(cell[None, :] + d[:, None], mask=known[None, :] & (d < TURNED)[:, None], other=0.0)
    v = tl.load(cell[:, None] + TURNED + c[None, :], mask=known[:, None] & (c < RANK)[None, :], other=0.0)
    k, v = fp8.floats(k, first.dtype), fp8.floats(v, first.dtype)
    scores = tl.dot(rest, tl.trans(v), tl.dot(first, k, input_precision="ieee"), input_precision="ieee")
    scores = tl.where(at[None, :] < ends[:, None], scores * scale, float("-inf"))
    new = tl.maximum(most, tl.max(scores, axis=1))
    base = tl.where(new == float("-inf"), 0.0, new)
    weights, keep = tl.exp2(scores - base[:, None]), tl.exp2(most - base)
    acc = tl.dot(weights.to(v.dtype), v, acc * keep[:, None], input_precision="ieee")
    return new, total * keep + tl.sum(weights, axis=1), acc


@triton.jit
def _rows(
    q: tl.tensor,
    line: tl.tensor,
    inside: tl.tensor,
    TURNED: tl.constexpr,
    RANK: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
) -> Any:
    """Queries: what is held against the turned part of keys, and against their values."""
    d, c, place = tl.arange(0, D)[None, :], tl.arange(0, C)[None, :], q + line[:, None] * (TURNED + RANK)
    first = tl.load(place + d, mask=inside[:, None] & (d < TURNED), other=0.0)
    return first, tl.load(place + TURNED + c, mask=inside[:, None] & (c < RANK), other=0.0)


@triton.jit(do_not_specialize=["requests", "table_width"])
def _latent_runs(
    q: tl.tensor,
    cache: tl.tensor,
    starts: tl.tensor,
    contexts: tl.tensor,
    tables: tl.tensor,
    table_width: tl.tensor,
    runs: tl.tensor,
    parts: tl.tensor,
    stats: tl.tensor,
    out: tl.tensor,
    arrived: tl.tensor,
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
    """One run of keys of a single token under some of its heads at a time, until none is left for this program."""
    await_others(CHAINED)
    each, c, blocks = tl.arange(0, M), tl.arange(0, C)[None, :], tl.cdiv(heads, M)
    for item in range(tl.program_id(0), tl.load(runs + requests) * blocks, tl.num_programs(0)):
        number, block, r = item // blocks, item % blocks, owner(runs, item // blocks, requests, R)
        context, begun, head = tl.load(contexts + r), tl.load(runs + r), block * M + each
        length, inside = run_length(context), head < heads
        begin = (number - begun) * length
        end, line = tl.minimum(begin + length, context), tl.load(starts + r).to(tl.int64) * heads + head
        first, rest = _rows(q, line, inside, TURNED, RANK, D, C)
        most, total = tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.float32)
        acc, ends, table = tl.zeros((M, C), tl.float32), each * 0 + end, tables + r.to(tl.int64) * table_width
        for key in range(begin, end, TILE):
            most, total, acc = _fold(
                first, rest, most, total, acc, cache, table, key, end, ends, scale, TURNED, RANK, D, C, TILE
            )
        both, place = inside[:, None] & (c < RANK), out + line[:, None] * RANK + c
        count = tl.load(runs + r + 1) - begun
        if count == 1:
            tl.store(place, (acc / total[:, None]).to(out.dtype.element_ty), mask=both)
        else:
            own = number.to(tl.int64) * heads + head
            tl.store(parts + own[:, None] * RANK + c, acc, mask=both)
            tl.store(stats + own * 2, most, mask=inside)
            tl.store(stats + own * 2 + 1, total, mask=inside)
            none = tl.full((M,), float("-inf"), tl.float32)
            join(
                parts, stats, place, arrived + r * blocks + block, begun.to(tl.int64) * heads + head, inside, count,
                heads, none, RANK, C, 1,
            )  # fmt: skip


@triton.jit(do_not_specialize=["requests", "table_width"])
def _latent_tiles(
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
    HEADS: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    TILE: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """Some heads of some tokens of one prompt, which share its keys; single tokens are left to `_latent_runs`."""
    await_others(CHAINED)
    TOKENS: tl.constexpr = M // HEADS
    tile, c = tl.num_programs(0) - 1 - tl.program_id(0), tl.arange(0, C)[None, :]
    r, start, count, begin = tile_of(starts, tile, requests, R, TOKENS)
    if (begin < count) & (count > 1):
        context, row = tl.load(contexts + r), tl.arange(0, M)
        token, head = begin + row // HEADS, tl.program_id(1) * HEADS + row % HEADS
        inside, line = (token < count) & (head < heads), (start + token).to(tl.int64) * heads + head
        first, rest = _rows(q, line, inside, TURNED, RANK, D, C)
        most, total = tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.float32)
        ends, limit = context - count + token + 1, tl.minimum(context - count + begin + TOKENS, context)
        acc, table = tl.zeros((M, C), tl.float32), tables + r.to(tl.int64) * table_width
        for key in range(0, limit, TILE):
            most, total, acc = _fold(
                first, rest, most, total, acc, cache, table, key, limit, ends, scale, TURNED, RANK, D, C, TILE
            )
        result = (acc / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + line[:, None] * RANK + c, result, mask=inside[:, None] & (c < RANK))


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
    out = q.new_zeros(len(q), shape.heads, shape.head_dim - shape.turned)
    if len(q) and len(batch.contexts):
        if batch.max_query > 1:
            _run_tiles(q, k_cache, batch, shape, out)
        if batch.max_query == 1 or len(batch.contexts) > 1:
            _run_runs(q, k_cache, batch, shape, out)
    return out


def _sizes(shape: Heads) -> dict[str, int]:
    rank = shape.head_dim - shape.turned
    return {"TURNED": shape.turned, "RANK": rank, "D": block_of(shape.turned), "C": block_of(rank)}


def _tile(q: Tensor, rows: int) -> Tile:
    """As large as the registers allow, which hold the queries of a warp whole, and the shared memory."""
    if q.dtype == torch.float32 or launch.gpu_of(q.device).shared_bytes < _ROOMY_BYTES:
        return Tile(m=16, n=16, warps=4, stages=1)
    return Tile(m=32, n=32, warps=8, stages=2) if rows > 16 else Tile(m=16, n=32, warps=4, stages=3)


def _run_tiles(q: Tensor, k_cache: Tensor, batch: Batch, shape: Heads, out: Tensor) -> None:
    tile, requests = _tile(q, 32), len(batch.contexts)
    grid = (len(q) // (tile.m // _HEADS) + requests, triton.cdiv(shape.heads, _HEADS))
    _latent_tiles[grid](
        q.contiguous(), fp8.known(k_cache), batch.starts, batch.contexts, batch.block_tables,
        batch.block_tables.stride(0), out, requests, shape.heads, shape.scale * LOG2_E, R=lines_of(requests),
        HEADS=_HEADS, M=tile.m, TILE=tile.n, num_warps=tile.warps, num_stages=tile.stages, **_sizes(shape),
        **launch.chained(q.device),
    )  # fmt: skip


def _run_runs(q: Tensor, k_cache: Tensor, batch: Batch, shape: Heads, out: Tensor) -> None:
    tile, requests = _tile(q, 16), len(batch.contexts)
    runs = count_runs(batch.starts, batch.contexts) if batch.runs is None else batch.runs
    most, blocks = (
        requests * min(MOST_RUNS, triton.cdiv(batch.max_context, LEAST_RUN)),
        triton.cdiv(shape.heads, tile.m),
    )
    parts = torch.empty(most, *out.shape[1:], dtype=torch.float32, device=q.device)
    stats = torch.empty(most, shape.heads, 2, dtype=torch.float32, device=q.device)
    _latent_runs[(min(most * blocks, launch.gpu_of(q.device).processors * _PROGRAMS),)](
        q.contiguous(), fp8.known(k_cache), batch.starts, batch.contexts, batch.block_tables,
        batch.block_tables.stride(0), runs, parts, stats, out, arrivals(q.device, requests * blocks), requests,
        shape.heads, shape.scale * LOG2_E, R=lines_of(requests), M=tile.m, TILE=tile.n, num_warps=tile.warps,
        num_stages=tile.stages, **_sizes(shape), **launch.chained(q.device),
    )  # fmt: skip
