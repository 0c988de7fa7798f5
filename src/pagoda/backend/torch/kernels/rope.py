"""Between the QKV product and attention, in one Triton kernel: norm of q and k, RoPE, keys and values to the cache."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pagoda.backend.torch.batch import Batch, Heads
from pagoda.backend.torch.kernels import fp8, launch
from pagoda.backend.torch.kernels.launch import await_others, block_of

_HEADS = 8
"""Heads of one token that a program takes."""


@triton.jit
def cached(values: tl.tensor, cache: tl.tensor) -> tl.tensor:
    """As the cache keeps them."""
    kind: tl.constexpr = cache.dtype.element_ty
    if kind.primitive_bitwidth == 8:
        return fp8.codes(values, kind)
    else:
        return values.to(kind)


@triton.jit
def _scaled(
    values: tl.tensor,
    scale: tl.tensor,
    q_norm: tl.tensor,
    k_norm: tl.tensor,
    is_q: tl.tensor,
    at: tl.tensor,
    LIMIT: tl.constexpr,
) -> tl.tensor:
    mine = tl.load(q_norm + at, mask=at < LIMIT, other=0.0)
    its = tl.load(k_norm + at, mask=at < LIMIT, other=0.0)
    return values * scale * tl.where(is_q, mine, its).to(tl.float32)


@triton.jit
def heads_of(
    source: tl.tensor,
    inside: tl.tensor,
    is_q: tl.tensor,
    is_v: tl.tensor,
    q_norm: tl.tensor,
    k_norm: tl.tensor,
    cos_sin: tl.tensor,
    position: tl.tensor,
    eps: tl.tensor,
    NORM: tl.constexpr,
    LATE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    DIM: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> Any:
    """Heads of a token [.., BLOCK], from `source` [.., 1] on: q and k normed and turned; and all as they were."""
    at = tl.arange(0, BLOCK)[None, :]
    raw = tl.load(source + at, mask=inside, other=0.0)
    kind: tl.constexpr = raw.dtype
    # the partner of each value in its pair: loaded again (it is in the first cache) instead of moved between threads
    if INTERLEAVED:
        partner, pair, sign = at ^ 1, at // 2, tl.where(at % 2 == 0, -1.0, 1.0)
    else:
        first = at < DIM // 2
        partner = tl.where(first, at + DIM // 2, at - DIM // 2)
        pair, sign = tl.where(first, at, at - DIM // 2), tl.where(first, -1.0, 1.0)
    turned = inside & (at < DIM) & (is_v == 0)
    values, others = raw.to(tl.float32), tl.load(source + partner, mask=turned, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(values * values, axis=1)[:, None] / HEAD + eps)
    if NORM and not LATE:
        values = _scaled(values, scale, q_norm, k_norm, is_q, at, HEAD).to(kind).to(tl.float32)
        others = _scaled(others, scale, q_norm, k_norm, is_q, partner, DIM).to(kind).to(tl.float32)
    cos = tl.load(cos_sin + position * DIM + pair, mask=at < DIM, other=1.0)
    sin = tl.load(cos_sin + position * DIM + DIM // 2 + pair, mask=at < DIM, other=0.0)
    result = tl.where(turned, values * cos + others * sin * sign, values)
    if NORM and LATE:  # turning changes no length
        result = _scaled(result.to(kind).to(tl.float32), scale, q_norm, k_norm, is_q, at, HEAD)
    return result.to(kind), raw


@triton.jit
def _rope(
    qkv: tl.tensor,
    q_norm: tl.tensor,
    k_norm: tl.tensor,
    cos_sin: tl.tensor,
    positions: tl.tensor,
    cells: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    q_out: tl.tensor,
    q_heads: tl.tensor,
    kv_heads: tl.tensor,
    eps: tl.tensor,
    NORM: tl.constexpr,
    LATE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    DIM: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    CHAINED: tl.constexpr,
) -> None:
    await_others(CHAINED)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    at = tl.arange(0, BLOCK)[None, :]
    rows, is_q, is_v = q_heads + 2 * kv_heads, head < q_heads, head >= q_heads + kv_heads
    inside = (head < rows) & (at < HEAD)
    result, raw = heads_of(
        qkv + (token * rows + head) * HEAD, inside, is_q, is_v, q_norm, k_norm, cos_sin,
        tl.load(positions + token).to(tl.int64), eps, NORM, LATE, INTERLEAVED, DIM, HEAD, BLOCK,
    )  # fmt: skip
    tl.store(q_out + (token * q_heads + head) * HEAD + at, result, mask=inside & is_q)
    cell = tl.load(cells + token)
    written = inside & (cell >= 0)
    k_at = (cell * kv_heads + head - q_heads) * HEAD + at
    tl.store(k_cache + k_at, cached(result, k_cache), mask=written & (is_q == 0) & (is_v == 0))
    v_at = (cell * kv_heads + head - q_heads - kv_heads) * HEAD + at
    tl.store(v_cache + v_at, cached(raw, v_cache), mask=written & is_v)


def rope_and_cache(
    qkv: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos_sin: Tensor,
    batch: Batch,
    k_cache: Tensor,
    v_cache: Tensor,
    shape: Heads,
) -> Tensor:
    """See ops.rope_and_cache."""
    a, tokens = shape, len(qkv)
    q = torch.empty(tokens, a.heads, a.head_dim, dtype=qkv.dtype, device=qkv.device)
    norms = (q_norm, k_norm) if q_norm is not None and k_norm is not None else (qkv, qkv)
    if tokens:
        _rope[(tokens, triton.cdiv(a.heads + 2 * a.kv_heads, _HEADS))](
            qkv.contiguous(), *norms, cos_sin, batch.positions, batch.cells, fp8.known(k_cache), fp8.known(v_cache), q,
            a.heads, a.kv_heads, a.eps, NORM=q_norm is not None, LATE=a.late, INTERLEAVED=a.interleaved,
            DIM=cos_sin.shape[1], HEAD=a.head_dim, BLOCK=block_of(a.head_dim), HEADS=_HEADS, num_warps=2,
            **launch.chained(qkv.device),
        )  # fmt: skip
    return q
