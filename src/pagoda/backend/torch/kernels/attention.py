"""Paged attention in Triton: prompts by tiles of queries, single tokens split over their keys and joined in order.

The heads that share a KV head are the rows of one tile, so a key is read once for all of them. The keys of a single
token are cut into runs whose length follows from its context alone, and the parts are joined in the order of the keys:
the answer does not depend on the rest of the batch.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagoda.backend.torch.batch import Batch, Heads
from pagoda.backend.torch.kernels import fp8, launch
from pagoda.backend.torch.kernels.launch import arrivals, await_others, block_of
from pagoda.backend.torch.kernels.tuning import Tile, choose
from pagoda.types import BLOCK_SIZE

LEAST_RUN = 256
MOST_RUNS = 32
NO_WINDOW = 1 << 30
_PROGRAMS = 8
"""Programs of the decode kernel for each multiprocessor: more than it can hold at once evens out the ends."""
_LEAST_RUN = tl.constexpr(LEAST_RUN)
_MOST_RUNS = tl.constexpr(MOST_RUNS)
_DOUBLINGS = tl.constexpr(16)
_CELLS = tl.constexpr(BLOCK_SIZE)
LOG2_E = 1.4426950408889634
_LOG2_E = tl.constexpr(LOG2_E)
"""Of scores and sinks, so that their powers are of two. A sink takes part in the softmax, and has no value."""
_TWO_LOG2_E = tl.constexpr(2 * LOG2_E)


@triton.jit
def _run_length(context: tl.tensor) -> tl.tensor:
    """Keys of one run: the power of two that makes at most 32 runs of a context, 256 at least."""
    length = context * 0 + _LEAST_RUN
    for _ in tl.static_range(_DOUBLINGS):
        length = tl.where(length * _MOST_RUNS < context, length * 2, length)
    return length


@triton.jit
def _count_runs(
    starts: tl.tensor, contexts: tl.tensor, runs: tl.tensor, requests: tl.tensor, R: tl.constexpr, CHAINED: tl.constexpr
) -> None:
    await_others(CHAINED)
    r = tl.arange(0, R)
    here = r < requests
    first, end = tl.load(starts + r, mask=here, other=0), tl.load(starts + r + 1, mask=here, other=0)
    context = tl.load(contexts + r, mask=here & (end - first == 1), other=0)
    length = _run_length(context)
    total = tl.cumsum((context + length - 1) // length, axis=0)
    tl.store(runs + r + 1, total, mask=here)
    tl.store(runs + r, total * 0, mask=r == 0)


@triton.jit
def _owner(bounds: tl.tensor, at: tl.tensor, requests: tl.tensor, R: tl.constexpr) -> tl.tensor:
    """The request whose run is number `at`: how many requests end at or before it."""
    r = tl.arange(0, R)
    ends = tl.load(bounds + r + 1, mask=r < requests, other=2147483647)
    return tl.sum((ends <= at).to(tl.int32), axis=0)


@triton.jit
def _fold(
    q: tl.tensor,
    most: tl.tensor,
    total: tl.tensor,
    acc: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    table: tl.tensor,
    key: tl.tensor,
    limit: tl.tensor,
    begins: tl.tensor,
    ends: tl.tensor,
    row_stride: tl.tensor,
    scale: tl.tensor,
    CAP: tl.constexpr,
    MASK: tl.constexpr,
    HEAD: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
) -> Any:
    """Take the keys key .. key + TILE into the running maximum, sum and weighted values of each row."""
    at, d = key + tl.arange(0, TILE), tl.arange(0, D)
    known = at < limit
    block = tl.load(table + at // _CELLS, mask=known, other=0).to(tl.int64)
    cell = (block * _CELLS + at % _CELLS) * row_stride
    k = tl.load(k_cache + cell[None, :] + d[:, None], mask=known[None, :] & (d < HEAD)[:, None], other=0.0)
    scores = tl.dot(q, fp8.floats(k, q.dtype), input_precision="ieee") * scale
    if CAP != 0.0:
        # CAP * tanh(s / CAP) by tanh(u) = 1 - 2 / (e^2u + 1); both are in units of log2(e)
        scores = CAP - 2.0 * CAP / (tl.exp2(scores * (_TWO_LOG2_E / CAP)) + 1.0)
    if MASK:
        seen = (at[None, :] < ends[:, None]) & (at[None, :] >= begins[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    new = tl.maximum(most, tl.max(scores, axis=1))
    base = tl.where(new == float("-inf"), 0.0, new)
    weights, keep = tl.exp2(scores - base[:, None]), tl.exp2(most - base)
    v = tl.load(v_cache + cell[:, None] + d[None, :], mask=known[:, None] & (d < HEAD)[None, :], other=0.0)
    v = fp8.floats(v, q.dtype)
    if v_cache.dtype.element_ty.primitive_bitwidth == 8:
        # changes no value; it keeps the compiler from moving bytes as the matrix units want them, one at a time
        v = tl.where(known[:, None], v, 0.0)
    acc = tl.dot(weights.to(q.dtype), v, acc * keep[:, None], input_precision="ieee")
    return new, total * keep + tl.sum(weights, axis=1), acc


@triton.jit
def _join(
    parts: tl.tensor,
    stats: tl.tensor,
    out: tl.tensor,
    arrived: tl.tensor,
    line: tl.tensor,
    inside: tl.tensor,
    count: tl.tensor,
    step: tl.tensor,
    sink: tl.tensor,
    HEAD: tl.constexpr,
    D: tl.constexpr,
) -> None:
    """The last of `count` runs that are done joins them all, in the order of their keys, and sets the counter back.

    `parts` and `stats` point at the lines (heads) of the first run; those of the next one are `step` lines further.
    """
    tl.debug_barrier()
    if tl.atomic_add(arrived, 1, sem="acq_rel") == count - 1:
        d = tl.arange(0, D)
        most = tl.full((line.shape[0],), float("-inf"), tl.float32)
        for run in range(0, count):
            place = stats + (line + run * step) * 2
            most = tl.maximum(most, tl.load(place, mask=inside, other=float("-inf"), cache_modifier=".cg"))
        top = tl.where(inside, most, 0.0)
        total, acc = tl.zeros((line.shape[0],), tl.float32), tl.zeros((line.shape[0], D), tl.float32)
        both = inside[:, None] & (d < HEAD)[None, :]
        for run in range(0, count):
            at = line + run * step
            factor = tl.exp2(tl.load(stats + at * 2, mask=inside, other=0.0, cache_modifier=".cg") - top)
            total += tl.load(stats + at * 2 + 1, mask=inside, other=1.0, cache_modifier=".cg") * factor
            values = parts + at[:, None] * HEAD + d[None, :]
            acc += tl.load(values, mask=both, other=0.0, cache_modifier=".cg") * factor[:, None]
        total += tl.exp2(sink - top)
        tl.store(out, (acc / total[:, None]).to(out.dtype.element_ty), mask=both)
        tl.store(arrived, 0)


@triton.jit
def _decode(
    q: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    sinks: tl.tensor,
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
    kv_heads: tl.tensor,
    scale: tl.tensor,
    window: tl.tensor,
    CAP: tl.constexpr,
    SINKS: tl.constexpr,
    R: tl.constexpr,
    GROUP: tl.constexpr,
    M: tl.constexpr,
    HEAD: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """One run of one request under one KV head at a time, until none is left for this program."""
    await_others(CHAINED)
    row, d = tl.arange(0, M), tl.arange(0, D)
    for item in range(tl.program_id(0), tl.load(runs + requests) * kv_heads, tl.num_programs(0)):
        number, head, r = item // kv_heads, item % kv_heads, _owner(runs, item // kv_heads, requests, R)
        context, token = tl.load(contexts + r), tl.load(starts + r).to(tl.int64)
        length = _run_length(context)
        run = (number - tl.load(runs + r)) * length
        end, begin = tl.minimum(run + length, context), tl.maximum(context - window, 0)
        q_at, inside = (token * kv_heads + head) * GROUP + row, (row < GROUP)[:, None] & (d < HEAD)[None, :]
        rows = tl.load(q + q_at[:, None] * HEAD + d[None, :], mask=inside, other=0.0)
        most, total = tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.float32)
        acc, begins, ends = tl.zeros((M, D), tl.float32), row * 0 + begin, row * 0 + end
        k_head, v_head, table = k_cache + head * HEAD, v_cache + head * HEAD, tables + r.to(tl.int64) * table_width
        for key in range(tl.maximum(run, begin // TILE * TILE), end, TILE):
            most, total, acc = _fold(
                rows, most, total, acc, k_head, v_head, table, key, end, begins, ends, kv_heads * HEAD, scale,
                CAP, True, HEAD, D, TILE,
            )  # fmt: skip
        begun, count = tl.load(runs + r), tl.load(runs + r + 1) - tl.load(runs + r)
        place = out + q_at[:, None] * HEAD + d[None, :]
        sink = tl.load(sinks + head * GROUP + row, mask=(row < GROUP) & SINKS, other=float("-inf")).to(tl.float32)
        sink *= _LOG2_E
        if count == 1:
            tl.store(place, (acc / (total + tl.exp2(sink - most))[:, None]).to(out.dtype.element_ty), mask=inside)
        else:
            line = (number * kv_heads + head) * GROUP + row
            tl.store(parts + line[:, None] * HEAD + d[None, :], acc, mask=inside)
            tl.store(stats + line * 2, most, mask=row < GROUP)
            tl.store(stats + line * 2 + 1, total, mask=row < GROUP)
            first, counter = (begun * kv_heads + head) * GROUP + row, arrived + r * kv_heads + head
            _join(parts, stats, place, counter, first, row < GROUP, count, kv_heads * GROUP, sink, HEAD, D)


@triton.jit
def _tile_of(starts: tl.tensor, tile: tl.tensor, requests: tl.tensor, R: tl.constexpr, TOKENS: tl.constexpr) -> Any:
    """The request of a tile, its first row, how many tokens it has, and the tile's first one of them.

    Request r owns the tiles from starts[r] // TOKENS + r on: enough of them, whatever the lengths are.
    """
    each = tl.arange(0, R)
    bounds = tl.load(starts + each, mask=each < requests, other=1 << 30) // TOKENS + each
    r = tl.sum((bounds <= tile).to(tl.int32), axis=0) - 1
    start = tl.load(starts + r)
    return r, start, tl.load(starts + r + 1) - start, (tile - start // TOKENS - r) * TOKENS


@triton.jit
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
    r, start, count, first = _tile_of(starts, tile, requests, R, TOKENS)
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
            most, total, acc = _fold(
                rows, most, total, acc, k_head, v_head, table, key, limit, begins, ends, kv_heads * HEAD, scale,
                CAP, False, HEAD, D, TILE,
            )  # fmt: skip
        for key in range(whole, limit, TILE):
            most, total, acc = _fold(
                rows, most, total, acc, k_head, v_head, table, key, limit, begins, ends, kv_heads * HEAD, scale,
                CAP, True, HEAD, D, TILE,
            )  # fmt: skip
        if SINKS:
            sink = tl.load(sinks + head * GROUP + member, mask=member < GROUP, other=0.0) * _LOG2_E
            total += tl.where(total > 0, tl.exp2(sink - most), 0.0)
        result = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out + q_at[:, None] * HEAD + d[None, :], result.to(out.dtype.element_ty), mask=inside)


def count_runs(starts: Tensor, contexts: Tensor) -> Tensor:
    """int32 [R + 1]: how many runs of keys the requests before each one have; those of one token only have any."""
    requests = len(contexts)
    runs = torch.empty(requests + 1, dtype=torch.int32, device=contexts.device)
    _count_runs[(1,)](
        starts, contexts, runs, requests, R=block_of(requests), num_warps=4, **launch.chained(contexts.device)
    )
    return runs


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, batch: Batch, shape: Heads, sinks: Tensor | None = None
) -> Tensor:
    """See ops.paged_attention."""
    out = torch.empty_like(q)
    if not len(q) or not len(batch.contexts):
        return out.zero_()
    if batch.max_query > 1:
        _run_prefill(q, k_cache, v_cache, batch, shape, out, sinks=sinks)
    # a batch of one prompt has no single tokens
    if batch.max_query == 1 or len(batch.contexts) > 1:
        _run_decode(q, k_cache, v_cache, batch, shape, out, sinks=sinks)
    return out


def fitted(tile: Tile, size: int, q: Tensor) -> Tile:
    """The tile cut down until its queries and the keys and values under way fit the shared memory of the GPU."""
    if q.dtype == torch.float32:  # it would not fit the registers
        tile = replace(tile, m=min(tile.m, 32), n=min(tile.n, 32))
    room = launch.gpu_of(q.device).shared_bytes // (size * q.element_size())
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


def _cap(shape: Heads) -> float:
    """In units of log2(e); 0 for none."""
    return (shape.soft_cap or 0.0) * LOG2_E


def _run_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: Batch,
    shape: Heads,
    out: Tensor,
    tile: Tile | None = None,
    *,
    sinks: Tensor | None = None,
) -> None:
    tile = tile or fitted(choose("prefill"), block_of(shape.head_dim), q)
    group = shape.heads // shape.kv_heads
    rows = max(tile.m, block_of(group, 1))
    tiles = len(q) // (rows // block_of(group, 1)) + len(batch.contexts)
    _prefill[(tiles, shape.kv_heads)](
        q.contiguous(), fp8.known(k_cache), fp8.known(v_cache), q if sinks is None else sinks, batch.starts,
        batch.contexts, batch.block_tables, batch.block_tables.stride(0), out, len(batch.contexts), shape.kv_heads,
        shape.scale * LOG2_E, shape.window or NO_WINDOW, CAP=_cap(shape), SINKS=sinks is not None,
        R=block_of(len(batch.contexts)), GROUP=group, GROUP2=block_of(group, 1), M=rows, HEAD=shape.head_dim,
        D=block_of(shape.head_dim), TILE=tile.n, num_warps=tile.warps, num_stages=tile.stages,
        **launch.chained(q.device),
    )  # fmt: skip


def _run_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: Batch,
    shape: Heads,
    out: Tensor,
    tile: Tile | None = None,
    *,
    sinks: Tensor | None = None,
) -> None:
    tile = tile or fitted(choose("decode"), block_of(shape.head_dim), q)
    requests, group = len(batch.contexts), shape.heads // shape.kv_heads
    runs = count_runs(batch.starts, batch.contexts) if batch.runs is None else batch.runs
    most = requests * min(MOST_RUNS, triton.cdiv(batch.max_context, LEAST_RUN))
    parts = torch.empty(most, shape.heads, shape.head_dim, dtype=torch.float32, device=q.device)
    stats = torch.empty(most, shape.heads, 2, dtype=torch.float32, device=q.device)
    size = block_of(shape.head_dim)
    _decode[(min(most * shape.kv_heads, launch.gpu_of(q.device).processors * _PROGRAMS),)](
        q.contiguous(), fp8.known(k_cache), fp8.known(v_cache), q if sinks is None else sinks, batch.starts,
        batch.contexts, batch.block_tables, batch.block_tables.stride(0), runs, parts, stats, out,
        arrivals(q.device, requests * shape.kv_heads), requests, shape.kv_heads, shape.scale * LOG2_E,
        shape.window or NO_WINDOW, CAP=_cap(shape), SINKS=sinks is not None, R=block_of(requests, 64), GROUP=group,
        M=block_of(group), HEAD=shape.head_dim, D=size, TILE=tile.n, num_warps=tile.warps, num_stages=tile.stages,
        **launch.chained(q.device),
    )  # fmt: skip
