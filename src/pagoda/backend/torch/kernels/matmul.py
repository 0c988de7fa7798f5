"""Which kernel takes a matrix product: one row, few rows, many rows, rows sorted by expert."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from pagoda.backend.torch.kernels import fp8, launch, product
from pagoda.backend.torch.kernels.gemv import _gemv
from pagoda.backend.torch.kernels.launch import arrivals, block_of
from pagoda.backend.torch.kernels.norm import quantize_f8, quantize_rows
from pagoda.backend.torch.kernels.tuning import Tile, bucket, measured
from pagoda.backend.torch.kernels.unpack import _unpack
from pagoda.backend.torch.kernels.w4 import _w4
from pagoda.backend.torch.packs import F8, I8, W4, W8, Dense, Weight
from pagoda.weights.device_size import W4_CHUNK

FEW_ROWS = 64
"""Up to here a quantized weight is unpacked in registers, above once, to floats, for cuBLAS."""
FEW_ROWS_F8 = 16
"""Up to here inputs stay floats beside an FP8 weight: making them FP8 costs more than it saves."""
_UNPACK_BLOCK = 1024
_NAMES = {Dense: "dense", W4: "w4", W8: "w8", I8: "i8", F8: "f8"}


@dataclass(frozen=True, slots=True)
class Operand:
    """A weight as the kernels take it: codes [.., N, K], scale and zero tables, how many inputs share a scale."""

    kind: int
    name: str
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    group: int  # 0: all inputs of a row
    n: int
    k: int

    @property
    def by_row(self) -> bool:
        return self.scales.numel() > 1

    @property
    def scale_shape(self) -> tuple[int, int]:
        """Of one expert's scales."""
        return (1, self.n) if self.name == "i8" else (self.scales.shape[-2], self.scales.shape[-1])


