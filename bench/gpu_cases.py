"""Each kernel of the CUDA backend against plain PyTorch: is it right on this device."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_kernels import apart, batch_of, dispatch, in_a_row, weights

from pagoda.arch.spec import Experts
from pagoda.backend.torch import ops
from pagoda.backend.torch.answer import _found, _found_there
from pagoda.backend.torch.batch import Heads, Routed
from pagoda.backend.torch.kernels.greedy import greedy
from pagoda.backend.torch.kernels.launch import AHEAD
from pagoda.backend.torch.packs import F8, FP8, I8, Dense, Weight
from pagoda.backend.torch.sampling import Sampling
from pagoda.backend.torch.upload import Rows

Row = dict[str, Any]


def cases(dtype: torch.dtype, device: torch.device, small: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Calls of ops, by name; every one is made twice, with and without the kernels."""
    hidden, size = (64, 16) if small else (4096, 128)
    x, residual = (torch.randn(5, hidden, device=device).to(dtype) for _ in range(2))
    norm = torch.rand(hidden, device=device)
    picked, free = torch.tensor([40, 41], device=device), torch.full((5,), -1, device=device)
    logits = torch.randn(5, 9000, device=device).to(dtype)
    yield "rms_norm", lambda: ops.rms_norm(x, norm, 1e-6)
    yield "add_rms_norm", lambda: ops.add_rms_norm(x, residual, norm, 1e-6)[0]
    yield "silu_mul", lambda: ops.gated(x, "silu")
    yield "told", lambda: ops.told(torch.tensor([7, -2, -1, 3], dtype=torch.int32, device=device), picked)
    yield "greedy", lambda: greedy(logits, free)[0] if ops.on_gpu(logits) else logits.argmax(-1)
    for name, top_k, top_p in (("all", 0, 1.0), ("a top-k", 20, 0.9), ("a top-p", 0, 0.8)):
        yield f"drawn of {name}", lambda k=top_k, p=top_p: drawn_of(logits, drawing(5, k, p, device))  # type: ignore[misc]
    scores, sent = torch.randn(5, 128, device=device), torch.randn(40, hidden, device=device).to(dtype)
    mixture = Experts(128, 8, True)
    yield "routed", lambda: places_of(ops.routed(scores, mixture))
    yield "combined", lambda: ops.combined(sent, ops.routed(scores, mixture), dtype)
    square = Dense(torch.randn(hidden, hidden, device=device).mul_(hidden**-0.5).to(dtype))
    yield "kernels in a row", lambda: in_a_row(x[:1], norm, square)
    yield "quantize_rows", lambda: ops.quantize_rows(x)[0]
    yield "quantize_f8", lambda: ops.quantize_f8(x, 16 if small else 128)[0]
    for name, requests in {
        "prompt": [(70, 0), (33, 50)],
        "decode": [(1, 700), (1, 30), (1, 255)],
        "mixed": [(1, 300), (40, 7)],
    }.items():
        for kind in (dtype, FP8):
            for heads, kv_heads in ((8, 2), (7, 1)):
                shape = Heads(heads, kv_heads, size, size**-0.5, None, 1e-6, False)
                batch = batch_of(requests, device)
                caches = [
                    torch.randn(int(batch.block_tables.numel()), 16, kv_heads, size, device=device).to(kind)
                    for _ in range(2)
                ]
                q = torch.randn(len(batch.tokens), heads, size, device=device).to(dtype)
                label = f"attention {name} {heads}/{kv_heads} {str(kind)[6:]}"
                yield label, lambda q=q, c=caches, b=batch, s=shape: ops.paged_attention(q, *c, b, s)  # type: ignore[misc]
    rank, turned = (32, 16) if small else (512, 64)
    for name, requests in {"prompt": [(70, 30)], "decode": [(1, 700), (1, 30)]}.items():
        batch, shape = batch_of(requests, device), Heads(20, 1, rank + turned, 0.05, None, 1e-6, False, turned=turned)
        kept = torch.randn(int(batch.block_tables.numel()), 16, 1, rank + turned, device=device).to(dtype)
        q = torch.randn(len(batch.tokens), 20, rank + turned, device=device).to(dtype)
        yield (
            f"latent attention {name}",
            lambda q=q, k=kept, b=batch, s=shape: ops.paged_attention(q, k, k[..., s.turned :], b, s),
        )  # type: ignore[misc]
    batch, table = batch_of([(5, 3), (1, 40)], device), torch.randn(64, size, device=device)
    shape = Heads(8, 2, size, 1.0, None, 1e-6, False)
    qkv, unit = torch.randn(6, 12 * size, device=device).to(dtype), torch.rand(size, device=device)

    def rope() -> torch.Tensor:
        caches = [torch.zeros(16, 16, 2, size, dtype=dtype, device=device) for _ in range(2)]
        q = ops.rope_and_cache(qkv, unit, unit, table, batch, *caches, shape)
        return torch.cat([q.flatten(), *(cache.flatten() for cache in caches)])

    yield "rope_and_cache", rope
    singles = batch_of([(1, 700), (1, 30), (1, 127)], device)
    cells = (int(singles.block_tables.numel()), 16, 2, size)
    full = [torch.randn(cells, device=device).to(dtype) for _ in range(2)]
    turns = torch.rand(1024, size, device=device)

    def attend() -> torch.Tensor:
        caches = [each.clone() for each in full]
        seen = ops.attend(qkv[:3], unit, unit, turns, ops.prepared(singles), *caches, shape)
        return torch.cat([seen.flatten(), *(cache.flatten() for cache in caches)])

    yield "attention of single tokens with rope", attend
    n, k = (48, 128) if small else (1024, 4096)
    for name, weight in weights(n, k, dtype, device).items():
        for rows in (1, 3, 17) if small else (1, 3, 16, 17, 100):
            inputs = torch.randn(rows, k, device=device).to(dtype)
            yield f"matmul {name} {rows}", lambda x=inputs, w=weight: product(x, w)  # type: ignore[misc]
    row, before, factor = (torch.randn(1, k, device=device).to(dtype) for _ in range(3))
    for name, weight in weights(n, k, dtype, device).items():
        if isinstance(weight, Dense | F8):
            for gated in (False, True):
                label = f"norm_matmul {name}{' gated' * gated}"
                yield (
                    label,
                    lambda w=weight, g=gated: ops.norm_matmul(row, before, factor.float()[0], 1e-6, w, gate=g)[0],
                )  # type: ignore[misc]
    experts = Dense(torch.randn(4, n, k, device=device).to(dtype))
    rows_of = torch.tensor([0, 3, 3, 24, 30], dtype=torch.int32, device=device)
    sorted_rows = torch.randn(30, k, device=device).to(dtype)
    yield "grouped dense 30", lambda: ops.grouped_matmul(sorted_rows, experts, rows_of)


