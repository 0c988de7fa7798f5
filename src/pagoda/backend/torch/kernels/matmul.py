"""Which kernel takes a matrix product: one row, few rows, many rows, rows sorted by expert."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from pagoda.backend.torch.kernels import fp8, launch, product
from pagoda.backend.torch.kernels.activation import KINDS, coded_gated
from pagoda.backend.torch.kernels.activation import gated as gated_of
from pagoda.backend.torch.kernels.gemv import _gemv
from pagoda.backend.torch.kernels.launch import arrivals, block_of
from pagoda.backend.torch.kernels.norm import coded_add_rms_norm, quantize_f8, quantize_rows
from pagoda.backend.torch.kernels.tuning import Tile, bucket, measured
from pagoda.backend.torch.kernels.unpack import _unpack
from pagoda.backend.torch.kernels.w4 import AFTER_ADDED, BEFORE, BY_SUMS, IN_CODES, NONE, _w4
from pagoda.backend.torch.packs import F8, I8, M4, W4, W8, Dense, Weight
from pagoda.weights.device_size import W4_CHUNK

FEW_ROWS = 64
"""Up to here a quantized weight is unpacked in registers, above once, to floats, for cuBLAS."""
FEW_ROWS_F8 = 16
"""Up to here inputs stay floats beside an FP8 weight: making them FP8 costs more than it saves."""
_UNPACK_BLOCK = 1024
_UNDER_WAY_BYTES = 64 << 10
"""Of weights, on their way to each multiprocessor: twice what the memory brings it within its delay."""
_MOST_SPLIT = 8
_MOST_RUN = 1 << 14
"""Values that share a scale, which one program finds."""
_DEEP_BYTES = 160 << 10
_NAMES = {Dense: "dense", W4: "w4", M4: "m4", W8: "w8", I8: "i8", F8: "f8"}


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
    whole: bool = False  # zero points are whole numbers

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
    return _grouped_operand(name, weight)


def _grouped_operand(name: str, weight: W4 | M4 | W8) -> Operand | None:
    n, k = weight.rows, weight.codes.shape[-1] if isinstance(weight, W8) else weight.inputs
    groups, least = weight.scales.shape[-2], 16 if isinstance(weight, W8) else 32
    if (groups > 1 and (k // groups) % least) or k % 16:
        return None
    kind, whole = 2 if isinstance(weight, W8) else 1, isinstance(weight, W4) and weight.whole
    zeros = None if isinstance(weight, M4) else weight.zeros
    return Operand(kind, name, weight.codes, weight.scales, zeros, k // groups if groups > 1 else 0, n, k, whole)


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
        return _of_codes(*quantize_rows(x), weight, parts, x.dtype)
    if isinstance(weight, F8) and (run := _coded_run(len(x), weight, parts, x.device)):
        return _of_codes(*quantize_f8(x, run, weight.input_scale), weight, parts, x.dtype)
    if len(x) == 1 and not isinstance(weight, W4 | M4):
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


def _coded_run(rows: int, weight: Weight, parts: Operand, device: torch.device) -> int:
    """How many inputs of such a product share a scale of 8 bits; 0 where they stay floats."""
    if isinstance(weight, I8):
        return parts.k
    both = isinstance(weight, F8) and weight.quantize_input and launch.gpu_of(device).capability >= fp8.SINCE
    return (parts.group or parts.k) if both and rows > FEW_ROWS_F8 else 0


def _of_codes(codes: Tensor, scales: Tensor, weight: I8 | F8, parts: Operand, dtype: torch.dtype) -> Tensor:
    if isinstance(weight, I8) or parts.group or parts.n % 16 or parts.k % 16 or not fp8.has_row_scales(codes.device):
        return tiled(codes, parts, dtype, x_scales=scales)
    return fp8.by_rows(codes, scales, weight.codes, weight.scales).to(dtype)


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
    tile = tile or measured(f"gemv_{parts.name}", parts.n, parts.k, 1)
    tile = tile or gemv_tile(n, parts, x.device, gated=gated)
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


def gemv_tile(n: int, parts: Operand, device: torch.device, *, gated: bool) -> Tile:
    """Rows enough for each program to be worth its start, and programs enough for each multiprocessor to have six."""
    rows = 4 if gated else 8
    while rows > 1 and n < rows * 6 * launch.gpu_of(device).processors:
        rows //= 2
    return Tile(n=rows, k=1024 if parts.codes.element_size() > 1 else 2048, warps=4)


def fused(x: Tensor, weight: Weight, norm: Norm, *, gated: bool) -> tuple[Tensor, Tensor] | None:
    """See ops.norm_matmul; None where the norm is a kernel of its own, which gives floats."""
    if isinstance(weight, W4 | M4) or (isinstance(weight, W8) and weight.order is not None):
        return None
    parts = operand(weight)
    if parts is not None and isinstance(weight, F8 | I8) and (run := _coded_run(len(x), weight, parts, x.device)):
        return None if getattr(weight, "input_scale", None) is not None else _coded(x, weight, parts, norm, run, gated)
    if len(x) != 1 or parts is None or parts.k % 16 or x.dtype == torch.float32:
        return None
    return gemv(x, parts, norm=norm, gated=gated)


def coded_inputs(rows: int, weight: Weight, device: torch.device) -> int:
    """How many inputs of such a product share a scale of 8 bits, which the kernel before it can give; 0: none."""
    parts = operand(weight)
    if parts is None or not isinstance(weight, F8 | I8) or getattr(weight, "input_scale", None) is not None:
        return 0
    run = _coded_run(rows, weight, parts, device)
    return 0 if run < parts.k and run & (run - 1) else run


def gated_product(gate_up: Tensor, activation: str, weight: Weight) -> Tensor | None:
    """See ops.gated_product; None where the activation gives floats."""
    run, parts = coded_inputs(len(gate_up), weight, gate_up.device), operand(weight)
    if not run or parts is None or not isinstance(weight, F8 | I8) or block_of(min(run, parts.k)) > _MOST_RUN:
        return None
    kind = torch.int8 if isinstance(weight, I8) else fp8.FP8
    return _of_codes(*coded_gated(gate_up, activation, kind, run), weight, parts, gate_up.dtype)


def _coded(
    x: Tensor, weight: I8 | F8, parts: Operand, norm: Norm, run: int, gated: bool
) -> tuple[Tensor, Tensor] | None:
    """The norm gives the inputs in 8 bits."""
    if run < parts.k and run & (run - 1):
        return None
    kind = torch.int8 if isinstance(weight, I8) else fp8.FP8
    codes, scales, total = coded_add_rms_norm(x, norm.residual, norm.weight, norm.eps, kind, run)
    y = _of_codes(codes, scales, weight, parts, x.dtype)
    return (gated_of(y, "silu") if gated else y), total


def gated_few(x: Tensor, weight: Weight) -> Tensor | None:
    """The product of few rows with a quantized weight and `gated` by silu of it in one kernel; None: in two."""
    parts = operand(weight)
    if parts is None or isinstance(weight, Dense | I8) or parts.n % 16 or not 0 < len(x) <= FEW_ROWS:
        return None
    if isinstance(weight, F8) and _coded_run(len(x), weight, parts, x.device):
        return None
    if isinstance(weight, W4 | W8) and weight.order is not None:
        x = x[:, weight.order]
    return tiled(x.contiguous(), parts, x.dtype, activation="silu")


def default_tile(rows: int, experts: int, parts: Operand, x: Tensor, dtype: torch.dtype) -> Tile:
    """Of rows times a weight (or so many times the weight of each expert), for results of that type."""
    if dtype == torch.float32:  # more would not fit the registers
        return Tile(m=16, n=32, k=32, warps=4, stages=2)
    gpu, bytes_only = launch.gpu_of(x.device), x.element_size() == 1
    if rows <= 16:
        tile = Tile(m=16, n=32, k=128, warps=4, stages=4)
    elif rows <= 64:
        tile = Tile(m=64, n=64, k=128 if bytes_only else 64, warps=4, stages=3 if bytes_only else 4)
    else:
        few = not experts and triton.cdiv(rows, 128) * triton.cdiv(parts.n, 128) < 2 * gpu.processors
        deep = bytes_only and gpu.shared_bytes >= _DEEP_BYTES
        tile = Tile(m=128, n=64 if few else 128, k=128 if deep else 64, warps=8, stages=3)
    programs = triton.cdiv(rows, tile.m) * triton.cdiv(parts.n, tile.n)
    return replace(tile, split=shared_by(programs, rows, tile.k, tile.n * tile.k * tile.stages, parts, x.device))


def shared_by(programs: int, rows: int, step: int, loaded: int, parts: Operand, device: torch.device) -> int:
    """How many programs share the depth of each tile: so many that each multiprocessor has enough of the weights on
    their way, as far as their parts are small beside the weights and each has some steps to do. `loaded` codes are on
    their way to each program."""
    if parts.kind == product.I8.value:  # whole sums of whole numbers are exact, whatever the tile is
        return 1
    width = parts.codes.element_size() * (1 if parts.kind != product.W4.value else 0.125)
    wanted = launch.gpu_of(device).processors * _UNDER_WAY_BYTES // int(loaded * width)
    most = min(_MOST_SPLIT, int(parts.k * width) // (16 * rows), parts.k // (4 * step))
    split = 1
    while 2 * split <= most and 4 * programs * split <= 3 * wanted:
        split *= 2
    return split


def tiled(
    x: Tensor,
    parts: Operand,
    dtype: torch.dtype,
    *,
    x_scales: Tensor | None = None,
    starts: Tensor | None = None,
    tokens: Tensor | None = None,
    tile: Tile | None = None,
    bias: Tensor | None = None,
    activation: str = "",
) -> Tensor:
    """Rows of x (`tokens`: x[tokens]) against a weight, or against those of their experts (`starts`); see
    ops.grouped_matmul for `bias` and `activation`."""
    if parts.kind == product.W4.value:
        return _four_bits(x, parts, starts, tokens, tile, bias, activation)
    rows, experts = len(x if tokens is None else tokens), 0 if starts is None else len(starts) - 1
    each = rows if not experts else -(-rows // experts)
    tile = tile or measured(parts.name, parts.n, parts.k, bucket(max(1, each)))
    tile = tile or default_tile(max(1, each), experts, parts, x, dtype)
    split = 1 if experts else tile.split
    kind = product.F8_BOTH.value if x.dtype == fp8.FP8 else parts.kind
    # a step along the inputs stays within one group
    step = min(tile.k, block_of(parts.k, 32), parts.group & -parts.group or tile.k)
    out = torch.empty(rows, parts.n // (2 if activation else 1), dtype=dtype, device=x.device)
    sums = torch.empty(split, rows, parts.n, dtype=torch.float32, device=x.device) if split > 1 else out
    grid = (_tiles(rows, experts, tile.m), triton.cdiv(parts.n, tile.n), split)
    if rows:
        product._product[grid](
            x, parts.codes, parts.scales, parts.scales if parts.zeros is None else parts.zeros,
            parts.scales if x_scales is None else x_scales, out if bias is None else bias,
            parts.codes if starts is None else starts, parts.codes if tokens is None else tokens, out, sums,
            arrivals(x.device, grid[0] * grid[1]), rows, parts.n, parts.k, parts.codes.shape[-1], *parts.scale_shape,
            experts, KIND=kind,
            ZERO=parts.zeros is not None, GROUP=parts.group, BIAS=bias is not None, GATED=KINDS[activation],
            EXPERTS=block_of(experts) if experts else 0, GATHER=tokens is not None, SPLIT=split, BM=tile.m, BN=tile.n,
            BK=step, num_warps=tile.warps,
            num_stages=tile.stages, **launch.chained(x.device),
        )  # fmt: skip
    return out


def _tiles(rows: int, experts: int, height: int) -> int:
    """Tiles that surely hold the rows of all experts, each of which begins one of its own."""
    return min(rows, rows // height + experts) if experts else triton.cdiv(rows, height)


def _four_bits(
    x: Tensor,
    parts: Operand,
    starts: Tensor | None,
    tokens: Tensor | None,
    tile: Tile | None,
    bias: Tensor | None,
    activation: str,
) -> Tensor:
    rows, experts = len(x if tokens is None else tokens), 0 if starts is None else len(starts) - 1
    each = rows if not experts else -(-rows // experts)
    tile = tile or measured("w4", parts.n, parts.k, bucket(max(1, each))) or w4_tile(each, parts, x)
    split = 1 if experts else tile.split
    out = torch.empty(rows, parts.n // (2 if activation else 1), dtype=x.dtype, device=x.device)
    sums = torch.empty(split, rows, parts.n, dtype=torch.float32, device=x.device) if split > 1 else out
    grid = (_tiles(rows, experts, tile.m), triton.cdiv(parts.n, tile.n), split)
    # slices of 32 inputs that share a scale: all 8 of a chunk, some, or none for sure
    run = 8 if parts.group % W4_CHUNK == 0 else parts.group // 32 if W4_CHUNK % parts.group == 0 else 1
    if rows:
        _w4[grid](
            x, parts.codes, parts.scales, parts.scales if parts.zeros is None else parts.zeros,
            out if bias is None else bias, parts.codes if starts is None else starts,
            parts.codes if tokens is None else tokens, out, sums,
            arrivals(x.device, grid[0] * grid[1]), rows, parts.n, parts.k, parts.codes.shape[-1],
            parts.scale_shape[0], experts,
            GROUP=parts.group, RUN=run, ZEROS=_zeros_of(parts, rows, experts, tile), WHOLE=parts.k % W4_CHUNK == 0,
            BIAS=bias is not None, GATED=KINDS[activation], EXPERTS=block_of(experts) if experts else 0,
            GATHER=tokens is not None, SPLIT=split, BM=tile.m, BN=tile.n, STAGES=tile.stages, num_warps=tile.warps,
            **launch.chained(x.device),
        )  # fmt: skip
    return out


def _zeros_of(parts: Operand, rows: int, experts: int, tile: Tile) -> int:
    """A few rows wait for the weights, more of them for the matrix units, which sums would ask twice."""
    if parts.zeros is None:
        return int(NONE.value)
    if rows == 1 and not experts:
        return int(BEFORE.value)
    if tile.m <= 16:
        return int(BY_SUMS.value)
    return int((IN_CODES if parts.whole else AFTER_ADDED).value)


def w4_tile(rows: int, parts: Operand, x: Tensor) -> Tile:
    m = min(16 if x.dtype == torch.float32 else 64, block_of(rows))
    programs = triton.cdiv(parts.n, 64) * triton.cdiv(rows, m)
    # the codes of the last of three stages are on their way only when those of the first are used
    split = shared_by(programs, rows, W4_CHUNK, 2 * 64 * W4_CHUNK, parts, x.device)
    return Tile(m=m, n=64, split=split, warps=4, stages=3)


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


def grouped(
    x: Tensor,
    weight: Weight,
    starts: Tensor,
    tokens: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    activation: str = "",
) -> Tensor:
    """See ops.grouped_matmul. Nothing is read back from the device, so that it can be recorded in a graph."""
    parts = operand(weight) or _dense_operand(weight.floats().to(x.dtype))
    if isinstance(weight, W4 | W8) and weight.order is not None:
        x, tokens = x if tokens is None else x[tokens], None
        rows = torch.arange(len(x), dtype=starts.dtype, device=x.device)
        x = x.gather(1, weight.order[torch.searchsorted(starts, rows, right=True) - 1])
    codes, scales = quantize_rows(x) if isinstance(weight, I8) else (x.contiguous(), None)
    return tiled(codes, parts, x.dtype, x_scales=scales, starts=starts, tokens=tokens, bias=bias, activation=activation)
