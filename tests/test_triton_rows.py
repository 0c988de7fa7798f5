"""Triton kernels that work on rows (norms, RoPE with the cache, activation, quantization) against plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from triton_cases import make_batch

from pagoda.backend.torch import ops
from pagoda.backend.torch.batch import Heads
from pagoda.backend.torch.kernels import activation, norm, rope

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TYPES = [torch.float32, torch.bfloat16]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def eighths(*shape: int) -> torch.Tensor:
    """Numbers that FP8 holds exactly: the interpreter does not round to FP8 as a GPU does."""
    return torch.randint(-15, 16, shape, device=DEVICE) / 8


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """A unit or two of bfloat16 apart at most (the interpreter cuts off what it should round), or a few of float32."""
    tolerance = 1e-5 if got.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got.float(), wanted.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "n"), [(1, 64), (5, 576), (3, 1030)])
def test_rms_norm(rows: int, n: int, dtype: torch.dtype) -> None:
    x, residual, weight = random(rows, n, dtype=dtype), random(rows, n, dtype=dtype), random(n, dtype=dtype)
    close(norm.rms_norm(x, weight, 1e-6), ops.rms_norm(x, weight, 1e-6))
    got, total = norm.add_rms_norm(x, residual, weight, 1e-6)
    wanted, wanted_total = ops.add_rms_norm(x, residual, weight, 1e-6)
    close(got, wanted)
    close(total, wanted_total)


def test_rms_norm_of_rows_that_lie_apart() -> None:
    x, weight = random(4, 100), random(64)
    close(norm.rms_norm(x[:, :64], weight, 1e-6), ops.rms_norm(x[:, :64], weight, 1e-6))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 16), (3, 1100)])
def test_activations_of_gates(rows: int, size: int, dtype: torch.dtype) -> None:
    x = random(rows, 2 * size, dtype=dtype) * 5
    close(activation.gated(x, "silu"), ops.gated(x, "silu"))
    close(activation.gated(x, "gelu_tanh"), ops.gated(x, "gelu_tanh"))


@pytest.mark.parametrize("dtype", TYPES)
def test_quantize_rows_to_int8(dtype: torch.dtype) -> None:
    x = random(3, 200, dtype=dtype)
    x[1] = 0
    codes, scales = norm.quantize_rows(x)
    wanted, wanted_scales = ops.quantize_rows(x)
    assert torch.equal(codes, wanted)
    close(scales, wanted_scales)


@pytest.mark.parametrize("size", [128, 200])
@pytest.mark.parametrize("given", [False, True])
def test_quantize_to_fp8(size: int, given: bool) -> None:
    x, scale = eighths(3, 200) * 0.25, torch.tensor([0.25], device=DEVICE) if given else None
    x[:, ::100] = 448 * 0.25
    codes, scales = norm.quantize_f8(x, size, scale)
    wanted, wanted_scales = ops.quantize_f8(x, size, scale)
    assert torch.equal(scales, wanted_scales)
    assert torch.equal(codes.float(), wanted.float())


@pytest.mark.parametrize(("kind", "run"), [(torch.int8, 200), (ops.FP8, 200), (ops.FP8, 128), (ops.FP8, 32)])
def test_a_norm_gives_the_8_bits_of_what_it_would_give(kind: torch.dtype, run: int) -> None:
    x, residual, weight = random(3, 200), random(3, 200), random(200)
    codes, scales, total = norm.coded_add_rms_norm(x, residual, weight, 1e-6, kind, run)
    normed, added = norm.add_rms_norm(x, residual, weight, 1e-6)
    wanted = norm.quantize_rows(normed) if kind == torch.int8 else norm.quantize_f8(normed, run)
    assert (
        torch.equal(codes.float(), wanted[0].float()) and torch.equal(scales, wanted[1]) and torch.equal(total, added)
    )


ROPES = [
    # head size, RoPE size, interleaved, norms
    (16, 16, False, True),
    (24, 24, False, False),
    (32, 16, False, True),
    (16, 16, True, False),
    (32, 8, True, True),
]


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("size", "dim", "interleaved", "normed"), ROPES)
def test_rope_and_cache(size: int, dim: int, interleaved: bool, normed: bool, fp8: bool) -> None:
    heads = Heads(6, 2, size, 0.3, None, 1e-6, interleaved)
    batch = make_batch([(3, 0), (1, 20), (0, 0)], device=DEVICE, pad_tokens=1)
    qkv, table = random(len(batch.tokens), 10 * size), random(64, dim)
    if fp8:
        normed, qkv, table = False, eighths(*qkv.shape), torch.randint(0, 2, table.shape, device=DEVICE).float()
        table[:, : dim // 2] = 1 - table[:, dim // 2 :]
    norms = (random(size), random(size)) if normed else (None, None)
    cache_type = torch.float8_e4m3fn if fp8 else torch.float32
    caches = [torch.zeros(8, 16, 2, size, dtype=cache_type, device=DEVICE) for _ in range(4)]
    got = rope.rope_and_cache(qkv, *norms, table, batch, caches[0], caches[1], heads)
    wanted = ops.rope_and_cache(qkv, *norms, table, batch, caches[2], caches[3], heads)
    real = batch.cells >= 0
    close(got[real], wanted[real])
    for mine, its in zip(caches[:2], caches[2:], strict=True):
        assert its.float().abs().sum() > 0
        close(mine.float(), its.float())


@pytest.mark.parametrize(("size", "run"), [(256, 64), (1100, 128), (1100, 1100)])
@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
def test_an_activation_in_8_bits(size: int, run: int, kind: torch.dtype) -> None:
    x = random(3, 2 * size)
    codes, scales = activation.coded_gated(x, "silu", kind, run)
    floats = activation.gated(x, "silu")
    quantized = norm.quantize_rows(floats) if kind == torch.int8 else norm.quantize_f8(floats, run)
    if kind == torch.float8_e4m3fn or run == size:
        torch.testing.assert_close(scales, quantized[1], rtol=1e-6, atol=0)
        assert torch.equal(codes.view(torch.uint8), quantized[0].view(torch.uint8))
