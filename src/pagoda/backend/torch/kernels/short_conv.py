"""A short convolution in Triton: a program goes through the tokens of a request, for some channels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagoda.arch.short_conv import ShortConv
from pagoda.backend.torch.batch import Batch
from pagoda.backend.torch.kernels.delta import _kept

_BLOCK = 128


@triton.jit
def _input(
    x: tl.tensor,
    past: tl.tensor,
    t: tl.tensor,
    fresh: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
    WIDTH: tl.constexpr,
    KERNEL: tl.constexpr,
) -> tl.tensor:
    """b * u of token t of a request, whose rows begin at x; of one before them what the state has."""
    row = x + t * 3 * WIDTH + at
    here = inside & (t >= 0)
    now = tl.load(row, mask=here, other=0.0).to(tl.float32) * tl.load(row + WIDTH, mask=here, other=0.0).to(tl.float32)
    kept = inside & (t < 0) & (fresh == 0)
    return now + tl.load(past + (t + KERNEL - 1) * WIDTH + at, mask=kept, other=0.0)


@triton.jit
def _convolve(
    x: tl.tensor,
    out: tl.tensor,
    taps: tl.tensor,
    pasts: tl.tensor,
    starts: tl.tensor,
    contexts: tl.tensor,
    slots: tl.tensor,
    kept: tl.tensor,
    WIDTH: tl.constexpr,
    KERNEL: tl.constexpr,
    BLOCK: tl.constexpr,
    KEPT: tl.constexpr,
) -> None:
    r, at = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < WIDTH
    first = tl.load(starts + r)
    count = tl.load(starts + r + 1) - first
    if count > 0:
        fresh = (tl.load(contexts + r) == count).to(tl.int32)
        slot = tl.load(slots + r).to(tl.int64)
        source, to, end = _kept(kept, r, slot, tl.load(contexts + r) - count, KEPT)
        x += first.to(tl.int64) * 3 * WIDTH
        out += first.to(tl.int64) * WIDTH
        PAST: tl.constexpr = (KERNEL - 1) * WIDTH
        past = pasts + source * PAST
        for t in range(0, count):
            total = tl.zeros((BLOCK,), dtype=tl.float32)
            for j in tl.static_range(KERNEL):
                tap = tl.load(taps + j * WIDTH + at, mask=inside, other=0.0)
                total += _input(x, past, t - (KERNEL - 1) + j, fresh, at, inside, WIDTH, KERNEL) * tap
            c = tl.load(x + t * 3 * WIDTH + 2 * WIDTH + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(out + t * WIDTH + at, (total * c).to(out.dtype.element_ty), mask=inside)
        if KEPT:
            if to >= 0:
                for j in tl.static_range(KERNEL - 1):
                    value = _input(x, past, end - (KERNEL - 1) + j, fresh, at, inside, WIDTH, KERNEL)
                    tl.store(pasts + to * PAST + j * WIDTH + at, value, mask=inside)
        for j in tl.static_range(KERNEL - 1):  # what was there moves up: each place is read before it is written
            value = _input(x, past, count - (KERNEL - 1) + j, fresh, at, inside, WIDTH, KERNEL)
            tl.store(pasts + slot * PAST + j * WIDTH + at, value, mask=inside)


def convolved(x: Tensor, shape: ShortConv, taps: Tensor, pasts: Tensor, batch: Batch) -> Tensor:
    """See torch.delta.Convolution."""
    x = x.contiguous()
    out = torch.zeros(len(x), shape.channels, dtype=x.dtype, device=x.device)
    kept = batch.slots if batch.kept is None else batch.kept
    if len(x):
        _convolve[(len(batch.contexts), triton.cdiv(shape.channels, _BLOCK))](
            x, out, taps, pasts, batch.starts, batch.contexts, batch.slots, kept, WIDTH=shape.channels,
            KERNEL=shape.kernel, BLOCK=_BLOCK, KEPT=batch.kept is not None, num_warps=4,
        )  # fmt: skip
    return out
