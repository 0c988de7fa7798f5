"""The product of one row and a matrix in Triton, with the norm before it and the activation behind it where they are.

It is bound by the reading of the weight, so no matrix unit is asked, and the next part of the weight is on its way
while one is used: the first even before the norm.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pagoda.backend.torch.kernels import fp8
from pagoda.backend.torch.kernels.activation import SILU, activated
from pagoda.backend.torch.kernels.launch import await_others, fetch_ahead
from pagoda.backend.torch.kernels.product import DENSE, F8, W8

_UNIT = tl.constexpr(16)
"""Inputs that are summed before their scale is applied: each thread has whole ones."""
_AHEAD_LINES = tl.constexpr(128)
"""Of 128 bytes, that a program fetches before it may begin: all that are there at once fill half of the cache."""


@triton.jit
def _load(base: tl.tensor, k: tl.tensor, K: tl.tensor, WHOLE: tl.constexpr) -> tl.tensor:
    """Values at k; those from K on, where there may be any, are 0."""
    return tl.load(base + k) if WHOLE else tl.load(base + k, mask=k < K, other=0.0)


@triton.jit
def _part(
    codes: tl.tensor,
    values: tl.tensor,
    scales: tl.tensor,
    zeros: tl.tensor,
    line: tl.tensor,
    begin: tl.tensor,
    K: tl.tensor,
    columns: tl.tensor,
    KIND: tl.constexpr,
    ZERO: tl.constexpr,
    GROUP: tl.constexpr,
) -> tl.tensor:
    """Codes [BN, BK] times values [BK], summed over units of inputs, times the scales where those go by group."""
    BN: tl.constexpr = codes.shape[0]
    UNITS: tl.constexpr = codes.shape[1] // _UNIT
    if KIND == W8:
        # or'ed into the bits of 2^23, and that taken off again
        codes = (((codes.to(tl.int32) & 255) ^ 128) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0
    codes = tl.reshape(fp8.floats(codes, tl.float32), (BN, UNITS, _UNIT))
    units = tl.reshape(values, (1, UNITS, _UNIT))
    part = tl.sum(codes * units, axis=2)
    if GROUP:
        first = begin + tl.arange(0, UNITS)[None, :] * _UNIT
        place = line // GROUP * columns + first // GROUP if KIND == F8 else first // GROUP * columns + line
        if ZERO:
            part -= tl.load(zeros + place, mask=first < K, other=0.0).to(tl.float32) * tl.sum(units, axis=2)
        part *= tl.load(scales + place, mask=first < K, other=0.0).to(tl.float32)
    elif ZERO:
        part -= tl.load(zeros + line).to(tl.float32) * tl.sum(units, axis=2)
    return part


@triton.jit
def _gemv(
    x: tl.tensor, residual: tl.tensor, norm: tl.tensor, total: tl.tensor, weight: tl.tensor, scales: tl.tensor,
    zeros: tl.tensor, out: tl.tensor, N: tl.tensor, K: tl.tensor, columns: tl.tensor, eps: tl.tensor,
    KIND: tl.constexpr, ZERO: tl.constexpr, BY_ROW: tl.constexpr, GROUP: tl.constexpr, NORM: tl.constexpr,
    GATED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WHOLE: tl.constexpr, ALL: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:  # fmt: skip
    """out [N] = weight times x [K]; GROUP inputs share a scale (0: all), which is by output where BY_ROW.
    NORM: total = x + residual, which is normed first. GATED: silu(first half) * second half of 2 * N products."""
    n, each = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    line = tl.minimum(n, N - 1).to(tl.int64)[:, None]
    kind: tl.constexpr = out.dtype.element_ty
    AHEAD: tl.constexpr = KIND == DENSE  # bytes would be taken apart to be carried from one round to the next
    own, other = weight + line * K, weight + (line + N) * K
    if AHEAD:
        codes = _load(own, each[None, :], K, WHOLE)
        more = _load(other, each[None, :], K, WHOLE) if GATED else codes
    # the rest goes to the cache that all share: the kernel in front may leave the memory idle, as attention does
    _fetch(weight, n, N, K, BK if AHEAD else 0, GATED, ALL, CHAINED)
    await_others(CHAINED)
    scale = _root(x, residual, total, K, eps, kind, ALL) if NORM else 1.0
    acc, up = tl.zeros((BN, BK // _UNIT), tl.float32), tl.zeros((BN, BK // _UNIT), tl.float32)
    for begin in range(0, K, BK):
        k = begin + each
        if AHEAD:
            # behind the end the last part is read once more
            following = (tl.minimum(begin + BK, K - BK) if WHOLE else begin + BK) + each[None, :]
            coming = _load(own, following, K, WHOLE)
            follows = _load(other, following, K, WHOLE) if GATED else coming
        else:
            codes = _load(own, k[None, :], K, WHOLE)
            more = _load(other, k[None, :], K, WHOLE) if GATED else codes
        values = _inputs(x, residual, norm, scale, k, K, kind, NORM, WHOLE)
        acc += _part(codes, values, scales, zeros, line, begin, K, columns, KIND, ZERO, GROUP)
        if GATED:
            up += _part(more, values, scales, zeros, line + N, begin, K, columns, KIND, ZERO, GROUP)
        if AHEAD:
            codes, more = coming, follows
    result = _scaled(acc, scales, line, KIND, BY_ROW, GROUP)
    if GATED:
        # of the products as they would be stored
        gate, up = result.to(kind), _scaled(up, scales, line + N, KIND, BY_ROW, GROUP).to(kind)
        result = activated(gate.to(tl.float32), up.to(tl.float32), SILU)
    tl.store(out + n, result.to(kind), mask=n < N)


@triton.jit
def _fetch(
    weight: tl.tensor,
    n: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    BEGIN: tl.constexpr,
    GATED: tl.constexpr,
    ALL: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """Some of the inputs from BEGIN on of the rows of a program."""
    WIDTH: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // 8
    MOST: tl.constexpr = _AHEAD_LINES // (n.shape[0] * (2 if GATED else 1))
    LINES: tl.constexpr = ALL * WIDTH // 128 if ALL * WIDTH // 128 < MOST else MOST
    if LINES > 0 and BEGIN < ALL:
        own, nbytes = weight + tl.minimum(n, N - 1).to(tl.int64) * K + BEGIN, (K - BEGIN) * WIDTH
        fetch_ahead(own.to(tl.int64), nbytes, LINES, CHAINED)
        if GATED:
            fetch_ahead((own + N.to(tl.int64) * K).to(tl.int64), nbytes, LINES, CHAINED)


@triton.jit
def _added(
    x: tl.tensor, residual: tl.tensor, k: tl.tensor, K: tl.tensor, kind: tl.constexpr, WHOLE: tl.constexpr
) -> tl.tensor:
    """x + residual, rounded to the type of both."""
    return (_load(x, k, K, WHOLE).to(tl.float32) + _load(residual, k, K, WHOLE).to(tl.float32)).to(kind)


@triton.jit
def _root(
    x: tl.tensor,
    residual: tl.tensor,
    total: tl.tensor,
    K: tl.tensor,
    eps: tl.tensor,
    kind: tl.constexpr,
    ALL: tl.constexpr,
) -> tl.tensor:
    """1 / the root mean square of x + residual, a sum that the first program stores."""
    at = tl.arange(0, ALL)
    rounded = _added(x, residual, at, K, kind, False)
    if tl.program_id(0) == 0:
        tl.store(total + at, rounded, mask=at < K)
    exact = rounded.to(tl.float32)
    return tl.rsqrt(tl.sum(exact * exact, axis=0) / K + eps)


@triton.jit
def _inputs(
    x: tl.tensor,
    residual: tl.tensor,
    norm: tl.tensor,
    scale: tl.tensor,
    k: tl.tensor,
    K: tl.tensor,
    kind: tl.constexpr,
    NORM: tl.constexpr,
    WHOLE: tl.constexpr,
) -> tl.tensor:
    values = (_added(x, residual, k, K, kind, WHOLE) if NORM else _load(x, k, K, WHOLE)).to(tl.float32)
    if NORM:
        values = (values * scale * _load(norm, k, K, WHOLE)).to(kind).to(tl.float32)
    return values


@triton.jit
def _scaled(
    acc: tl.tensor, scales: tl.tensor, line: tl.tensor, KIND: tl.constexpr, BY_ROW: tl.constexpr, GROUP: tl.constexpr
) -> tl.tensor:
    """The sums of outputs, times their scale where no group has its own."""
    total = tl.sum(acc, axis=1)
    if KIND != DENSE and GROUP == 0:
        total *= tl.load(scales + tl.reshape(line, (acc.shape[0],)) * BY_ROW).to(tl.float32)
    return total
