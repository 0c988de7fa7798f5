"""Products with 4-bit matrices in Triton: codes go from memory to the matrix units through registers alone.

The weight is the left side of each product, so that its codes become floats where the matrix units take them from: a
code or'ed into the bits of 128 (1024 in float16) is that number plus the code. What that adds to the sums is taken off
again together with the zero points. A weight is read once for up to 64 rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pagoda.backend.torch.kernels.activation import activated
from pagoda.backend.torch.kernels.launch import await_others, fetch_ahead, joined
from pagoda.backend.torch.kernels.product import _row, _rows_of
from pagoda.weights.device_size import W4_CHUNK

_CHUNK = tl.constexpr(W4_CHUNK)
_WORDS = tl.constexpr(W4_CHUNK // 8)
_AHEAD = tl.constexpr(4)
"""Chunks, of 128 bytes, of each output that are fetched before the kernel may begin."""
NONE, BEFORE, BY_SUMS, IN_CODES, AFTER_ADDED = (tl.constexpr(n) for n in range(5))
"""What becomes of zero points and `_added`: there are none (4-bit floats); what they make of a single row is taken off
first; sums of the rows are multiplied with them; they are taken off the codes together, where zero points are whole;
or one after the other, where they are not, which then rounds codes as a matrix of floats would be."""


@triton.jit
def _codes(words: tl.tensor, slice: tl.constexpr, like: tl.constexpr, FLOATS: tl.constexpr) -> tl.tensor:
    """Inputs 32 * slice to 32 * slice + 31 of a chunk: codes + `_added`, as floats; FLOATS: what they stand for."""
    if like == tl.float32:
        code = (words >> 4 * slice) & 15
        if FLOATS:
            code = tl.where(code & 8 != 0, -1, 1) * doubled(code)
        out = code.to(tl.float32) * (0.5 if FLOATS else 1.0)
    elif FLOATS:
        # the bits of exponent and mantissa where the type has its own: the value times 2^-126 (float16: 2^-14)
        pair = words >> 4 * (slice % 4)
        pair = (pair & 0x00080008) << 12 | (pair & 0x00070007) << (6 if like == tl.bfloat16 else 9)
        out = ((pair >> 16) if slice > 3 else pair).to(tl.int16).to(like, bitcast=True)
        out = out * (2.0**126 if like == tl.bfloat16 else 2.0**14)
    else:
        # both halves of a word at once
        pair = (words >> 4 * (slice % 4)) & 0x000F000F | (0x43004300 if like == tl.bfloat16 else 0x64006400)
        out = ((pair >> 16) if slice > 3 else pair).to(tl.int16).to(like, bitcast=True)
    return out


@triton.jit
def doubled(code: tl.tensor) -> tl.tensor:
    """Twice the magnitude of a 4-bit float: 0, 1, 2, 3, 4, 6, 8, 12."""
    size = code & 7
    return tl.where(size < 2, size, (2 + (size & 1)) << tl.maximum((size >> 1) - 1, 0))


@triton.jit
def scale_of(place: tl.tensor) -> tl.tensor:
    """A scale: a float, or the exponent of a power of two, plus 127."""
    found = tl.load(place)
    if found.dtype == tl.uint8:
        return (found.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    else:
        return found.to(tl.float32)


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
    ZEROS: tl.constexpr,
    WHOLE: tl.constexpr,
) -> tl.tensor:
    """total + the product of a chunk of codes, whose first input is `begin`; `values` points at the rows' inputs 0."""
    kind: tl.constexpr = values.dtype.element_ty
    added: tl.constexpr = _added(kind)
    acc, sums = tl.zeros_like(total), tl.zeros_like(total)
    ones = tl.full((total.shape[0], 32), 1.0, tl.float32).to(kind)
    group, zero = 0, ones
    for slice in tl.static_range(8):
        k = begin + slice * 32 + tl.arange(0, 32)[:, None]
        x = tl.load(values + k) if WHOLE else tl.load(values + k, mask=k < K, other=0.0)
        if slice % RUN == 0:
            acc, sums = tl.zeros_like(total), tl.zeros_like(total)
            group = tl.minimum((begin + slice * 32) // GROUP, groups - 1) if GROUP else 0
            if ZEROS >= IN_CODES:
                zero = tl.load(zeros + group * N).to(tl.float32)
                zero = (zero + added if ZEROS == IN_CODES else zero).to(kind)[:, None]
        codes = _codes(words, slice, kind, ZEROS == NONE)
        if ZEROS == AFTER_ADDED:
            codes = codes - added
        if ZEROS >= IN_CODES:
            codes = codes - zero
        acc = tl.dot(codes, x, acc, input_precision="ieee")
        if ZEROS == BY_SUMS:
            sums = tl.dot(ones, x, sums, input_precision="ieee")
        if slice % RUN == RUN - 1:
            if ZEROS == BY_SUMS:
                acc -= (tl.load(zeros + group * N).to(tl.float32) + added)[:, None] * sums
            total += acc * scale_of(scales + group * N)[:, None]
    return total


@triton.jit
def _line(n: tl.tensor, N: tl.tensor, GATED: tl.constexpr) -> tl.tensor:
    """The output of each row of a tile. GATED: eight of the first half, then those of the second that go with them,
    which a thread has side by side in what the matrix units give."""
    if GATED:
        return tl.minimum(n // 16 * 8 + n % 8, N // 2 - 1) + n // 8 % 2 * (N // 2)
    else:
        return tl.minimum(n, N - 1)


@triton.jit
def _ended(
    total: tl.tensor,
    bias: tl.tensor,
    line: tl.tensor,
    kind: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
) -> tl.tensor:
    """What is stored of the products [BN, BM]."""
    if BIAS:
        total = total.to(kind).to(tl.float32) + tl.load(bias + line).to(tl.float32)[:, None]
    if GATED:
        pairs = tl.permute(tl.reshape(total.to(kind), (BN // 16, 2, 8, BM)), (0, 2, 3, 1))
        gate, up = tl.split(pairs)
        gate, up = tl.reshape(gate, (BN // 2, BM)), tl.reshape(up, (BN // 2, BM))
        total = activated(gate.to(tl.float32), up.to(tl.float32), GATED)
    return total.to(kind)


@triton.jit(do_not_specialize=["rows"])
def _w4(
    x: tl.tensor, weight: tl.tensor, scales: tl.tensor, zeros: tl.tensor, bias: tl.tensor, starts: tl.tensor,
    tokens: tl.tensor, out: tl.tensor, parts: tl.tensor, arrived: tl.tensor, rows: tl.tensor, N: tl.tensor,
    K: tl.tensor, pitch: tl.tensor, groups: tl.tensor, experts: tl.tensor, GROUP: tl.constexpr, RUN: tl.constexpr,
    ZEROS: tl.constexpr, WHOLE: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, EXPERTS: tl.constexpr,
    GATHER: tl.constexpr, SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:  # fmt: skip
    """out [rows, N] = x [rows, K] times the transpose of a weight; see packs.W4 for the order of its codes.
    GROUP inputs share a scale (0: all), applied to sums of RUN slices of 32. WHOLE: the last chunk is full. GATED: an
    activation of the first half of the outputs times the second. Of SPLIT programs that share the depth the last to
    arrive adds all parts, in order."""
    part, depth = tl.program_id(2), tl.cdiv(tl.cdiv(K, _CHUNK), SPLIT)
    first, last = part * depth, tl.minimum(part * depth + depth, tl.cdiv(K, _CHUNK))
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    line = _line(n, N, GATED)
    if EXPERTS == 0:
        ahead = line.to(tl.int64) * pitch + first * _WORDS
        fetch_ahead((weight + ahead).to(tl.int64), (last - first) * _WORDS * 4, _AHEAD, CHAINED)
    await_others(CHAINED)
    expert, begin, stop = _rows_of(starts, tl.program_id(0), rows, experts, EXPERTS, BM)
    if begin < stop:
        m = begin + tl.arange(0, BM)
        kind: tl.constexpr = out.dtype.element_ty
        row = _row(tokens, m, stop, GATHER)
        codes = weight + (expert * N + line)[:, None] * pitch + tl.arange(0, _WORDS)[None, :]
        scales, zeros = scales + expert * groups * N, zeros + expert * groups * N
        total = tl.zeros((BN, BM), tl.float32)
        if ZEROS == BEFORE:  # the first codes are on their way: behind them it would take more registers
            less = _offset(x, scales, zeros, line, N, first * _CHUNK, tl.minimum(last * _CHUNK, K), GROUP, RUN * 32)
            total -= less[:, None]
        for chunk in tl.range(first, last, num_stages=STAGES):
            total = _slices(
                total, tl.load(codes + chunk * _WORDS), x + row[None, :] * K, scales + line, zeros + line,
                chunk * _CHUNK, K, N, groups, GROUP, RUN, ZEROS, WHOLE,
            )  # fmt: skip
        own, there = m.to(tl.int64)[None, :], (m < stop)[None, :]
        if SPLIT > 1:
            tile = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
            total, done = joined(
                total, parts + own * N + n[:, None], N.to(tl.int64) * rows, part, arrived + tile,
                there & (n < N)[:, None], SPLIT,
            )  # fmt: skip
            there = there & done
        result = _ended(total, bias + expert * N, line, kind, BIAS, GATED, BN, BM)
        HALVES: tl.constexpr = 2 if GATED else 1
        to, width = tl.program_id(1) * (BN // HALVES) + tl.arange(0, BN // HALVES), N // HALVES
        tl.store(out + own * width + to[:, None], result, mask=there & (to < width)[:, None])