def operand(weight: Weight) -> Operand | None:
    """None where the kernels do not take it: groups or blocks of odd sizes."""
    name = _NAMES[type(weight)]
    match weight:
        case Dense(data=data):
            return _dense_operand(data)
        case I8(codes=codes, scales=scales):
            return Operand(4, name, codes, scales, None, 0, codes.shape[-2], codes.shape[-1])
        case F8(codes=codes, scales=scales, block=block):
            n, k = codes.shape[-2], codes.shape[-1]
            if block is not None and (block[0] != block[1] or block[0] % 32):
                return None
            return Operand(3, name, fp8.known(codes), scales, None, block[1] if block else 0, n, k)
    n, k = weight.rows, weight.inputs if isinstance(weight, W4) else weight.codes.shape[-1]
    groups = weight.scales.shape[-2]
    least = 32 if isinstance(weight, W4) else 16
    if (groups > 1 and (k // groups) % least) or k % 16:
        return None
    return Operand(
        1 if isinstance(weight, W4) else 2, name, weight.codes, weight.scales, weight.zeros,
        k // groups if groups > 1 else 0, n, k,
    )  # fmt: skip


def _dense_operand(data: Tensor) -> Operand:
    return Operand(0, "dense", data, data, None, 0, data.shape[-2], data.shape[-1])


def matmul(x: Tensor, weight: Weight) -> Tensor | None:
    """x [T, in] times the transpose of a weight, in x's type; None where no kernel takes it."""
    parts = operand(weight)
    if parts is None:
        return None
    order = weight.order if isinstance(weight, W4 | W8) else None
    x = (x if order is None else x[:, order]).contiguous()
    if isinstance(weight, Dense):
        return _dense(x, parts)
    if isinstance(weight, I8):
        codes, scales = quantize_rows(x)
        return tiled(codes, parts, x.dtype, x_scales=scales)
    both = isinstance(weight, F8) and weight.quantize_input and launch.gpu_of(x.device).capability >= fp8.SINCE
    if isinstance(weight, F8) and both and len(x) > FEW_ROWS_F8:
        return _both_f8(x, weight, parts)
    if len(x) == 1 and not isinstance(weight, W4):
        return gemv(x, parts)[0]
    if len(x) <= FEW_ROWS:
        return tiled(x, parts, x.dtype)
    return F.linear(x, unpacked(parts, x.dtype))


def _dense(x: Tensor, parts: Operand) -> Tensor:
    """cuBLAS, but for a single row, whose kernel reads its weights before the one ahead of it has ended, and where a
    measurement found a kernel of ours faster."""
    if len(x) == 1 and parts.k % 16 == 0 and x.dtype != torch.float32:
        return gemv(x, parts)[0]
    if len(x) and (tile := measured("dense", parts.n, parts.k, bucket(len(x)))):
        return tiled(x, parts, x.dtype, tile=tile)
    return F.linear(x, parts.codes)


def _both_f8(x: Tensor, weight: F8, parts: Operand) -> Tensor:
    codes, scales = quantize_f8(x, parts.group or parts.k, weight.input_scale)
    if parts.group or not x.is_cuda or parts.n % 16 or parts.k % 16:
        return tiled(codes, parts, x.dtype, x_scales=scales)
    # the product of Hopper's own, with a scale for each row on both sides
    out = weight.scales.expand(parts.n, 1).t().contiguous()
    half = x.dtype if x.dtype == torch.bfloat16 else torch.bfloat16
    result = torch._scaled_mm(codes, parts.codes.t(), scales, out, out_dtype=half, use_fast_accum=True)
    return result.to(x.dtype)


@dataclass(frozen=True, slots=True)
class Norm:
    """What comes before a product: `residual` is added to its row, and the sum is normed."""

    residual: Tensor
    weight: Tensor
    eps: float


def gemv(
    x: Tensor, parts: Operand, tile: Tile | None = None, *, norm: Norm | None = None, gated: bool = False
) -> tuple[Tensor, Tensor]:
    """One row against any weight but I8 and W4: the product (`gated`: silu(first half) * second half of it), and the
    sum that was normed.
    """
    n = parts.n // 2 if gated else parts.n
    tile = tile or measured(f"gemv_{parts.name}", parts.n, parts.k, 1) or gemv_tile(n, parts, x.device)
    # whole parts need no masks; parts of odd sizes would be too small
    even = parts.k & -parts.k
    depth = min(tile.k, even if even >= 256 else block_of(parts.k))
    out, total = torch.empty(1, n, dtype=x.dtype, device=x.device), torch.empty_like(x) if norm else x
    _gemv[(triton.cdiv(n, tile.n),)](
        x, norm.residual if norm else x, norm.weight if norm else x, total, parts.codes, parts.scales,
        parts.scales if parts.zeros is None else parts.zeros, out, n, parts.k, parts.scale_shape[1],
        norm.eps if norm else 0.0, KIND=parts.kind, ZERO=parts.zeros is not None, BY_ROW=int(parts.by_row),
        GROUP=parts.group, NORM=norm is not None, GATED=gated, BN=tile.n, BK=depth, WHOLE=parts.k % depth == 0,
        ALL=block_of(parts.k), num_warps=tile.warps, num_stages=1,
        **launch.chained(x.device),
    )  # fmt: skip
    return out, total


def gemv_tile(n: int, parts: Operand, device: torch.device) -> Tile:
    """Rows enough for each program to be worth its start, and programs enough for each multiprocessor to have eight."""
    rows = 4
    while rows > 1 and n < rows * 8 * launch.gpu_of(device).processors:
        rows //= 2
    return Tile(n=rows, k=1024 if parts.codes.element_size() > 1 else 2048, warps=4)


def fused(x: Tensor, weight: Weight, norm: Norm, *, gated: bool) -> tuple[Tensor, Tensor] | None:
    """See ops.norm_matmul; None where one kernel cannot do it all."""
    if len(x) != 1 or isinstance(weight, W4 | I8) or (isinstance(weight, W8) and weight.order is not None):
        return None
    parts = operand(weight)
    if parts is None or parts.k % 16 or x.dtype == torch.float32:
        return None
    return gemv(x, parts, norm=norm, gated=gated)


def default_tile(rows: int, dtype: torch.dtype) -> Tile:
    if dtype == torch.float32:  # more would not fit the registers
        return Tile(m=16, n=32, k=32, warps=4, stages=2)
    if rows <= 16:
        return Tile(m=16, n=32, k=128, warps=4, stages=4)
    if rows <= 64:
        return Tile(m=64, n=64, k=64, warps=4, stages=4)
    return Tile(m=128, n=128, k=64, warps=8, stages=3)


def tiled(
    x: Tensor,
    parts: Operand,
    dtype: torch.dtype,
    *,
    x_scales: Tensor | None = None,
    starts: Tensor | None = None,
    tokens: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Rows of x (`tokens`: x[tokens]) against a weight, or against those of their experts (`starts`)."""
    if parts.kind == product.W4.value:
        return _four_bits(x, parts, starts, tokens, tile)
    rows, experts = len(x if tokens is None else tokens), 0 if starts is None else len(starts) - 1
    each = rows if not experts else -(-rows // experts)
    tile = tile or measured(parts.name, parts.n, parts.k, bucket(max(1, each))) or default_tile(each, dtype)
    split = 1 if experts else tile.split
    kind = product.F8_BOTH.value if x.dtype == fp8.FP8 else parts.kind
    # a step along the inputs stays within one group
    step = min(tile.k, block_of(parts.k, 32), parts.group & -parts.group or tile.k)
    out = torch.empty(split, rows, parts.n, dtype=torch.float32 if split > 1 else dtype, device=x.device)
    grid = (_tiles(rows, experts, tile.m), triton.cdiv(parts.n, tile.n), split)
    if rows:
        product._product[grid](
            x, parts.codes, parts.scales, parts.scales if parts.zeros is None else parts.zeros,
            parts.scales if x_scales is None else x_scales, parts.codes if starts is None else starts,
            parts.codes if tokens is None else tokens, out, rows,
            parts.n, parts.k, parts.codes.shape[-1], *parts.scale_shape, experts, KIND=kind,
            ZERO=parts.zeros is not None, GROUP=parts.group, EXPERTS=block_of(experts) if experts else 0,
            GATHER=tokens is not None, SPLIT=split, BM=tile.m, BN=tile.n, BK=step, num_warps=tile.warps,
            num_stages=tile.stages, **launch.chained(x.device),
        )  # fmt: skip
    return _joined(out, dtype) if split > 1 else out[0]


def _tiles(rows: int, experts: int, height: int) -> int:
    """Tiles that surely hold the rows of all experts, each of which begins one of its own."""
    return min(rows, rows // height + experts) if experts else triton.cdiv(rows, height)


def _four_bits(x: Tensor, parts: Operand, starts: Tensor | None, tokens: Tensor | None, tile: Tile | None) -> Tensor:
    rows, experts = len(x if tokens is None else tokens), 0 if starts is None else len(starts) - 1
    each = rows if not experts else -(-rows // experts)
    tile = tile or measured("w4", parts.n, parts.k, bucket(max(1, each))) or w4_tile(each, parts, x)
    split = 1 if experts else tile.split
    out = torch.empty(rows, parts.n, dtype=x.dtype, device=x.device)
    sums = torch.empty(split, rows, parts.n, dtype=torch.float32, device=x.device) if split > 1 else out
    grid = (_tiles(rows, experts, tile.m), triton.cdiv(parts.n, tile.n), split)
    # slices of 32 inputs that share a scale: all 8 of a chunk, some, or none for sure
    run = 8 if parts.group % W4_CHUNK == 0 else parts.group // 32 if W4_CHUNK % parts.group == 0 else 1
    if rows:
        _w4[grid](
            x, parts.codes, parts.scales, parts.zeros, parts.codes if starts is None else starts,
            parts.codes if tokens is None else tokens, out, sums,
            arrivals(x.device, grid[0] * grid[1]), rows, parts.n, parts.k, parts.codes.shape[-1],
            parts.scale_shape[0], experts,
            GROUP=parts.group, RUN=run, SINGLE=rows == 1 and not experts,
            WHOLE=parts.k % W4_CHUNK == 0, EXPERTS=block_of(experts) if experts else 0,
            GATHER=tokens is not None, SPLIT=split, BM=tile.m, BN=tile.n, STAGES=tile.stages, num_warps=tile.warps,
            **launch.chained(x.device),
        )  # fmt: skip
    return out


def w4_tile(rows: int, parts: Operand, x: Tensor) -> Tile:
    """So many programs share the depth that each multiprocessor has two or three, and each of them enough to do."""
    m = min(16 if x.dtype == torch.float32 else 64, block_of(rows))
    programs, chunks = triton.cdiv(parts.n, 64) * triton.cdiv(rows, m), triton.cdiv(parts.k, W4_CHUNK)
    split = 1
    while split < 8 and programs * split * 2 <= launch.gpu_of(x.device).processors * 3 and chunks >= 8 * split:
        split *= 2
    return Tile(m=m, n=64, split=split, warps=4, stages=3)


def _joined(parts: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    product._add_parts[(triton.cdiv(out.numel(), 1024),)](
        parts,
        out,
        out.numel(),
        SPLIT=len(parts),
        BLOCK=1024,
        num_warps=4,
        **launch.chained(out.device),
    )
    return out


def unpacked(parts: Operand, dtype: torch.dtype) -> Tensor:
    """The matrix [N, K] as floats."""
    out = torch.empty(parts.n, parts.k, dtype=dtype, device=parts.codes.device)
    _unpack[(parts.n, triton.cdiv(parts.k, _UNPACK_BLOCK))](
        parts.codes, parts.scales, parts.scales if parts.zeros is None else parts.zeros, out, parts.k,
        parts.codes.shape[-1], parts.scale_shape[1], KIND=parts.kind, ZERO=parts.zeros is not None,
        BY_ROW=parts.by_row, GROUP=parts.group, BLOCK=_UNPACK_BLOCK, num_warps=4,
        **launch.chained(out.device),
    )  # fmt: skip
    return out


def grouped(x: Tensor, weight: Weight, starts: Tensor, tokens: Tensor | None = None) -> Tensor:
    """See ops.grouped_matmul. Nothing is read back from the device, so that it can be recorded in a graph."""
    parts = operand(weight) or _dense_operand(weight.floats().to(x.dtype))
    if isinstance(weight, W4 | W8) and weight.order is not None:
        x, tokens = x if tokens is None else x[tokens], None
        rows = torch.arange(len(x), dtype=starts.dtype, device=x.device)
        x = x.gather(1, weight.order[torch.searchsorted(starts, rows, right=True) - 1])
    if isinstance(weight, I8):
        codes, scales = quantize_rows(x)
        return tiled(codes, parts, x.dtype, x_scales=scales, starts=starts, tokens=tokens)
    return tiled(x.contiguous(), parts, x.dtype, starts=starts, tokens=tokens)
