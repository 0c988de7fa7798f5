"""Products with 4-bit matrices in Triton: codes go from memory to the matrix units through registers alone.

The weight is the left side of each product, so that its codes become floats where the matrix units take them from: a
code or'ed into the bits of 128 (1024 in float16) is that number plus the code. What that adds to the sums is taken off
again together with the zero points. A weight is read once for up to 64 rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pagoda.backend.torch.kernels.launch import await_others, fetch_ahead, join_parts
from pagoda.backend.torch.kernels.product import _row, _rows_of
from pagoda.weights.device_size import W4_CHUNK

_CHUNK = tl.constexpr(W4_CHUNK)
_WORDS = tl.constexpr(W4_CHUNK // 8)
_AHEAD = tl.constexpr(4)
"""Chunks, of 128 bytes, of each output that are fetched before the kernel may begin."""


@triton.jit
def _codes(words: tl.tensor, slice: tl.constexpr, like: tl.constexpr) -> tl.tensor:
    """Inputs 32 * slice to 32 * slice + 31 of a chunk: codes + `_added`, as floats."""
    if like == tl.float32:
        out = ((words >> 4 * slice) & 15).to(tl.float32)
    else:
        # both halves of a word at once
        pair = (words >> 4 * (slice % 4)) & 0x000F000F | (0x43004300 if like == tl.bfloat16 else 0x64006400)
        out = ((pair >> 16) if slice > 3 else pair).to(tl.int16).to(like, bitcast=True)
    return out


@triton.jit
def _added(like: tl.constexpr) -> tl.constexpr:
    return 0.0 if like == tl.float32 else 128.0 if like == tl.bfloat16 else 1024.0


@triton.jit
def _offset(
    x: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    line: tl.tensor,
    columns: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
) -> tl.tensor:
    """What zero points and `_added` make of inputs first to end of a single row, for each output."""
    total = line.to(tl.float32) * 0.0
    unit, within = tl.arange(0, 16), tl.arange(0, UNIT)
    added: tl.constexpr = _added(x.dtype.element_ty)
    for begin in range(first, end, 16 * UNIT):
        at = begin + unit * UNIT
        here = at < end
        place = at[:, None] + within[None, :]
        sums = tl.sum(tl.load(x + place, mask=place < end, other=0.0).to(tl.float32), axis=1)
        group = (at // GROUP if GROUP else at * 0)[None, :] * columns + line[:, None]
        scale = tl.load(scales + group, mask=here[None, :], other=0.0).to(tl.float32)
        zero = tl.load(zeros + group, mask=here[None, :], other=0.0).to(tl.float32)
        total += tl.sum(scale * (zero + added) * sums[None, :], axis=1)
    return total


@triton.jit
def _slices(
    total: tl.tensor,
    words: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    begin: tl.tensor,
    K: tl.tensor,
    N: tl.tensor,
    groups: tl.tensor,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    SINGLE: tl.constexpr,
    WHOLE: tl.constexpr,
) -> tl.tensor:
    """total + the product of a chunk of codes, whose first input is `begin`; `values` points at the rows' inputs 0."""
    kind: tl.constexpr = values.dtype.element_ty
    added: tl.constexpr = _added(kind)
    acc, sums = tl.zeros_like(total), tl.zeros_like(total)
    ones = tl.full((total.shape[0], 32), 1.0, tl.float32).to(kind)
    for slice in tl.static_range(8):
        k = begin + slice * 32 + tl.arange(0, 32)[:, None]
        x = tl.load(values + k) if WHOLE else tl.load(values + k, mask=k < K, other=0.0)
        if slice % RUN == 0:
            acc, sums = tl.zeros_like(total), tl.zeros_like(total)
        acc = tl.dot(_codes(words, slice, kind), x, acc, input_precision="ieee")
        if not SINGLE:
            sums = tl.dot(ones, x, sums, input_precision="ieee")
        if slice % RUN == RUN - 1:
            group = tl.minimum((begin + slice * 32) // GROUP, groups - 1) if GROUP else 0
            if not SINGLE:
                acc -= (tl.load(zeros + group * N).to(tl.float32) + added)[:, None] * sums
            total += acc * tl.load(scales + group * N).to(tl.float32)[:, None]
    return total


@triton.jit
def _w4(
    x: tl.tensor,
    weight: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    starts: tl.tensor,
    tokens: tl.tensor,
    out: tl.tensor,
    parts: tl.tensor,
    arrived: tl.tensor,
    rows: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    pitch: tl.tensor,
    groups: tl.tensor,
    experts: tl.tensor,
    GROUP: tl.constexpr,
    RUN: tl.constexpr,
    SINGLE: tl.constexpr,
    WHOLE: tl.constexpr,
    EXPERTS: tl.constexpr,
    GATHER: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STAGES: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """out [rows, N] = x [rows, K] times the transpose of a weight; see packs.W4 for the order of its codes.
    GROUP inputs share a scale (0: all), applied to sums of RUN slices of 32. SINGLE: rows is 1. WHOLE: the last chunk
    is full. Of SPLIT programs that share the depth the last to arrive adds all parts, in order."""
    part, depth = tl.program_id(2), tl.cdiv(tl.cdiv(K, _CHUNK), SPLIT)
    first, last = part * depth, tl.minimum(part * depth + depth, tl.cdiv(K, _CHUNK))
    if EXPERTS == 0:
        ahead = tl.minimum(tl.program_id(1) * BN + tl.arange(0, BN), N - 1).to(tl.int64) * pitch + first * _WORDS
        fetch_ahead((weight + ahead).to(tl.int64), (last - first) * _WORDS * 4, _AHEAD, CHAINED)
    await_others(CHAINED)
    expert, begin, stop = _rows_of(starts, tl.program_id(0), rows, experts, EXPERTS, BM)
    if begin < stop:
        m, n = begin + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
        row, line = _row(tokens, m, stop, GATHER), tl.minimum(n, N - 1)
        codes = weight + (expert * N + line)[:, None] * pitch + tl.arange(0, _WORDS)[None, :]
        scales, zeros = scales + expert * groups * N, zeros + expert * groups * N
        total = tl.zeros((BN, BM), tl.float32)
        if SINGLE:  # before the codes, of which the first are on their way: behind them it would take more registers
            less = _offset(x, scales, zeros, line, N, first * _CHUNK, tl.minimum(last * _CHUNK, K), GROUP, RUN * 32)
            total -= less[:, None]
        for chunk in tl.range(first, last, num_stages=STAGES):
            total = _slices(
                total, tl.load(codes + chunk * _WORDS), x + row[None, :] * K, scales + line, zeros + line,
                chunk * _CHUNK, K, N, groups, GROUP, RUN, SINGLE, WHOLE,
            )  # fmt: skip
        inside = (m < stop)[None, :] & (n < N)[:, None]
        own = m.to(tl.int64)[None, :] * N + n[:, None]
        if SPLIT == 1:
            tl.store(out + own, total.to(out.dtype.element_ty), mask=inside)
        else:
            tl.store(parts + part * rows * N + own, total, mask=inside)
            tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
            join_parts(parts + own, rows * N, out + own, arrived + tile, inside, SPLIT)
