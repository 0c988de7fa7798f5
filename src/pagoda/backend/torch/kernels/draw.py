"""Tokens drawn from rows of logits in Triton: the weights of parts of the vocabulary side by side, then one draw."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagoda.backend.torch.kernels import launch
from pagoda.backend.torch.kernels.greedy import PART, _best_of_part
from pagoda.backend.torch.kernels.launch import await_others, block_of
from pagoda.backend.torch.sampling import Sampling

_NONE = tl.constexpr(1 << 30)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _order(values: tl.tensor) -> tl.tensor:
    """Numbers in the order of float32 values, of which the two zeros are one. See sampling.ranks."""
    bits = values.to(tl.int32, bitcast=True)
    return tl.where(values == 0.0, 0, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)).to(tl.int64)


@triton.jit
def _weights(
    logits: tl.tensor,
    cuts: tl.tensor,
    at: tl.tensor,
    size: tl.tensor,
    top: tl.tensor,
    temperature: tl.tensor,
    min_p: tl.tensor,
    CUT: tl.constexpr,
) -> tl.tensor:
    """float64 weights of the tokens `at` of a row, next to 1 for the likeliest; 0 for those that may not be drawn."""
    values = tl.load(logits + at, mask=at < size, other=float("-inf")).to(tl.float32)
    scale = tl.maximum(temperature.to(tl.float64), _TINY)
    weights = tl.exp((values.to(tl.float64) - top.to(tl.float64)) / scale)
    kept = (at < size) & (weights >= min_p.to(tl.float64))
    if CUT:
        kept = kept & ((_order(values) << 32) + (4294967295 - at.to(tl.int64)) >= tl.load(cuts))
    return tl.where(kept, weights, 0.0)


@triton.jit
def _top(best: tl.tensor, parts: tl.tensor, PARTS: tl.constexpr) -> tl.tensor:
    at = tl.arange(0, PARTS)
    return tl.max(tl.load(best + at, mask=at < parts, other=float("-inf")), axis=0)


@triton.jit
def _weigh(
    logits: tl.tensor,
    cuts: tl.tensor,
    best: tl.tensor,
    temperatures: tl.tensor,
    min_ps: tl.tensor,
    sums: tl.tensor,
    size: tl.tensor,
    stride: tl.tensor,
    CUT: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    await_others(CHAINED)
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    at, top = part * BLOCK + tl.arange(0, BLOCK), _top(best + row * parts, parts, PARTS)
    own, heat, least = logits + row * stride, tl.load(temperatures + row), tl.load(min_ps + row)
    tl.store(sums + row * parts + part, tl.sum(_weights(own, cuts + row, at, size, top, heat, least, CUT), axis=0))


@triton.jit
def _draw(
    logits: tl.tensor,
    cuts: tl.tensor,
    best: tl.tensor,
    ids: tl.tensor,
    temperatures: tl.tensor,
    min_ps: tl.tensor,
    seeds: tl.tensor,
    positions: tl.tensor,
    given: tl.tensor,
    sums: tl.tensor,
    out: tl.tensor,
    size: tl.tensor,
    stride: tl.tensor,
    parts: tl.tensor,
    CUT: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    await_others(CHAINED)
    row, each = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS)
    top, heat = _top(best + row * parts, parts, PARTS), tl.load(temperatures + row)
    usable = (top < float("inf")) & (top > float("-inf"))
    found = tl.load(ids + row * parts + each, mask=each < parts, other=_NONE)
    highest = tl.load(best + row * parts + each, mask=each < parts, other=float("-inf"))
    token = tl.min(tl.where(highest == top, found, _NONE), axis=0).to(tl.int64)
    if usable & (heat > 0.0):
        weights = tl.load(sums + row * parts + each, mask=each < parts, other=0.0)
        ends = tl.cumsum(weights, axis=0)
        word, _, _, _ = tl.philox(tl.load(seeds + row), tl.load(positions + row).to(tl.uint32), 0, 0, 0)
        target = (word >> 8).to(tl.float64) * 5.9604644775390625e-08 * tl.max(ends, axis=0)
        last = tl.max(tl.where(weights > 0.0, each, 0), axis=0)
        part = tl.minimum(tl.sum((ends <= target).to(tl.int32), axis=0), last)
        before = tl.sum(tl.where(each == part, ends - weights, 0.0), axis=0)
        at, least = part * BLOCK + tl.arange(0, BLOCK), tl.load(min_ps + row)
        own = _weights(logits + row * stride, cuts + row, at, size, top, heat, least, CUT)
        within = tl.sum((before + tl.cumsum(own, axis=0) <= target).to(tl.int32), axis=0)
        # sums of another order may end a hair before the target
        token = tl.minimum(part * BLOCK + within, tl.max(tl.where(own > 0.0, at, 0), axis=0)).to(tl.int64)
    target_token = tl.load(given + row)
    tl.store(out + row, tl.where(target_token >= 0, target_token, tl.where(usable, token, -1)))
    tl.store(out + tl.num_programs(0) + row, usable.to(tl.int64))


def drawn(logits: Tensor, targets: Tensor, how: Sampling, cuts: Tensor | None) -> Tensor:
    """As `greedy`, with a draw for the rows of a temperature; `cuts` as sampling.cuts gives them."""
    rows, size = logits.shape
    parts, device = triton.cdiv(size, PART), logits.device
    best = torch.empty(rows, parts, dtype=torch.float32, device=device)
    ids = torch.empty(rows, parts, dtype=torch.int32, device=device)
    sums = torch.empty(rows, parts, dtype=torch.float64, device=device)
    out = torch.empty(2, rows, dtype=torch.int64, device=device)
    if rows:
        limits, stride, chained = targets if cuts is None else cuts, logits.stride(0), launch.chained(device)
        shape = {"CUT": cuts is not None, "BLOCK": PART, "PARTS": block_of(parts)}
        _best_of_part[(rows, parts)](logits, best, ids, size, stride, BLOCK=PART, num_warps=8, **chained)
        _weigh[(rows, parts)](
            logits, limits, best, how.temperature, how.min_p, sums, size, stride, **shape, num_warps=8, **chained
        )
        _draw[(rows,)](
            logits, limits, best, ids, how.temperature, how.min_p, how.seed, how.position, targets, sums, out, size,
            stride, parts, **shape, num_warps=16, **chained,
        )  # fmt: skip
    return out
