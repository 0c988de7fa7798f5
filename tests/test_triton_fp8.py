"""FP8 on GPUs that have no such type: bits taken apart by the kernels, against PyTorch's conversions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from triton_cases import make_batch

from pagoda.backend.torch import ops
from pagoda.backend.torch.batch import Heads
from pagoda.backend.torch.kernels import attention, fp8, launch, matmul, norm, rope
from pagoda.backend.torch.packs import F8, FP8

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _to_codes(x: tl.tensor, out: tl.tensor, BLOCK: tl.constexpr) -> None:
    at = tl.arange(0, BLOCK)
    tl.store(out + at, fp8.codes(tl.load(x + at), tl.uint8))


@triton.jit
def _to_floats(x: tl.tensor, out: tl.tensor, BLOCK: tl.constexpr) -> None:
    at = tl.arange(0, BLOCK)
    tl.store(out + at, fp8.floats(tl.load(x + at), tl.float32))


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    old = replace(launch.INTERPRETER, capability=(8, 6))
    monkeypatch.setattr(launch, "gpu_of", lambda device: old)


def test_every_code_is_its_number() -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    codes[127], codes[255] = 0, 128  # no numbers
    out = torch.empty(256, device=DEVICE)
    _to_floats[(1,)](codes, out, BLOCK=256)
    assert torch.equal(out, codes.view(FP8).float())


def test_numbers_are_rounded_as_pytorch_does() -> None:
    exact = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(FP8).float().nan_to_num(1.0)
    exact = exact.sort().values
    halves = (exact[1:] + exact[:-1]) / 2  # ties, and what is just beside them
    values = torch.cat([exact, halves, halves.nextafter(halves + 1), halves.nextafter(halves - 1)])
    values = torch.cat([values, torch.randn(1024 - len(values) % 1024, device=DEVICE) * 2])
    values = torch.cat([values, torch.tensor([1000.0, -449.0, 1e-9, -1e-9] * 256, device=DEVICE)])
    for part in values.split(1024):
        codes = torch.empty(1024, dtype=torch.uint8, device=DEVICE)
        _to_codes[(1,)](part.contiguous(), codes, BLOCK=1024)
        assert torch.equal(codes, part.clamp(-448, 448).to(FP8).view(torch.uint8))


@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize("requests", [[(1, 300), (1, 4)], [(20, 3), (1, 9)]])
def test_an_fp8_cache_on_an_older_gpu(requests: list[tuple[int, int]]) -> None:
    shape, batch = Heads(4, 2, 16, 0.25, None, 1e-6, False), make_batch(requests, device=DEVICE)
    qkv, table = torch.randn(len(batch.tokens), 8 * 16, device=DEVICE), torch.randn(512, 16, device=DEVICE)
    cache = torch.randn(2, int(batch.block_tables.numel()), 16, 2, 16, device=DEVICE).to(FP8)
    own, other = cache.clone(), cache.clone()
    q = rope.rope_and_cache(qkv, None, None, table, batch, *own, shape)
    wanted = ops.rope_and_cache(qkv, None, None, table, batch, *other, shape)
    assert torch.equal(own.view(torch.uint8), other.view(torch.uint8))
    got = attention.paged_attention(q, *own, batch, shape)
    torch.testing.assert_close(got, ops.paged_attention(wanted, *other, batch, shape), rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_fp8_weights_on_an_older_gpu(rows: int) -> None:
    codes, scales = (torch.randn(48, 128, device=DEVICE) * 20).to(FP8), torch.rand(48, 1, device=DEVICE)
    weight, x = F8(codes, scales), torch.randn(rows, 128, device=DEVICE)
    got = matmul.matmul(x, weight)
    assert got is not None
    torch.testing.assert_close(got, x @ weight.floats().t(), rtol=1e-3, atol=1e-2)


@pytest.mark.usefixtures("ampere")
def test_rows_become_the_same_codes_on_an_older_gpu() -> None:
    x = torch.randn(3, 128, device=DEVICE)
    for mine, its in zip(norm.quantize_f8(x, 32), ops.quantize_f8(x, 32), strict=True):
        assert torch.equal(mine.view(torch.uint8), its.view(torch.uint8))


@pytest.mark.parametrize("by_row", [True, False])
def test_the_product_of_pytorch_with_scales_of_rows(by_row: bool) -> None:
    x, values = torch.randn(33, 64, device=DEVICE), torch.randn(48, 64, device=DEVICE)
    own = torch.rand(48 if by_row else 1, 1, device=DEVICE) + 0.1
    weight = F8(values.to(FP8), own)
    codes, scales = ops.quantize_f8(x, 64)
    got = fp8.by_rows(codes, scales, weight.codes, weight.scales).float()
    wanted = (codes.float() * scales) @ weight.floats().t()
    assert (got - wanted).norm() / wanted.norm() < 0.005
    assert fp8.has_row_scales(torch.device(DEVICE)) == (DEVICE == "cuda")
