"""The Triton attention kernels against plain PyTorch: prompts, single tokens, mixed batches, windows, FP8 caches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from triton_cases import make_batch

from pagoda.backend.torch import ops
from pagoda.backend.torch.batch import Batch, Heads
from pagoda.backend.torch.kernels import attention, decode, latent, rope
from pagoda.backend.torch.kernels.tuning import Tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter cannot multiply bfloat16

BATCHES = {
    "one prompt": [(40, 0)],
    "a chunk behind others": [(5, 30), (19, 17)],
    "single tokens": [(1, 0), (1, 300), (1, 40)],
    "mixed and empty": [(1, 33), (7, 3), (0, 0), (1, 280), (2, 0)],
}


def case(
    requests: list[tuple[int, int]], heads: int, kv_heads: int, size: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Batch]:
    batch = make_batch(requests, device=DEVICE)
    generator = torch.Generator().manual_seed(5)
    cells = (batch.block_tables.numel(), 16, kv_heads, size)
    q = torch.randn(len(batch.tokens), heads, size, generator=generator).to(DEVICE, dtype)
    k, v = (torch.randint(-15, 16, cells, generator=generator).to(DEVICE, dtype) / 8 for _ in range(2))
    return q, k, v, batch


def check(
    requests: list[tuple[int, int]],
    shape: Heads,
    dtype: torch.dtype,
    cache: torch.dtype,
    sinks: torch.Tensor | None = None,
) -> None:
    q, k, v, batch = case(requests, shape.heads, shape.kv_heads, shape.head_dim, dtype)
    k, v = k.to(cache), v.to(cache)
    wanted = ops.paged_attention(q, k, v, batch, shape, sinks)
    tolerance = 2e-5 if dtype == torch.float32 else 3e-2
    for one in (batch, replace(batch, runs=decode.count_runs(batch.starts, batch.contexts))):
        got = attention.paged_attention(q, k, v, one, shape, sinks)
        torch.testing.assert_close(got.float(), wanted.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 16), (7, 1, 24)])
def test_attention(name: str, heads: int, kv_heads: int, size: int) -> None:
    shape = Heads(heads, kv_heads, size, size**-0.5, None, 1e-6, False)
    check(BATCHES[name], shape, torch.float32, torch.float32)


@pytest.mark.parametrize("name", ["a chunk behind others", "mixed and empty"])
@pytest.mark.parametrize("window", [None, 20])
def test_sinks(name: str, window: int | None) -> None:
    shape = Heads(6, 2, 16, 0.25, window, 1e-6, False)
    sinks = torch.tensor([-50.0, 0.0, 1.5, 4.0, 9.0, 60.0], device=DEVICE)
    check(BATCHES[name], shape, torch.float32, torch.float32, sinks)


@pytest.mark.parametrize("window", [1, 20, 130])
def test_a_window(window: int) -> None:
    shape = Heads(2, 1, 16, 0.25, window, 1e-6, False)
    check([(1, 290), (50, 130)], shape, torch.float32, torch.float32)


@pytest.mark.parametrize("window", [None, 20])
def test_a_cap_of_scores(window: int | None) -> None:
    shape = Heads(2, 1, 16, 0.25, window, 1e-6, False, soft_cap=1.5)
    check([(1, 290), (50, 130)], shape, torch.float32, torch.float32)


@pytest.mark.parametrize("cache", [HALF, torch.float8_e4m3fn])
def test_half_precision_and_an_fp8_cache(cache: torch.dtype) -> None:
    shape = Heads(4, 2, 16, 0.25, None, 1e-6, False)
    check([(1, 70), (20, 3)], shape, HALF, cache)


def test_runs_of_keys() -> None:
    batch = make_batch([(1, 255), (1, 256), (3, 900), (1, 8191), (1, 8192), (0, 0)], device=DEVICE)
    # a run has 128 keys, of a context above 32 runs 256 or 512; a chunk of a prompt has none
    assert decode.count_runs(batch.starts, batch.contexts).tolist() == [0, 2, 5, 5, 37, 54, 54]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "dim", "normed", "late", "interleaved", "cache"),
    [
        (4, 2, 16, 16, True, False, False, torch.float32),
        (7, 1, 24, 8, True, True, False, torch.float32),
        (2, 2, 16, 0, False, False, True, torch.float32),
        (4, 2, 16, 16, False, False, True, torch.float8_e4m3fn),
    ],
)
def test_single_tokens_with_their_norms_and_turns(
    heads: int, kv_heads: int, size: int, dim: int, normed: bool, late: bool, interleaved: bool, cache: torch.dtype
) -> None:
    shape = Heads(heads, kv_heads, size, size**-0.5, 130, 1e-6, interleaved, late=late)
    batch = make_batch([(1, 0), (1, 300), (1, 127), (0, 0), (1, 128), (1, 40)], device=DEVICE, pad_tokens=1)
    cells = (batch.block_tables.numel(), 16, kv_heads, size)
    caches = [torch.randint(-15, 16, cells, device=DEVICE).float().div(8).to(cache) for _ in range(2)]
    apart = [each.clone() for each in caches]
    qkv = torch.randn(len(batch.tokens), (heads + 2 * kv_heads) * size, device=DEVICE)
    norms = [torch.rand(size, device=DEVICE) if normed else None for _ in range(2)]
    angles = torch.rand(400, dim // 2, device=DEVICE) * 6
    table = torch.cat((angles.cos(), angles.sin()), dim=1)
    wanted = ops.attend(qkv, *norms, table, batch, *apart, shape)
    ready = replace(batch, runs=decode.count_runs(batch.starts, batch.contexts))
    got = attention.attend_single(qkv, decode.Fresh(*norms, table), *caches, ready, shape)
    if cache == torch.float32:  # the interpreter cuts to FP8, PyTorch rounds
        torch.testing.assert_close(got[:5], wanted[:5], rtol=1e-4, atol=1e-4)
        for one, other in zip(caches, apart, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    q = rope.rope_and_cache(qkv, *norms, table, batch, *apart, shape)
    assert torch.equal(got[:5], attention.paged_attention(q, *apart, ready, shape)[:5])
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(caches, apart, strict=True))


def test_a_token_does_not_depend_on_its_company() -> None:
    shape = Heads(4, 2, 16, 0.25, None, 1e-6, False)
    q, k, v, batch = case([(1, 300), (1, 40), (6, 2)], 4, 2, 16)
    together = attention.paged_attention(q, k, v, batch, shape)
    alone = replace(batch, starts=batch.starts[:2], contexts=batch.contexts[:1], max_query=1)
    assert torch.equal(attention.paged_attention(q[:1], k, v, alone, shape)[0], together[0])


@pytest.mark.parametrize("tile", [Tile(m=16, n=16), Tile(m=64, n=128)])
def test_other_tiles(tile: Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "choose", lambda kernel: tile)
    shape = Heads(4, 2, 16, 0.25, None, 1e-6, False)
    check([(1, 290), (30, 130)], shape, torch.float32, torch.float32)


@pytest.mark.parametrize(
    ("name", "heads", "rank", "dtype"),
    [*((name, 20, 24, torch.float32) for name in BATCHES), ("mixed and empty", 70, 16, HALF)],
)
def test_latent(name: str, heads: int, rank: int, dtype: torch.dtype) -> None:
    shape = Heads(heads, 1, 8 + rank, 0.25, None, 1e-6, False, turned=8)
    q, k, _, batch = case(BATCHES[name], heads, 1, 8 + rank, dtype)
    wanted = ops.paged_attention(q, k, k[..., 8:], batch, shape)
    tolerance = 2e-5 if dtype == torch.float32 else 3e-2
    got = latent.latent_attention(q, k, batch, shape)
    torch.testing.assert_close(got.float(), wanted.float(), rtol=tolerance, atol=tolerance)
    if name == "single tokens":
        alone = replace(batch, starts=batch.starts[:2], contexts=batch.contexts[:1], max_query=1)
        assert torch.equal(latent.latent_attention(q[:1], k, alone, shape)[0], got[0])


@pytest.mark.slow
@pytest.mark.parametrize("turned", [0, 32])
def test_blocks_far_behind_in_a_large_cache(turned: int) -> None:
    """Places beyond 2^31, of which the memory is there where something is written."""
    shape = Heads(4, 1, 128, 0.1, None, 1e-6, False, turned=turned)
    q, k, v, batch = case([(1, 40), (20, 30), (1, 300)], 4, 1, 128)
    blocks, most = len(k), (1 << 31) // (16 * 128)
    near, far = [], []
    for values in (k, v):
        near.append(values.to(torch.float8_e4m3fn))
        cache = torch.zeros(most + blocks, 16, 1, 128, dtype=torch.uint8, device=DEVICE)
        cache[most:] = near[-1].view(torch.uint8)
        far.append(cache.view(torch.float8_e4m3fn))
    behind = replace(batch, block_tables=batch.block_tables + most, cells=batch.cells + 16 * most)
    if turned:
        new = torch.randn(len(q), 1, 128, device=DEVICE).to(torch.float8_e4m3fn)
        for caches, one in ((near, batch), (far, behind)):
            latent.keep(new, caches[0].flatten(0, 1), one.cells)
        got, wanted = (latent.latent_attention(q, c[0], b, shape) for c, b in ((far, behind), (near, batch)))
    else:
        qkv, table = torch.randn(len(q), 6 * 128, device=DEVICE), torch.rand(400, 64, device=DEVICE)
        rows = [rope.rope_and_cache(qkv, None, None, table, b, *c, shape) for c, b in ((far, behind), (near, batch))]
        assert torch.equal(*rows)
        got, wanted = (attention.paged_attention(q, *c, b, shape) for c, b in ((far, behind), (near, batch)))
    assert torch.equal(got, wanted) and got.abs().max() > 0.1
    for one, other in zip(far, near, strict=True):
        assert torch.equal(one[most:].view(torch.uint8), other.view(torch.uint8))
