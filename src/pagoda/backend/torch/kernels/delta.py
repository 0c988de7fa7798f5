"""The gated delta net in Triton: a program loops over the tokens of a request, for some columns of a head's state."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagoda.arch.delta import DeltaNet
from pagoda.backend.torch.batch import Batch

_COLUMNS = 32


@triton.jit
def _convolved(
    x: tl.tensor,
    past: tl.tensor,
    taps: tl.tensor,
    start: tl.tensor,
    t: tl.tensor,
    fresh: tl.tensor,
    at: tl.tensor,
    inside: tl.tensor,
    pitch: tl.tensor,
    WIDTH: tl.constexpr,
    KERNEL: tl.constexpr,
) -> tl.tensor:
    """silu of `start` and the convolution at channels `at` of token t of a request, whose rows begin at x."""
    total = tl.load(x + t * pitch + at, mask=inside, other=0.0).to(tl.float32)
    total = start + total * tl.load(taps + (KERNEL - 1) * WIDTH + at, mask=inside, other=0.0)
    for j in tl.static_range(KERNEL - 1):
        row = t - (KERNEL - 1) + j
        now = tl.load(x + row * pitch + at, mask=inside & (row >= 0), other=0.0).to(tl.float32)
        kept = inside & (row < 0) & (fresh == 0)
        before = tl.load(past + (row + KERNEL - 1) * WIDTH + at, mask=kept, other=0.0)
        total += (now + before) * tl.load(taps + j * WIDTH + at, mask=inside, other=0.0)
    return total / (1.0 + tl.exp(-total))


@triton.jit
def _kept(
    kept: tl.tensor, r: tl.tensor, slot: tl.tensor, position: tl.tensor, KEPT: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The slot whose state a request begins with, the one that gets a copy, and behind how many of its tokens."""
    source, to, end = slot, slot, position * 0
    if KEPT:
        begin = tl.load(kept + 3 * r).to(tl.int64)
        source = tl.where(begin >= 0, begin, slot)
        to = tl.load(kept + 3 * r + 1).to(tl.int64)
        end = tl.where(to >= 0, tl.load(kept + 3 * r + 2) - position, 0)
    return source, to, end


@triton.jit
def _advance(
    x: tl.tensor,
    out: tl.tensor,
    taps: tl.tensor,
    rate: tl.tensor,
    dt: tl.tensor,
    pasts: tl.tensor,
    states: tl.tensor,
    starts: tl.tensor,
    contexts: tl.tensor,
    slots: tl.tensor,
    kept: tl.tensor,
    pitch: tl.tensor,
    scale: tl.tensor,
    KEY_HEADS: tl.constexpr,
    VALUE_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KERNEL: tl.constexpr,
    TILED: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEPT: tl.constexpr,
) -> None:
    r, head, column = tl.program_id(0), tl.program_id(1), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    WIDTH: tl.constexpr = 2 * KEY_HEADS * KEY_DIM + VALUE_HEADS * VALUE_DIM
    first = tl.load(starts + r)
    count = tl.load(starts + r + 1) - first
    if count > 0:
        fresh = (tl.load(contexts + r) == count).to(tl.int32)
        slot = tl.load(slots + r).to(tl.int64)
        source, to, end = _kept(kept, r, slot, tl.load(contexts + r) - count, KEPT)
        x += first.to(tl.int64) * pitch
        out += first.to(tl.int64) * VALUE_HEADS * VALUE_DIM + head * VALUE_DIM
        past = pasts + source * (KERNEL - 1) * WIDTH
        keys = tl.arange(0, KEYS)
        key_inside, inside = keys < KEY_DIM, column < VALUE_DIM
        key_head = head % KEY_HEADS if TILED else head // (VALUE_HEADS // KEY_HEADS)
        q_at, v_at = key_head * KEY_DIM + keys, 2 * KEY_HEADS * KEY_DIM + head * VALUE_DIM + column
        states += head * KEY_DIM * VALUE_DIM + keys[:, None] * VALUE_DIM + column[None, :]
        STATE: tl.constexpr = VALUE_HEADS * KEY_DIM * VALUE_DIM
        held = key_inside[:, None] & inside[None, :]
        s = tl.load(states + source * STATE, mask=held & (fresh == 0), other=0.0)
        head_rate, head_dt, small = tl.load(rate + head), tl.load(dt + head), WIDTH + VALUE_HEADS * VALUE_DIM + head
        for t in range(0, count):
            q = _convolved(x, past, taps, 0.0, t, fresh, q_at, key_inside, pitch, WIDTH, KERNEL)
            k = _convolved(x, past, taps, 0.0, t, fresh, KEY_HEADS * KEY_DIM + q_at, key_inside, pitch, WIDTH, KERNEL)
            v = _convolved(x, past, taps, 0.0, t, fresh, v_at, inside, pitch, WIDTH, KERNEL)
            q = q * (scale / tl.sqrt(tl.sum(q * q, axis=0) + 1e-6))
            k = k / tl.sqrt(tl.sum(k * k, axis=0) + 1e-6)
            slow = tl.load(x + t * pitch + small + VALUE_HEADS).to(tl.float32) + head_dt
            softplus = tl.where(slow > 20.0, slow, tl.log(1.0 + tl.exp(tl.minimum(slow, 20.0))))
            s = s * tl.exp(-head_rate * softplus)
            change = (v - tl.sum(s * k[:, None], 0)) / (1.0 + tl.exp(-tl.load(x + t * pitch + small).to(tl.float32)))
            s += k[:, None] * change[None, :]
            tl.store(out + t * VALUE_HEADS * VALUE_DIM + column, tl.sum(s * q[:, None], axis=0), mask=inside)
            if KEPT:
                if t + 1 == end:
                    tl.store(states + to * STATE, s, mask=held)
        tl.store(states + slot * STATE, s, mask=held)


