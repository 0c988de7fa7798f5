"""Matrix products in Triton: float, 8-bit and FP8 weights, unpacked in registers; one matrix or one per expert.

A tile of the weight is read once for up to 128 rows. Sums run along the inputs in order; where programs share the
depth (`split`) their parts are added in order, so a row's bits follow from the tile alone.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from pagoda.backend.torch.kernels import fp8
from pagoda.backend.torch.kernels.activation import activated
from pagoda.backend.torch.kernels.launch import await_others, fetch_ahead, joined

DENSE = tl.constexpr(0)
W4 = tl.constexpr(1)  # see w4.py
W8 = tl.constexpr(2)  # int8; scale by group, zero point where there is one
F8 = tl.constexpr(3)  # FP8 against floats; scale for all, by row or by block
I8 = tl.constexpr(4)  # int8 on both sides; scale by row on both
F8_BOTH = tl.constexpr(5)  # FP8 on both sides; scale by block on both
_AHEAD = tl.constexpr(4)
"""Lines of 128 bytes of each output's weights that are fetched before the kernel may begin."""


@triton.jit
def _depth(
    acc: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    k0: tl.tensor,
    zero: tl.tensor,
    K: tl.tensor,
    pitch: tl.tensor,
    KIND: tl.constexpr,
    ZERO: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
) -> tl.tensor:
    """acc + the product of rows of x and the codes of outputs (`columns`), from input k0 on."""
    k = k0 + tl.arange(0, BK)
    values = tl.load(x + rows[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0.0)
    codes = tl.load(weight + columns[None, :] * pitch + k[:, None], mask=(k < K)[:, None], other=0.0)
    if KIND == I8:
        acc = tl.dot(values, codes, acc, out_dtype=tl.int32)
    elif KIND == F8_BOTH:
        acc = tl.dot(values, codes, acc)
    else:
        if KIND != DENSE:
            codes = fp8.floats(codes, values.dtype)
        if ZERO:
            codes = codes - zero.to(values.dtype)[None, :]
        acc = tl.dot(values, codes, acc, input_precision="ieee")
    return acc


@triton.jit
def _rows_of(
    starts: tl.tensor, tile: tl.tensor, rows: tl.tensor, experts: tl.tensor, EXPERTS: tl.constexpr, BM: tl.constexpr
) -> Any:
    """The expert of a tile of rows (0 where there is one matrix), its first row, and where its rows end.

    Tiles go by expert, none to one without rows; those behind the last have no rows.
    """
    expert, begin, end = tile * 0, tile * BM, rows
    if EXPERTS:
        each = tl.arange(0, EXPERTS)
        first = tl.load(starts + each, mask=each < experts, other=0)
        tiles = (tl.load(starts + each + 1, mask=each < experts, other=0) - first + BM - 1) // BM
        ends = tl.cumsum(tiles, axis=0)
        expert = tl.sum((ends <= tile).to(tl.int32), axis=0)
        before = tl.sum(tl.where(each == expert, ends - tiles, 0), axis=0)
        begin = tl.load(starts + expert, mask=expert < experts, other=0) + (tile - before) * BM
        end = tl.load(starts + expert + 1, mask=expert < experts, other=0)
    return expert.to(tl.int64), begin, end


@triton.jit
def _row(tokens: tl.tensor, m: tl.tensor, end: tl.tensor, GATHER: tl.constexpr) -> tl.tensor:
    """Rows of x, up to the last one before `end`; GATHER: those of tokens[m]."""
    row = tl.minimum(m, end - 1).to(tl.int64)
    return tl.load(tokens + row).to(tl.int64) if GATHER else row


@triton.jit
def _scales_at(
    table: tl.tensor,
    x_scales: tl.tensor,
    line: tl.tensor,
    row: tl.tensor,
    at: tl.tensor,
    columns: tl.tensor,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    BN: tl.constexpr,
) -> Any:
    """What group or block `at` of the inputs is multiplied with, for each output and for each row; where the outputs
    of the tile share it, the rows have it all."""
    own = line.to(tl.float32) * 0.0 + 1.0
    if KIND == F8_BOTH:
        rows = tl.load(x_scales + row * columns + at)
        if GROUP % BN == 0:
            rows *= tl.load(table + tl.program_id(1) * BN // GROUP * columns + at)
        else:
            own = tl.load(table + line // GROUP * columns + at)
    else:
        rows = row.to(tl.float32) * 0.0 + 1.0
        own = tl.load(table + (line // GROUP * columns + at if KIND == F8 else at * columns + line)).to(tl.float32)
    return own, rows


@triton.jit
def _by_groups(
    total: tl.tensor,
    x: tl.tensor,
    matrix: tl.tensor,
    table: tl.tensor,
    points: tl.tensor,
    x_scales: tl.tensor,
    row: tl.tensor,
    line: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    K: tl.tensor,
    pitch: tl.tensor,
    columns: tl.tensor,
    KIND: tl.constexpr,
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
) -> tl.tensor:
    """The products of inputs first to last, each step times its scales, which are loaded a step ahead: the products
    would wait for them."""
    zero = line.to(tl.float32)
    own, other = _scales_at(table, x_scales, line, row, tl.minimum(first, K - 1) // GROUP, columns, KIND, GROUP, BN)
    for k0 in range(first, last, BK):
        if ZERO:
            zero = tl.load(points + k0 // GROUP * columns + line).to(tl.float32)
        following = tl.minimum(k0 + BK, K - 1) // GROUP
        next_own, next_other = _scales_at(table, x_scales, line, row, following, columns, KIND, GROUP, BN)
        now = tl.zeros((BM, BN), tl.float32)
        now = _depth(now, x, matrix, row, line, k0, zero, K, pitch, KIND, ZERO, BM, BK)
        if KIND == F8_BOTH:
            now *= other[:, None]
        if KIND == F8_BOTH and GROUP % BN == 0:
            total += now
        else:
            total += now * own[None, :]
        own, other = next_own, next_other
    return total


@triton.jit
def _ended(
    result: tl.tensor,
    bias: tl.tensor,
    line: tl.tensor,
    kind: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
) -> tl.tensor:
    """What is stored of the products [BM, BN]."""
    if BIAS:
        result = result.to(kind).to(tl.float32) + tl.load(bias + line).to(tl.float32)[None, :]
    if GATED:
        gate, up = tl.split(tl.reshape(result.to(kind), (BM, BN // 2, 2)))
        result = activated(gate.to(tl.float32), up.to(tl.float32), GATED)
    return result.to(kind)


@triton.jit(do_not_specialize=["rows"])
def _product(
    x: tl.tensor, weight: tl.tensor, scales: tl.tensor, zeros: tl.tensor, x_scales: tl.tensor, bias: tl.tensor,
    starts: tl.tensor, tokens: tl.tensor, out: tl.tensor, parts: tl.tensor, arrived: tl.tensor, rows: tl.tensor,
    N: tl.tensor, K: tl.tensor, pitch: tl.tensor, table_rows: tl.tensor, columns: tl.tensor, experts: tl.tensor,
    KIND: tl.constexpr, ZERO: tl.constexpr, GROUP: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr,
    EXPERTS: tl.constexpr, GATHER: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, CHAINED: tl.constexpr,
) -> None:  # fmt: skip
    """out [rows, N] = x [rows, K] times the transpose of weight [experts, N, K], whose rows are `pitch` long; GROUP of
    inputs share one of `scales` [experts, table_rows, columns] (0: all); of SPLIT programs the last adds all parts.
    GATED: an activation of the first half of the outputs times the second; a tile has both, in turns."""
    part, depth = tl.program_id(2), tl.cdiv(tl.cdiv(K, BK), SPLIT) * BK
    first, last = part * depth, tl.minimum(part * depth + depth, K)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    line = (tl.minimum(n // 2, N // 2 - 1) + n % 2 * (N // 2) if GATED else tl.minimum(n, N - 1)).to(tl.int64)
    if EXPERTS == 0:
        ahead = line * pitch + first
        bits: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth
        fetch_ahead((weight + ahead).to(tl.int64), (last - first) * bits // 8, _AHEAD, CHAINED)
    await_others(CHAINED)
    expert, begin, end = _rows_of(starts, tl.program_id(0), rows, experts, EXPERTS, BM)
    if begin < end:
        m = begin + tl.arange(0, BM)
        row = _row(tokens, m, end, GATHER)
        matrix, skipped = weight + expert * N * pitch, expert * table_rows * columns
        table, points = scales + skipped, zeros + skipped
        total = tl.zeros((BM, BN), tl.int32 if KIND == I8 else tl.float32)
        if GROUP:
            total = _by_groups(
                total, x, matrix, table, points, x_scales, row, line, first, last, K, pitch, columns, KIND, ZERO, GROUP,
                BM, BN, BK,
            )  # fmt: skip
        else:
            zero = tl.load(points + line).to(tl.float32) if ZERO else line.to(tl.float32)
            for k0 in range(first, last, BK):
                total = _depth(total, x, matrix, row, line, k0, zero, K, pitch, KIND, ZERO, BM, BK)
        result = total.to(tl.float32)
        if GROUP == 0 and (KIND == I8 or KIND == F8_BOTH):
            result *= tl.load(x_scales + row)[:, None]
        if GROUP == 0 and KIND != DENSE:
            result *= tl.load(table + (line if table_rows * columns > 1 else line * 0)).to(tl.float32)[None, :]
        own, there = m.to(tl.int64)[:, None], (m < end)[:, None]
        if SPLIT > 1:
            tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
            place, inside = parts + own * N + n[None, :], there & (n < N)[None, :]
            result, done = joined(result, place, N.to(tl.int64) * rows, part, arrived + tile, inside, SPLIT)
            there = there & done
        result = _ended(result, bias + expert * N, line, out.dtype.element_ty, BIAS, GATED, BM, BN)
        HALVES: tl.constexpr = 2 if GATED else 1
        to, width = tl.program_id(1) * (BN // HALVES) + tl.arange(0, BN // HALVES), N // HALVES
        tl.store(out + own * width + to[None, :], result, mask=there & (to < width)[None, :])