def drawing(count: int, top_k: int, top_p: float, device: torch.device) -> Rows:
    zeros, ones = torch.zeros(count, device=device), torch.ones(count, device=device)
    at, free = torch.arange(count, device=device), torch.full((count,), -1, device=device)
    near, nucleus = top_k > 0, top_k == 0 and top_p < 1
    how = Sampling(
        ones * 0.7,
        at * 0 + top_k,
        ones * top_p,
        zeros,
        at * 99,
        at,
        zeros,
        zeros,
        ones,
        None,
        None,
        None,
        True,
        near,
        False,
        nucleus,
    )
    return Rows(0, count, free, how)


def drawn_of(logits: torch.Tensor, rows: Rows) -> torch.Tensor:
    return (_found_there if ops.on_gpu(logits) else _found)(logits, rows)[0]


def places_of(to: Routed) -> torch.Tensor:
    return torch.cat([part.flatten().float() for part in (to.shares, to.starts, to.tokens, to.owners, to.places)])


def product(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    if isinstance(weight, I8) and not ops.on_gpu(x):
        codes, scales = ops.quantize_rows(x)  # PyTorch's own product of whole numbers takes no few rows on a GPU
        return (codes.double() @ weight.codes.double().t()).float() * scales * weight.scales
    return ops.matmul(x, weight)


def compared(name: str, call: Callable[[], Any], device: torch.device) -> Row:
    with dispatch(False):
        wanted = call().float()
    with dispatch(True):
        got = call().float()
    error = float((got - wanted).norm() / wanted.norm())
    # FP8 on both sides is compared with FP8 on one side only, up to 16 rows; the interpreter cuts, not rounds
    bound = (0.06 if device.type == "cuda" else 0.15) if "f8" in name else 0.02
    found = {"kernel": name, "error": error, "ok": bool(error < bound and got.isfinite().all())}
    if not found["ok"] and device.type == "cuda" and os.environ.get(AHEAD) != "0":
        with apart(), dispatch(True):
            error = float((call().float() - wanted).norm() / wanted.norm())
        found["why"] = f"started one after the other {error:.3g}"
    return found
