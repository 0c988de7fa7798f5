"""Where a top-p ends, in Triton: the least key (see sampling.ranks) of each row that is kept, found without sorting.

The values of a float, in their order, are cut into 16 parts; that in which the weights, summed from the likeliest on,
reach the share is cut again, eight times until it is a single value. Of the tokens that have this value the first ones
by their ids are kept, as many as it takes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagoda.backend.torch.kernels import launch
from pagoda.backend.torch.kernels.draw import _order, _top, _weights
from pagoda.backend.torch.kernels.greedy import PART, _best_of_part
from pagoda.backend.torch.kernels.launch import await_others, block_of
from pagoda.backend.torch.sampling import Sampling

_WAYS = tl.constexpr(16)
_BITS = 4
_LEAST = tl.constexpr(-(1 << 31))
_ALL = torch.iinfo(torch.int64).min


@triton.jit
def _narrowed(
    sums: tl.tensor,
    begin: tl.tensor,
    above: tl.tensor,
    target: tl.tensor,
    share: tl.tensor,
    row: tl.tensor,
    parts: tl.tensor,
    shift: tl.tensor,
    SECOND: tl.constexpr,
    PARTS: tl.constexpr,
) -> Any:
    """Of 16 intervals, `shift` bits wide each, the one in which the target is reached: where it begins, the weight
    above it; and the target, which follows from the first sums."""
    way, each = tl.arange(0, _WAYS), tl.arange(0, PARTS)
    place = (row * parts + each)[:, None] * _WAYS + way[None, :]
    own = tl.sum(tl.load(sums + place, mask=(each < parts)[:, None], other=0.0), axis=0)
    if SECOND:
        target = share.to(tl.float64) * tl.sum(own, axis=0)
    reach = above + tl.sum(tl.where(way[None, :] >= way[:, None], own[None, :], 0.0), axis=1)
    found = tl.max(tl.where(reach >= target, way, -1), axis=0)
    # sums of another order may end a hair before the target
    found = tl.where(found < 0, tl.min(tl.where(own > 0.0, way, _WAYS - 1), axis=0), found)
    above += tl.sum(tl.where(way > found, own, 0.0), axis=0)
    return begin + (found.to(tl.int64) << shift), above, target


@triton.jit(do_not_specialize=["shift"])
def _narrow(
    logits: tl.tensor,
    best: tl.tensor,
    temperatures: tl.tensor,
    top_ps: tl.tensor,
    top_ks: tl.tensor,
    sums: tl.tensor,
    begins: tl.tensor,
    states: tl.tensor,
    to_sums: tl.tensor,
    to_begins: tl.tensor,
    to_states: tl.tensor,
    size: tl.tensor,
    stride: tl.tensor,
    shift: tl.tensor,
    ROUND: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """One part of a row: the weights of 16 intervals, each `shift` bits wide. ROUND 0: of all values there are; else of
    the interval that the round before has found. `states` [rows, 2]: the weight above, the target."""
    await_others(CHAINED)
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    heat, share = tl.load(temperatures + row), tl.load(top_ps + row)
    if (share < 1.0) & (heat > 0.0) & (tl.load(top_ks + row) == 0):
        begin = row * 0 + _LEAST
        if ROUND > 0:
            above, target = tl.load(states + row * 2), tl.load(states + row * 2 + 1)
            begin, above, target = _narrowed(
                sums, tl.load(begins + row), above, target, share, row, parts, shift + 4, ROUND == 1, PARTS
            )
            if part == 0:
                tl.store(to_states + row * 2, above)
                tl.store(to_states + row * 2 + 1, target)
        if part == 0:
            tl.store(to_begins + row, begin)
            if ROUND == 0:
                tl.store(to_states + row * 2, share.to(tl.float64) * 0.0)
        at, own = part * BLOCK + tl.arange(0, BLOCK), logits + row * stride
        weights = _weights(own, top_ks, at, size, _top(best + row * parts, parts, PARTS), heat, heat * 0.0, False)
        values = tl.load(own + at, mask=at < size, other=float("-inf")).to(tl.float32)
        way = (_order(values) - begin) >> shift
        for each in tl.static_range(_WAYS):
            total = tl.sum(tl.where(way == each, weights, 0.0), axis=0)
            tl.store(to_sums + (row * parts + part) * _WAYS + each, total)


@triton.jit
def _count(
    logits: tl.tensor,
    temperatures: tl.tensor,
    top_ps: tl.tensor,
    top_ks: tl.tensor,
    sums: tl.tensor,
    begins: tl.tensor,
    states: tl.tensor,
    counts: tl.tensor,
    to_begins: tl.tensor,
    to_states: tl.tensor,
    size: tl.tensor,
    stride: tl.tensor,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """How many tokens of a part have the value that was found."""
    await_others(CHAINED)
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    share = tl.load(top_ps + row)
    if (share < 1.0) & (tl.load(temperatures + row) > 0.0) & (tl.load(top_ks + row) == 0):
        above, target = tl.load(states + row * 2), tl.load(states + row * 2 + 1)
        begin, above, target = _narrowed(
            sums, tl.load(begins + row), above, target, share, row, parts, part * 0, False, PARTS
        )
        if part == 0:
            tl.store(to_begins + row, begin)
            tl.store(to_states + row * 2, above)
            tl.store(to_states + row * 2 + 1, target)
        at = part * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(logits + row * stride + at, mask=at < size, other=float("-inf")).to(tl.float32)
        alike = (at < size) & (_order(values) == begin)
        tl.store(counts + row * parts + part, tl.sum(alike.to(tl.int32), axis=0))


@triton.jit
def _cut(
    logits: tl.tensor,
    best: tl.tensor,
    temperatures: tl.tensor,
    top_ps: tl.tensor,
    top_ks: tl.tensor,
    counts: tl.tensor,
    begins: tl.tensor,
    states: tl.tensor,
    cuts: tl.tensor,
    size: tl.tensor,
    stride: tl.tensor,
    parts: tl.tensor,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    """The key of the last token that is kept."""
    await_others(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    heat = tl.load(temperatures + row)
    if (tl.load(top_ps + row) < 1.0) & (heat > 0.0) & (tl.load(top_ks + row) == 0):
        begin, above, target = tl.load(begins + row), tl.load(states + row * 2), tl.load(states + row * 2 + 1)
        each = tl.arange(0, PARTS)
        own = tl.load(counts + row * parts + each, mask=each < parts, other=0)
        ends = tl.cumsum(own, axis=0)
        first = tl.min(tl.where(own > 0, each, PARTS - 1), axis=0)
        # the weight of one of them, taken from the first part that has any
        at = first * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(logits + row * stride + at, mask=at < size, other=float("-inf")).to(tl.float32)
        top = _top(best + row * parts, parts, PARTS)
        weights = _weights(logits + row * stride, top_ks, at, size, top, heat, heat * 0.0, False)
        weight = tl.max(tl.where((at < size) & (_order(values) == begin), weights, 0.0), axis=0)
        most = tl.max(ends, axis=0)
        wanted = tl.where(weight > 0.0, tl.ceil((target - above) / weight), 1.0)
        wanted = tl.minimum(tl.maximum(wanted, 1.0), most.to(tl.float64)).to(tl.int32)
        part = tl.min(tl.where(ends >= wanted, each, PARTS - 1), axis=0)
        wanted -= tl.sum(tl.where(each < part, own, 0), axis=0)
        at = part * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(logits + row * stride + at, mask=at < size, other=float("-inf")).to(tl.float32)
        alike = (at < size) & (_order(values) == begin)
        before = tl.cumsum(alike.to(tl.int32), axis=0)
        last = tl.max(tl.where(alike & (before <= wanted), at, 0), axis=0)
        tl.store(cuts + row, (begin << 32) + (4294967295 - last.to(tl.int64)))


def nucleus(logits: Tensor, how: Sampling) -> Tensor:
    """int64 [n]: as sampling.cuts for the rows of a top-p without a top-k; for the others what keeps all."""
    (rows, size), device = logits.shape, logits.device
    parts, chained, stride = triton.cdiv(size, PART), launch.chained(device), logits.stride(0)
    out = torch.full((rows,), _ALL, dtype=torch.int64, device=device)
    if not rows:
        return out
    best = torch.empty(rows, parts, dtype=torch.float32, device=device)
    ids, counts = (torch.empty(rows, parts, dtype=torch.int32, device=device) for _ in range(2))
    sums = torch.empty(2, rows, parts, _WAYS.value, dtype=torch.float64, device=device)
    # both begin where a kernel expects it: elsewhere it would be compiled once more
    begins = torch.empty(2, rows + rows % 2, dtype=torch.int64, device=device)
    states = torch.empty(2, rows, 2, dtype=torch.float64, device=device)
    shape = {"BLOCK": PART, "PARTS": block_of(parts), "num_warps": 8, **chained}
    grid, given = (rows, parts), (how.temperature, how.top_p, how.top_k)
    _best_of_part[grid](logits, best, ids, size, stride, BLOCK=PART, num_warps=8, **chained)
    old, new = 1, 0
    for turn, shift in enumerate(range(32 - _BITS, -1, -_BITS)):
        _narrow[grid](
            logits, best, *given, sums[old], begins[old], states[old], sums[new], begins[new], states[new], size,
            stride, shift, ROUND=min(turn, 2), **shape,
        )  # fmt: skip
        old, new = new, old
    _count[grid](
        logits, *given, sums[old], begins[old], states[old], counts, begins[new], states[new], size, stride, **shape
    )
    _cut[(rows,)](
        logits, best, *given, counts, begins[new], states[new], out, size, stride, parts, **shape | {"num_warps": 16}
    )
    return out
