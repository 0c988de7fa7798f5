"""Which tokens go to which expert, and what they get from them, in Triton: a kernel before the products, one behind."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagoda.backend.torch.batch import Routed
from pagoda.backend.torch.kernels import launch
from pagoda.backend.torch.kernels.launch import await_others, block_of, warps_for

MOST_VALUES = 1 << 14
"""Logits of so many tokens times experts are in the registers of one program."""
_BLOCK = 1024


@triton.jit(do_not_specialize=["count"])
def _route(
    logits: tl.tensor,
    shares: tl.tensor,
    starts: tl.tensor,
    tokens: tl.tensor,
    owners: tl.tensor,
    places: tl.tensor,
    count: tl.tensor,
    experts: tl.tensor,
    ACTIVE: tl.constexpr,
    NORMALIZED: tl.constexpr,
    T: tl.constexpr,
    E: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    await_others(CHAINED)
    token, expert = tl.arange(0, T), tl.arange(0, E)
    there = (token < count)[:, None] & (expert < experts)[None, :]
    values = tl.load(logits + token[:, None] * experts + expert[None, :], mask=there, other=float("-inf"))
    values = values.to(tl.float32)
    values = tl.where(there & (values == values), values, float("-inf"))
    top = tl.max(values, axis=1)
    top = tl.where(top > float("-inf"), top, 0.0)
    weights = tl.where(there, tl.exp(values - top[:, None]), -1.0)
    total = tl.sum(tl.where(there, weights, 0.0), axis=1)
    # the likeliest of those that are left, again and again; of two alike the first
    left, taken = weights, tl.zeros((T,), tl.float32)
    for _ in tl.static_range(ACTIVE):
        best = tl.argmax(left, axis=1)
        mine = expert[None, :] == best[:, None]
        taken += tl.sum(tl.where(mine, weights, 0.0), axis=1)
        left = tl.where(mine, -2.0, left)
    chosen = ((left == -2.0) & there).to(tl.int32)
    counts = tl.sum(chosen, axis=0)
    first = tl.cumsum(counts, axis=0) - counts
    tl.store(starts + expert, first, mask=expert < experts)
    tl.store(starts + experts, count * ACTIVE)
    place = first[None, :] + tl.cumsum(chosen, axis=0) - chosen
    scale = taken if NORMALIZED else total
    left = weights
    for each in tl.static_range(ACTIVE):
        best = tl.argmax(left, axis=1)
        mine = expert[None, :] == best[:, None]
        at, own = tl.sum(tl.where(mine, place, 0), axis=1), tl.sum(tl.where(mine, weights, 0.0), axis=1)
        tl.store(shares + token * ACTIVE + each, own / scale, mask=token < count)
        tl.store(places + token * ACTIVE + each, at, mask=token < count)
        tl.store(tokens + at, token, mask=token < count)
        tl.store(owners + at, best, mask=token < count)
        left = tl.where(mine, -2.0, left)


@triton.jit
def _combine(
    rows: tl.tensor,
    places: tl.tensor,
    shares: tl.tensor,
    out: tl.tensor,
    size: tl.tensor,
    ACTIVE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    await_others(CHAINED)
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for each in tl.static_range(ACTIVE):
        place = tl.load(places + token * ACTIVE + each).to(tl.int64)
        share = tl.load(shares + token * ACTIVE + each)
        total += tl.load(rows + place * size + at, mask=at < size, other=0.0).to(tl.float32) * share
    tl.store(out + token * size + at, total.to(out.dtype.element_ty), mask=at < size)


def fits(logits: Tensor) -> bool:
    """Whether `route` takes so many logits."""
    tokens, experts = logits.shape
    return 0 < tokens and block_of(tokens) * block_of(experts) <= MOST_VALUES


def route(logits: Tensor, active: int, normalized: bool) -> Routed:
    """See ops.routed."""
    count, experts = logits.shape
    size, device = count * active, logits.device
    shares = torch.empty(count, active, dtype=torch.float32, device=device)
    numbers = torch.empty(experts + 1 + 3 * size, dtype=torch.int32, device=device)
    starts, tokens, owners, places = torch.split(numbers, [experts + 1, size, size, size])
    # few sizes, as each is a compilation; a single stream has its own
    block = (1 if count == 1 else block_of(count), block_of(experts))
    _route[(1,)](
        logits.contiguous(), shares, starts, tokens, owners, places, count, experts, ACTIVE=active,
        NORMALIZED=normalized, T=block[0], E=block[1], num_warps=max(4, 2 * warps_for(block[0] * block[1])),
        **launch.chained(device),
    )  # fmt: skip
    return Routed(shares, starts, tokens, owners, places.view(count, active))


def combine(rows: Tensor, routed: Routed, dtype: torch.dtype) -> Tensor:
    """See ops.combined."""
    (tokens, active), size = routed.places.shape, rows.shape[1]
    out = torch.empty(tokens, size, dtype=dtype, device=rows.device)
    if tokens:
        _combine[(tokens, triton.cdiv(size, _BLOCK))](
            rows, routed.places, routed.shares, out, size, ACTIVE=active, BLOCK=_BLOCK, num_warps=4,
            **launch.chained(rows.device),
        )  # fmt: skip
    return out