@triton.jit
def _keep(
    x: tl.tensor,
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
    """The last inputs of a request's convolution, for its next step, and those before where its state is kept."""
    r, at = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(starts + r)
    count = tl.load(starts + r + 1) - first
    if count > 0:
        fresh = (tl.load(contexts + r) == count).to(tl.int32)
        x += first.to(tl.int64) * pitch
        slot = tl.load(slots + r).to(tl.int64)
        source, to, end = _kept(kept, r, slot, tl.load(contexts + r) - count, KEPT)
        PAST: tl.constexpr = (KERNEL - 1) * WIDTH
        if KEPT:
            if to >= 0:
                _move(x, pasts + source * PAST, pasts + to * PAST, end, fresh, at, pitch, WIDTH, KERNEL)
        _move(x, pasts + source * PAST, pasts + slot * PAST, count, fresh, at, pitch, WIDTH, KERNEL)


@triton.jit
def _move(
    x: tl.tensor,
    past: tl.tensor,
    to: tl.tensor,
    count: tl.tensor,
    fresh: tl.tensor,
    at: tl.tensor,
    pitch: tl.tensor,
    WIDTH: tl.constexpr,
    KERNEL: tl.constexpr,
) -> None:
    """The last inputs before token `count` of a request, at some channels; `to` may be `past` itself."""
    inside = at < WIDTH
    for j in tl.static_range(KERNEL - 1):
        row = count - (KERNEL - 1) + j  # what was there moves up: each place is read before it is written
        now = tl.load(x + row * pitch + at, mask=inside & (row >= 0), other=0.0).to(tl.float32)
        before = tl.load(past + (row + KERNEL - 1) * WIDTH + at, mask=inside & (row < 0) & (fresh == 0), other=0.0)
        tl.store(to + j * WIDTH + at, now + before, mask=inside)


@triton.jit
def _gated_norm(
    y: tl.tensor,
    x: tl.tensor,
    norm: tl.tensor,
    out: tl.tensor,
    eps: tl.tensor,
    pitch: tl.tensor,
    Z: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token, head, at = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BLOCK)
    inside = at < DIM
    value = tl.load(y + (token * HEADS + head) * DIM + at, mask=inside, other=0.0)
    z = tl.load(x + token * pitch + Z + head * DIM + at, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / DIM + eps)
    value = value * scale * tl.load(norm + at, mask=inside, other=0.0) * (z / (1.0 + tl.exp(-z)))
    tl.store(out + (token * HEADS + head) * DIM + at, value.to(out.dtype.element_ty), mask=inside)


def delta(
    x: Tensor,
    d: DeltaNet,
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    eps: float,
    states: tuple[Tensor, Tensor],
    batch: Batch,
) -> Tensor:
    """See torch.delta.Delta; `weights` are its taps, rate, dt and norm."""
    taps, rate, dt, norm = weights
    x, (pasts, s) = x.contiguous(), states
    pitch, requests = x.shape[1], len(batch.contexts)
    kept = batch.slots if batch.kept is None else batch.kept
    y = torch.zeros(len(x), d.value_width, dtype=torch.float32, device=x.device)
    out = torch.empty(len(x), d.value_width, dtype=x.dtype, device=x.device)
    if not len(x):
        return out
    columns = min(_COLUMNS, triton.next_power_of_2(d.value_dim))
    _advance[(requests, d.value_heads, triton.cdiv(d.value_dim, columns))](
        x, y, taps, rate, dt, pasts, s, batch.starts, batch.contexts, batch.slots, kept, pitch, d.key_dim**-0.5,
        KEY_HEADS=d.key_heads, VALUE_HEADS=d.value_heads, KEY_DIM=d.key_dim, VALUE_DIM=d.value_dim, KERNEL=d.kernel,
        TILED=d.tiled, KEYS=triton.next_power_of_2(d.key_dim), COLUMNS=columns, KEPT=batch.kept is not None,
        num_warps=4,
    )  # fmt: skip
    _keep[(requests, triton.cdiv(d.width, 256))](
        x, pasts, batch.starts, batch.contexts, batch.slots, kept, pitch, WIDTH=d.width, KERNEL=d.kernel, BLOCK=256,
        KEPT=batch.kept is not None, num_warps=4,
    )  # fmt: skip
    _gated_norm[(len(x), d.value_heads)](
        y, x, norm, out, eps, pitch, Z=d.width, HEADS=d.value_heads, DIM=d.value_dim,
        BLOCK=triton.next_power_of_2(d.value_dim), num_warps=1,
    )  # fmt: skip
    return out
