"""Paged attention of single tokens in Triton, split over their keys and joined in order; with what comes between the
QKV product and it where that is given: norm of q and k, RoPE, the new key and value to the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagoda.backend.torch.batch import Batch, Heads
from pagoda.backend.torch.kernels import fp8, launch
from pagoda.backend.torch.kernels.fold import LOG2_E, NO_WINDOW, cap_of, fold
from pagoda.backend.torch.kernels.launch import arrivals, await_others, block_of, fetch_ahead, lines_of
from pagoda.backend.torch.kernels.rope import cached, heads_of
from pagoda.backend.torch.kernels.tuning import Tile
from pagoda.types import BLOCK_SIZE

LEAST_RUN = 128
"""Keys: so few that a single stream of a thousand keys is on 64 multiprocessors, so many that the parts are small."""
MOST_RUNS = 32
_PROGRAMS = 8
"""Programs for each multiprocessor: more than it can hold at once evens out the ends."""
_LEAST_RUN = tl.constexpr(LEAST_RUN)
_MOST_RUNS = tl.constexpr(MOST_RUNS)
_DOUBLINGS = tl.constexpr(16)
_CELLS = tl.constexpr(BLOCK_SIZE)
_LOG2_E = tl.constexpr(LOG2_E)


@dataclass(frozen=True, slots=True)
class Fresh:
    """What turns a row of the QKV product into q, and a key and a value for the cache; see ops.rope_and_cache."""

    q_norm: Tensor | None
    k_norm: Tensor | None
    cos_sin: Tensor


@triton.jit
def run_length(context: tl.tensor) -> tl.tensor:
    """Keys of one run: the power of two that makes at most 32 runs of a context, 128 at least."""
    length = context * 0 + _LEAST_RUN
    for _ in tl.static_range(_DOUBLINGS):
        length = tl.where(length * _MOST_RUNS < context, length * 2, length)
    return length


@triton.jit(do_not_specialize=["requests"])
def _count_runs(
    starts: tl.tensor, contexts: tl.tensor, runs: tl.tensor, requests: tl.tensor, R: tl.constexpr, CHAINED: tl.constexpr
) -> None:
    await_others(CHAINED)
    r = tl.arange(0, R)
    here = r < requests
    first, end = tl.load(starts + r, mask=here, other=0), tl.load(starts + r + 1, mask=here, other=0)
    context = tl.load(contexts + r, mask=here & (end - first == 1), other=0)
    length = run_length(context)
    total = tl.cumsum((context + length - 1) // length, axis=0)
    tl.store(runs + r + 1, total, mask=here)
    tl.store(runs + r, total * 0, mask=r == 0)


@triton.jit
def owner(bounds: tl.tensor, at: tl.tensor, requests: tl.tensor, R: tl.constexpr) -> tl.tensor:
    """The request whose run is number `at`: how many requests end at or before it."""
    r = tl.arange(0, R)
    ends = tl.load(bounds + r + 1, mask=r < requests, other=2147483647)
    return tl.sum((ends <= at).to(tl.int32), axis=0)


@triton.jit
def join(
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
    AT_ONCE: tl.constexpr,
) -> None:
    """The last of `count` runs that are done joins them all, in the order of their keys, and sets the counter back.

    `parts` and `stats` point at the lines (heads) of the first run; those of the next one are `step` lines further.
    The loads of AT_ONCE of them are under way together.
    """
    tl.debug_barrier()
    if tl.atomic_add(arrived, 1, sem="acq_rel") == count - 1:
        d, run = tl.arange(0, D), tl.arange(0, _MOST_RUNS)
        place = stats + (line[:, None] + run[None, :] * step) * 2
        there = inside[:, None] & (run < count)[None, :]
        most = tl.max(tl.load(place, mask=there, other=float("-inf"), cache_modifier=".cg"), axis=1)
        top = tl.where(inside, most, 0.0)
        total, acc = tl.zeros((line.shape[0],), tl.float32), tl.zeros((line.shape[0], D), tl.float32)
        both = inside[:, None] & (d < HEAD)[None, :]
        for begin in range(0, count, AT_ONCE):
            for each in tl.static_range(AT_ONCE):
                at, here = line + (begin + each) * step, begin + each < count
                mine = tl.load(stats + at * 2, mask=inside & here, other=float("-inf"), cache_modifier=".cg")
                factor = tl.exp2(mine - top)
                total += tl.load(stats + at * 2 + 1, mask=inside & here, other=0.0, cache_modifier=".cg") * factor
                values = parts + at[:, None] * HEAD + d[None, :]
                acc += tl.load(values, mask=both & here, other=0.0, cache_modifier=".cg") * factor[:, None]
        total = tl.where(inside, total + tl.exp2(sink - top), 1.0)
        tl.store(out, (acc / total[:, None]).to(out.dtype.element_ty), mask=both)
        tl.store(arrived, 0)


@triton.jit
def _fetch_keys(
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    contexts: tl.tensor,
    tables: tl.tensor,
    table_width: tl.tensor,
    runs: tl.tensor,
    requests: tl.tensor,
    kv_heads: tl.tensor,
    window: tl.tensor,
    R: tl.constexpr,
    HEAD: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """The first keys and values of this program on their way before the kernel in front has ended."""
    item, bits = tl.program_id(0), k_cache.dtype.element_ty.primitive_bitwidth
    if item < tl.load(runs + requests) * kv_heads:
        number, head, r = item // kv_heads, item % kv_heads, owner(runs, item // kv_heads, requests, R)
        context = tl.load(contexts + r)
        run = (number - tl.load(runs + r)) * run_length(context)
        at = tl.minimum(tl.maximum(run, context - window) + tl.arange(0, _LEAST_RUN), context - 1)
        block = tl.load(tables + r.to(tl.int64) * table_width + at // _CELLS).to(tl.int64)
        cell = ((block * _CELLS + at % _CELLS) * kv_heads + head) * HEAD
        LINES: tl.constexpr = (HEAD * k_cache.dtype.element_ty.primitive_bitwidth + 1023) // 1024
        fetch_ahead((k_cache + cell).to(tl.int64), HEAD * bits // 8, LINES, CHAINED)
        fetch_ahead((v_cache + cell).to(tl.int64), HEAD * bits // 8, LINES, CHAINED)


@triton.jit
def _fresh(
    qkv: tl.tensor,
    q_norm: tl.tensor,
    k_norm: tl.tensor,
    cos_sin: tl.tensor,
    positions: tl.tensor,
    cells: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    token: tl.tensor,
    head: tl.tensor,
    kv_heads: tl.tensor,
    eps: tl.tensor,
    is_last: tl.tensor,
    NORM: tl.constexpr,
    LATE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    M: tl.constexpr,
    HEAD: tl.constexpr,
    D: tl.constexpr,
) -> tl.tensor:
    """The queries [M, D] of a token under a KV head, its key in row GROUP, its value in the next one; the program of
    the last run writes both of these to the cache, where all of its threads then find them."""
    row, at, q_heads = tl.arange(0, M)[:, None], tl.arange(0, D)[None, :], kv_heads * GROUP
    is_k, is_v = row == GROUP, row == GROUP + 1
    own = tl.where(row < GROUP, head * GROUP + row, q_heads + head + tl.where(is_v, kv_heads, 0))
    inside = (row < GROUP + 2) & (at < HEAD)
    result, raw = heads_of(
        qkv + (token * (q_heads + 2 * kv_heads) + own) * HEAD, inside, row < GROUP, is_v, q_norm, k_norm, cos_sin,
        tl.load(positions + token).to(tl.int64), eps, NORM, LATE, INTERLEAVED, DIM, HEAD, D,
    )  # fmt: skip
    if is_last:
        cell = tl.load(cells + token)
        place, written = (cell * kv_heads + head) * HEAD + at + row * 0, inside & (cell >= 0)
        tl.store(k_cache + place, cached(result, k_cache), mask=written & is_k)
        tl.store(v_cache + place, cached(raw, v_cache), mask=written & is_v)
        tl.debug_barrier()
    return result


@triton.jit(do_not_specialize=["requests", "table_width"])
def _decode(
    q: tl.tensor, q_norm: tl.tensor, k_norm: tl.tensor, cos_sin: tl.tensor, positions: tl.tensor, cells: tl.tensor,
    k_cache: tl.tensor, v_cache: tl.tensor, sinks: tl.tensor, starts: tl.tensor, contexts: tl.tensor,
    tables: tl.tensor, table_width: tl.tensor, runs: tl.tensor, parts: tl.tensor, stats: tl.tensor, out: tl.tensor,
    arrived: tl.tensor, requests: tl.tensor, kv_heads: tl.tensor, scale: tl.tensor, window: tl.tensor, eps: tl.tensor,
    FRESH: tl.constexpr, NORM: tl.constexpr, LATE: tl.constexpr, INTERLEAVED: tl.constexpr, DIM: tl.constexpr,
    CAP: tl.constexpr, SINKS: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr, M: tl.constexpr, HEAD: tl.constexpr,
    D: tl.constexpr, TILE: tl.constexpr, CHAINED: tl.constexpr,
) -> None:  # fmt: skip
    """One run of one request under one KV head at a time, until none is left for this program. FRESH: q is a row of
    the QKV product for each token, whose key and value are not in the cache yet."""
    if FRESH:  # the kernel in front has made that product, and nothing else that is read here
        _fetch_keys(
            k_cache, v_cache, contexts, tables, table_width, runs, requests, kv_heads, window, R, HEAD, CHAINED
        )  # fmt: skip
    await_others(CHAINED)
    row, d = tl.arange(0, M), tl.arange(0, D)
    for item in range(tl.program_id(0), tl.load(runs + requests) * kv_heads, tl.num_programs(0)):
        number, head, r = item // kv_heads, item % kv_heads, owner(runs, item // kv_heads, requests, R)
        context, token = tl.load(contexts + r), tl.load(starts + r).to(tl.int64)
        length = run_length(context)
        run = (number - tl.load(runs + r)) * length
        end, begin = tl.minimum(run + length, context), tl.maximum(context - window, 0)
        q_at, inside = (token * kv_heads + head) * GROUP + row, (row < GROUP)[:, None] & (d < HEAD)[None, :]
        if FRESH:
            rows = _fresh(
                q, q_norm, k_norm, cos_sin, positions, cells, k_cache, v_cache, token, head, kv_heads, eps,
                end == context, NORM, LATE, INTERLEAVED, DIM, GROUP, M, HEAD, D,
            )  # fmt: skip
        else:
            rows = tl.load(q + q_at[:, None] * HEAD + d[None, :], mask=inside, other=0.0)
        most, total = tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.float32)
        acc, begins, ends = tl.zeros((M, D), tl.float32), row * 0 + begin, row * 0 + end
        k_head, v_head, table = k_cache + head * HEAD, v_cache + head * HEAD, tables + r.to(tl.int64) * table_width
        for key in range(tl.maximum(run, begin // TILE * TILE), end, TILE):
            most, total, acc = fold(
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
            line = (number.to(tl.int64) * kv_heads + head) * GROUP + row
            tl.store(parts + line[:, None] * HEAD + d[None, :], acc, mask=inside)
            tl.store(stats + line * 2, most, mask=row < GROUP)
            tl.store(stats + line * 2 + 1, total, mask=row < GROUP)
            first, counter = (begun.to(tl.int64) * kv_heads + head) * GROUP + row, arrived + r * kv_heads + head
            join(parts, stats, place, counter, first, row < GROUP, count, kv_heads * GROUP, sink, HEAD, D, 4)


def count_runs(starts: Tensor, contexts: Tensor) -> Tensor:
    """int32 [R + 1]: how many runs of keys the requests before each one have; those of one token only have any."""
    requests = len(contexts)
    runs = torch.empty(requests + 1, dtype=torch.int32, device=contexts.device)
    _count_runs[(1,)](
        starts, contexts, runs, requests, R=lines_of(requests), num_warps=4, **launch.chained(contexts.device)
    )
    return runs


def run_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: Batch,
    shape: Heads,
    out: Tensor,
    tile: Tile,
    *,
    sinks: Tensor | None = None,
    fresh: Fresh | None = None,
) -> None:
    """Writes what single tokens get to `out`. `fresh`: q is the QKV product, of a batch that is prepared."""
    requests, group = len(batch.contexts), shape.heads // shape.kv_heads
    runs = count_runs(batch.starts, batch.contexts) if batch.runs is None else batch.runs
    normed = fresh is not None and fresh.q_norm is not None
    norms = (fresh.q_norm, fresh.k_norm) if fresh is not None and normed else (q, q)
    cos_sin = q if fresh is None else fresh.cos_sin
    most = requests * min(MOST_RUNS, triton.cdiv(batch.max_context, LEAST_RUN))
    parts = torch.empty(most, shape.heads, shape.head_dim, dtype=torch.float32, device=q.device)
    stats = torch.empty(most, shape.heads, 2, dtype=torch.float32, device=q.device)
    _decode[(min(most * shape.kv_heads, launch.gpu_of(q.device).processors * _PROGRAMS),)](
        q.contiguous(), *norms, cos_sin, batch.positions, batch.cells, fp8.known(k_cache), fp8.known(v_cache),
        q if sinks is None else sinks, batch.starts, batch.contexts, batch.block_tables, batch.block_tables.stride(0),
        runs, parts, stats, out, arrivals(q.device, requests * shape.kv_heads), requests, shape.kv_heads,
        shape.scale * LOG2_E, shape.window or NO_WINDOW, shape.eps, FRESH=fresh is not None, NORM=normed,
        LATE=shape.late, INTERLEAVED=shape.interleaved, DIM=0 if fresh is None else cos_sin.shape[1],
        CAP=cap_of(shape), SINKS=sinks is not None, R=lines_of(requests), GROUP=group,
        M=block_of(group + 2 * (fresh is not None)), HEAD=shape.head_dim, D=block_of(shape.head_dim), TILE=tile.n,
        num_warps=tile.warps, num_stages=tile.stages, **launch.chained(q.device),
    )  # fmt: skip
