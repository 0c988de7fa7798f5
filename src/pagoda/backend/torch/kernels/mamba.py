"""A state space in Triton: its convolution by channels, then a loop over the tokens of a request for some columns of a
head's state, then its gate and norm."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagoda.arch.mamba import Mamba
from pagoda.backend.torch.batch import Batch
from pagoda.backend.torch.kernels.delta import _convolved, _keep, _kept

_COLUMNS, _CHANNELS = 32, 128


@triton.jit
def _convolve(
    x: tl.tensor,
    out: tl.tensor,
    taps: tl.tensor,
    bias: tl.tensor,
    pasts: tl.tensor,
    starts: tl.tensor,
    contexts: tl.tensor,
    slots: tl.tensor,
    kept: tl.tensor,
    pitch: tl.tensor,
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
        source, _, _ = _kept(kept, r, tl.load(slots + r).to(tl.int64), tl.load(contexts + r) - count, KEPT)
        x += first.to(tl.int64) * pitch
        out += first.to(tl.int64) * WIDTH
        past = pasts + source * (KERNEL - 1) * WIDTH
        start = tl.load(bias + at, mask=inside, other=0.0)
        for t in range(0, count):
            y = _convolved(x, past, taps, start, t, fresh, at, inside, pitch, WIDTH, KERNEL)
            tl.store(out + t * WIDTH + at, y, mask=inside)


@triton.jit
def _scan(
    mixed: tl.tensor,
    decays: tl.tensor,
    out: tl.tensor,
    rate: tl.tensor,
    dt: tl.tensor,
    skip: tl.tensor,
    states: tl.tensor,
    starts: tl.tensor,
    contexts: tl.tensor,
    slots: tl.tensor,
    kept: tl.tensor,
    pitch: tl.tensor,
    GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEPT: tl.constexpr,
) -> None:
    r, head, column = tl.program_id(0), tl.program_id(1), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    WIDTH: tl.constexpr = 2 * GROUPS * KEY_DIM + HEADS * VALUE_DIM
    first = tl.load(starts + r)
    count = tl.load(starts + r + 1) - first
    if count > 0:
        fresh = (tl.load(contexts + r) == count).to(tl.int32)
        slot = tl.load(slots + r).to(tl.int64)
        source, to, end = _kept(kept, r, slot, tl.load(contexts + r) - count, KEPT)
        mixed += first.to(tl.int64) * WIDTH
        decays += first.to(tl.int64) * pitch + head
        out += first.to(tl.int64) * HEADS * VALUE_DIM + head * VALUE_DIM
        keys = tl.arange(0, KEYS)
        key_inside, inside = keys < KEY_DIM, column < VALUE_DIM
        q_at = head // (HEADS // GROUPS) * KEY_DIM + keys
        states += head * KEY_DIM * VALUE_DIM + keys[:, None] * VALUE_DIM + column[None, :]
        STATE: tl.constexpr = HEADS * KEY_DIM * VALUE_DIM
        held = key_inside[:, None] & inside[None, :]
        s = tl.load(states + source * STATE, mask=held & (fresh == 0), other=0.0)
        head_rate, head_dt, head_skip = tl.load(rate + head), tl.load(dt + head), tl.load(skip + head)
        for t in range(0, count):
            row = mixed + t * WIDTH
            q = tl.load(row + q_at, mask=key_inside, other=0.0)
            k = tl.load(row + GROUPS * KEY_DIM + q_at, mask=key_inside, other=0.0)
            v = tl.load(row + 2 * GROUPS * KEY_DIM + head * VALUE_DIM + column, mask=inside, other=0.0)
            slow = tl.load(decays + t * pitch).to(tl.float32) + head_dt
            step = tl.where(slow > 20.0, slow, tl.log(1.0 + tl.exp(tl.minimum(slow, 20.0))))
            s = s * tl.exp(-head_rate * step) + k[:, None] * (step * v)[None, :]
            y = tl.sum(s * q[:, None], axis=0) + head_skip * v
            tl.store(out + t * HEADS * VALUE_DIM + column, y, mask=inside)
            if KEPT:
                if t + 1 == end:
                    tl.store(states + to * STATE, s, mask=held)
        tl.store(states + slot * STATE, s, mask=held)


@triton.jit
def _norm_gated(
    y: tl.tensor,
    x: tl.tensor,
    norm: tl.tensor,
    out: tl.tensor,
    eps: tl.tensor,
    pitch: tl.tensor,
    Z: tl.constexpr,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token, group, at = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK)
    inside = at < DIM
    z = tl.load(x + token * pitch + Z + group * DIM + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(y + (token * GROUPS + group) * DIM + at, mask=inside, other=0.0) * (z / (1.0 + tl.exp(-z)))
    scale = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / DIM + eps)
    value = value * scale * tl.load(norm + group * DIM + at, mask=inside, other=0.0)
    tl.store(out + (token * GROUPS + group) * DIM + at, value.to(out.dtype.element_ty), mask=inside)


def state_space(
    x: Tensor,
    d: Mamba,
    weights: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
    states: tuple[Tensor, Tensor],
    batch: Batch,
) -> Tensor:
    """See torch.delta.StateSpace; `weights` are its taps, bias, rate, dt, skip and norm."""
    taps, bias, rate, dt, skip, norm = weights
    x, (pasts, s) = x.contiguous(), states
    pitch, requests, keeps = x.shape[1], len(batch.contexts), batch.kept is not None
    kept = batch.slots if batch.kept is None else batch.kept
    mixed = torch.zeros(len(x), d.width, dtype=torch.float32, device=x.device)
    y = torch.zeros(len(x), d.value_width, dtype=torch.float32, device=x.device)
    out = torch.empty(len(x), d.value_width, dtype=x.dtype, device=x.device)
    if not len(x):
        return out
    columns, each = min(_COLUMNS, triton.next_power_of_2(d.value_dim)), d.value_width // d.groups
    step = (batch.starts, batch.contexts, batch.slots, kept, pitch)
    _convolve[(requests, triton.cdiv(d.width, _CHANNELS))](
        x, mixed, taps, bias, pasts, *step, WIDTH=d.width, KERNEL=d.kernel, BLOCK=_CHANNELS, KEPT=keeps, num_warps=4
    )
    _scan[(requests, d.value_heads, triton.cdiv(d.value_dim, columns))](
        mixed, x[:, d.width + d.value_width :], y, rate, dt, skip, s, *step, GROUPS=d.groups, HEADS=d.value_heads,
        KEY_DIM=d.key_dim, VALUE_DIM=d.value_dim, KEYS=triton.next_power_of_2(d.key_dim), COLUMNS=columns, KEPT=keeps,
        num_warps=4,
    )  # fmt: skip
    _keep[(requests, triton.cdiv(d.width, 256))](
        x, pasts, *step, WIDTH=d.width, KERNEL=d.kernel, BLOCK=256, KEPT=keeps, num_warps=4
    )
    _norm_gated[(len(x), d.groups)](
        y, x, norm, out, d.eps, pitch, Z=d.width, GROUPS=d.groups, DIM=each, BLOCK=triton.next_power_of_2(each),
        num_warps=4,
    )  # fmt: skip
    return out
