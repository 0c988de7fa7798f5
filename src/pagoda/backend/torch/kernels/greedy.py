"""The likeliest token of each row of logits in Triton: parts of the vocabulary side by side, then the best of them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagoda.backend.torch.kernels import launch
from pagoda.backend.torch.kernels.launch import await_others, block_of

PART = 8192
"""Tokens that one program looks at."""
_NONE = tl.constexpr(1 << 30)


@triton.jit
def _best_of_part(
    logits: tl.tensor,
    best: tl.tensor,
    ids: tl.tensor,
    size: tl.tensor,
    stride: tl.tensor,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    await_others(CHAINED)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = part * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(logits + row * stride + at, mask=at < size, other=float("-inf")).to(tl.float32)
    values = tl.where(values != values, float("inf"), values)  # a row with no number in it gives no token
    most = tl.max(values, axis=0)
    place = row * tl.num_programs(1) + part
    tl.store(best + place, most)
    tl.store(ids + place, tl.min(tl.where(values == most, at, _NONE), axis=0))


@triton.jit
def _best_of_parts(
    best: tl.tensor,
    ids: tl.tensor,
    given: tl.tensor,
    out: tl.tensor,
    parts: tl.tensor,
    BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    await_others(CHAINED)
    row, rows, at = tl.program_id(0).to(tl.int64), tl.num_programs(0), tl.arange(0, BLOCK)
    values = tl.load(best + row * parts + at, mask=at < parts, other=float("-inf"))
    most = tl.max(values, axis=0)
    found = tl.load(ids + row * parts + at, mask=at < parts, other=_NONE)
    token = tl.min(tl.where(values == most, found, _NONE), axis=0).to(tl.int64)
    usable = (most < float("inf")) & (most > float("-inf"))
    target = tl.load(given + row)
    tl.store(out + row, tl.where(target >= 0, target, tl.where(usable, token, -1)))
    tl.store(out + rows + row, usable.to(tl.int64))


def greedy(logits: Tensor, targets: Tensor) -> Tensor:
    """int64 [2, n] for logits [n, vocab] of any float type: the token of each row (`targets` [n] where it is given,
    the lower id of two alike, -1 where no number is finite), and whether the row is usable.
    """
    rows, size = logits.shape
    parts = triton.cdiv(size, PART)
    best = torch.empty(rows, parts, dtype=torch.float32, device=logits.device)
    ids = torch.empty(rows, parts, dtype=torch.int32, device=logits.device)
    out = torch.empty(2, rows, dtype=torch.int64, device=logits.device)
    if rows:
        _best_of_part[(rows, parts)](
            logits, best, ids, size, logits.stride(0), BLOCK=PART, num_warps=8, **launch.chained(logits.device)
        )
        _best_of_parts[(rows,)](
            best, ids, targets, out, parts, BLOCK=block_of(parts), num_warps=1, **launch.chained(logits.device)
        )
    return out
