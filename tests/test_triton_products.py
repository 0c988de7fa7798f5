"""The Triton matrix products against plain PyTorch: each kind of weight, one row, few and many, experts, tiles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pagoda.arch.spec import Experts
from pagoda.backend.torch import ops
from pagoda.backend.torch.kernels import activation, launch, matmul
from pagoda.backend.torch.kernels.tuning import Tile
from pagoda.backend.torch.model import Mixture
from pagoda.backend.torch.packs import F8, FP8, I8, M4, W4, W8, Dense, Weight, pack_w4, packed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def fp8(*shape: int) -> torch.Tensor:
    return (torch.randint(-15, 16, shape, device=DEVICE) / 8).to(FP8)


def scales(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, device=DEVICE) + 0.5


def codes(low: int, high: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randint(low, high, shape, device=DEVICE).to(dtype)


def act_ordered(weight: W4, k: int, *experts: int) -> W4:
    return replace(weight, order=torch.rand(*experts, k, device=DEVICE).argsort())


def weights(n: int, k: int, *experts: int) -> dict[str, Weight]:
    small = (*experts, k // 16, n)
    groups = (*experts, k // 32, n)
    eight = (*experts, n, k)
    four = codes(0, 16, *eight, dtype=torch.uint8)
    return {
        "dense": Dense(torch.randn(*experts, n, k, device=DEVICE)),
        "w4": pack_w4(four, scales(*groups), codes(0, 16, *groups, dtype=torch.float)),
        "w4 whole": pack_w4(four, scales(*groups), codes(0, 17, *groups, dtype=torch.float), whole=True),
        "m4": M4(packed(four), codes(120, 131, *groups, dtype=torch.uint8), k),
        "w4 by row": pack_w4(four, scales(*experts, 1, n), scales(*experts, 1, n)),
        "w8": W8(codes(-127, 128, *eight, dtype=torch.int8), scales(*groups)),
        "w8 by 16": W8(codes(-127, 128, *eight, dtype=torch.int8), scales(*small)),
        "w4 act order": act_ordered(pack_w4(four, scales(*groups), scales(*groups)), k, *experts),
        "w8 zeros": W8(codes(-127, 128, *eight, dtype=torch.int8), scales(*groups), scales(*groups)),
        "i8": I8(codes(-127, 128, *eight, dtype=torch.int8), scales(*experts, n)),
        "f8 tensor": F8(fp8(*eight), scales(*experts, 1, 1), quantize_input=False),
        "f8 row": F8(fp8(*eight), scales(*experts, n, 1), quantize_input=False),
        "f8 block": F8(fp8(*eight), scales(*experts, -(-n // 32), k // 32), block=(32, 32), quantize_input=False),
    }


KINDS = list(weights(16, 64))


def close(got: torch.Tensor | None, wanted: torch.Tensor) -> None:
    assert got is not None
    torch.testing.assert_close(got.float(), wanted.float(), rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("kind", KINDS)
def test_product(kind: str, rows: int) -> None:
    weight, x = weights(40, 96)[kind], torch.randn(rows, 96, device=DEVICE)
    close(matmul.matmul(x, weight), ops.matmul(x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda"))
@pytest.mark.parametrize("group", [32, 64, 96, 128, 256, 0])
def test_four_bits_in_groups_of_any_size(group: int, dtype: torch.dtype) -> None:
    k = {96: 288, 256: 512}.get(group, 256)
    groups = k // group if group else 1
    steps, zeros = scales(groups, 40) / 8, codes(0, 16, groups, 40, dtype=torch.float)
    whole = group == 64
    weight = pack_w4(codes(0, 16, 40, k, dtype=torch.uint8), steps.half(), zeros.half(), whole=whole)
    for rows, split in ((1, 1), (1, 2), (3, 1), (20, 2)):
        x, parts = torch.randn(rows, k, device=DEVICE).to(dtype), matmul.operand(weight)
        assert parts is not None
        got = matmul.tiled(x, parts, dtype, tile=Tile(m=32 if whole else 16, n=32, split=split, warps=2))
        wanted = x.float() @ weight.floats().t()
        error = float((got.float() - wanted).norm() / wanted.norm())
        assert error < {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]
    assert not launch.arrivals(torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE), 1).any()


@pytest.mark.parametrize("k", [96, 768])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", ["dense", "w8 by 16", "w8 zeros", "f8 tensor", "f8 row", "f8 block"])
def test_a_row_with_its_norm_and_activation_is_one_kernel(kind: str, gated: bool, k: int) -> None:
    n = 64
    weight, norm = weights(n, k)[kind], matmul.Norm(torch.randn(1, k, device=DEVICE).half(), torch.rand(k), 1e-5)
    if isinstance(weight, Dense):
        weight = Dense(weight.data.half() / 8)
    else:
        weight = replace(weight, scales=weight.scales / 64)
    x = torch.randn(1, k, device=DEVICE).half()
    done = matmul.fused(x, weight, norm, gated=gated)
    assert done is not None
    wanted = ops.norm_matmul(x, norm.residual, norm.weight, norm.eps, weight, gate=gated)
    error = float((done[0].float() - wanted[0].float()).norm() / wanted[0].float().norm())
    assert error < 2e-3 and torch.equal(done[1], wanted[1])
    for several in (x.repeat(2, 1), x.float()):
        assert matmul.fused(several, weight, norm, gated=gated) is None


@pytest.mark.parametrize("kind", ["i8", "f8 row", "f8 block"])
def test_an_activation_gives_codes_to_the_product_behind_it(kind: str) -> None:
    weight, x = weights(40, 64)[kind], torch.randn(20, 128, device=DEVICE)
    if isinstance(weight, F8):
        weight = replace(weight, quantize_input=True)
    got, wanted = matmul.gated_product(x, "silu", weight), matmul.matmul(activation.gated(x, "silu"), weight)
    assert got is not None and wanted is not None and torch.equal(got, wanted)
    assert matmul.gated_product(x, "silu", weights(40, 64)["w4"]) is None


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("kind", ["w4", "w4 whole", "w4 act order", "m4", "w8 zeros", "f8 block"])
def test_an_activation_ends_a_product_of_few_rows(kind: str, rows: int) -> None:
    weight, x = weights(48, 160)[kind], torch.randn(rows, 160, device=DEVICE) / 16
    got = matmul.gated_few(x, weight)
    close(got, ops.gated_matmul(x, weight))
    parts = matmul.operand(weight)
    assert got is not None and parts is not None
    if isinstance(weight, W4) and weight.order is not None:
        x = x[:, weight.order]
    shared = matmul.tiled(x, parts, x.dtype, tile=Tile(m=16, n=32, k=32, split=2), activation="silu")
    close(shared, got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_four_bit_float(dtype: torch.dtype) -> None:
    codes = torch.arange(16, dtype=torch.uint8, device=DEVICE).repeat(18).view(1, 288).repeat(16, 1)
    weight = M4(packed(codes), torch.full((9, 16), 126, dtype=torch.uint8, device=DEVICE), 288)
    x = torch.eye(288, device=DEVICE)[:16].to(dtype)
    wanted = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=DEVICE) / 2
    got = matmul.matmul(x, weight)
    assert got is not None and torch.equal(got[:, 0].float(), torch.cat((wanted, -wanted)))
    parts = matmul.operand(weight)
    assert parts is not None and torch.equal(matmul.unpacked(parts, dtype).float(), weight.floats())


@pytest.mark.parametrize("kind", ["dense", "w4", "m4", "i8", "f8 block"])
@pytest.mark.parametrize("activation", ["", "silu", "clamped_swiglu"])
def test_experts_with_biases_and_activations(kind: str, activation: str) -> None:
    weight, bias = weights(48, 64, 4)[kind], torch.randn(4, 48, device=DEVICE)
    x, starts = torch.randn(12, 64, device=DEVICE) / 8, torch.tensor([0, 3, 3, 9, 12], dtype=torch.int32, device=DEVICE)
    got = matmul.grouped(x, weight, starts, bias=bias, activation=activation)
    close(got, ops.grouped_matmul(x, weight, starts, bias=bias, activation=activation))


@pytest.mark.parametrize("kind", ["dense", "w4", "i8", "f8 block"])
def test_parts_of_the_depth_are_added(kind: str) -> None:
    weight, x = weights(40, 160)[kind], torch.randn(5, 160, device=DEVICE)
    parts, tile = matmul.operand(weight), Tile(m=16, n=32, k=32, split=2)
    assert parts is not None
    if isinstance(weight, I8):
        quantized, by_row = ops.quantize_rows(x)
        close(matmul.tiled(quantized, parts, x.dtype, x_scales=by_row, tile=tile), ops.matmul(x, weight))
    else:
        close(matmul.tiled(x, parts, x.dtype, tile=tile), ops.matmul(x, weight))


def test_one_row_of_a_float_matrix() -> None:
    weight, x = weights(40, 96)["dense"], torch.randn(1, 96, device=DEVICE)
    parts = matmul.operand(weight)
    assert parts is not None
    close(matmul.gemv(x, parts)[0], ops.matmul(x, weight))


@pytest.mark.parametrize("kind", ["f8 tensor", "f8 row", "f8 block"])
def test_fp8_on_both_sides(kind: str) -> None:
    stored = weights(40, 64)[kind]
    assert isinstance(stored, F8)
    weight = F8(stored.codes, stored.scales, stored.block)
    x = torch.randint(-15, 16, (20, 64), device=DEVICE) / 8
    x[:, ::32] = 1.75
    close(matmul.matmul(x, weight), ops.matmul(x, weight))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_by_expert(kind: str) -> None:
    weight = weights(40, 64, 4)[kind]
    x, starts = torch.randn(30, 64, device=DEVICE), torch.tensor([0, 3, 3, 24, 30], dtype=torch.int32, device=DEVICE)
    close(matmul.grouped(x, weight, starts), ops.grouped_matmul(x, weight, starts))


def test_odd_groups_are_left_to_others() -> None:
    odd = W8(codes(-9, 9, 2, 8, 48, dtype=torch.int8), scales(2, 2, 8))
    assert matmul.operand(odd) is None
    x, starts = torch.randn(5, 48, device=DEVICE), torch.tensor([0, 3, 5], dtype=torch.int32, device=DEVICE)
    close(matmul.grouped(x, odd, starts), ops.grouped_matmul(x, odd, starts))


class NoHostReads(TorchDispatchMode):
    """What a recording of a graph forbids: the host waiting for a value of the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "local_scalar" not in str(func) and "nonzero" not in str(func), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["dense", "w4", "w4 act order", "w8 by 16", "f8 block"])
def test_experts_can_be_recorded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gate_up, down = weights(128, 64, 4)[kind], weights(64, 64, 4)[kind]
    mixture = Mixture(Experts(4, 2, True), torch.randn(4, 64, device=DEVICE), (gate_up,), down)
    x = torch.randn(5, 64, device=DEVICE)
    wanted = mixture(x)
    monkeypatch.setattr(ops, "on_gpu", lambda x: True)
    with NoHostReads():
        got = mixture(x)
    close(got, wanted)
