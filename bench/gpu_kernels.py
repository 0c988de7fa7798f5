"""Each kernel of the CUDA backend alone: how near is it to the roof, which tiles are best for it."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from pagoda.backend.torch import ops
from pagoda.backend.torch.batch import Batch, Heads
from pagoda.backend.torch.kernels import attention, matmul
from pagoda.backend.torch.kernels.launch import AHEAD
from pagoda.backend.torch.kernels.tuning import DEFAULTS, Tile, bucket
from pagoda.backend.torch.packs import F8, FP8, I8, W4, W4_CHUNK, W8, Dense, Weight

Row = dict[str, Any]
GROUP = 128
"""Inputs of a 4-bit group, and rows and columns of an FP8 block: what the public checkpoints have."""
CACHE_BYTES = 256 << 20
"""Inputs take turns over so many bytes: what one call left in the cache is gone when its turn comes again."""


PROMPT_ROWS = 64
"""More rows than this are a prompt."""
ROW_KERNELS = 18
"""Of `in_a_row`."""


SUPPOSED = {"read_gb_s": 4300.0, "copy_gb_s": 4300.0, "tflop_s": 790.0, "fp8_tflop_s": 1580.0}
"""Of an H200: what shares are of where the roof cannot be measured."""


@contextmanager
def dispatch(kernels: bool) -> Iterator[None]:
    """Whether ops goes to the kernels, whatever the device: plain PyTorch is what they are compared with."""
    before = ops.on_gpu
    ops.on_gpu = lambda x: kernels
    try:
        yield
    finally:
        ops.on_gpu = before


def timed(calls: list[Callable[[], Any]], device: torch.device, repeats: int = 5) -> float:
    """Seconds of one call: the median over replays of a graph of all of them (on a CPU: over plain runs)."""
    for call in calls:
        call()
    if device.type != "cuda":
        started = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - started) / len(calls)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(times)


def in_turns(make: Callable[[], Callable[[], Any]], nbytes: int, device: torch.device) -> list[Callable[[], Any]]:
    """So many calls with inputs of their own that none finds them in the cache."""
    count = 2 if device.type != "cuda" else max(3, min(64, CACHE_BYTES // max(1, nbytes)))
    return [make() for _ in range(count)]


def batch_of(requests: list[tuple[int, int]], device: torch.device) -> Batch:
    """Requests of (tokens now, tokens before), their blocks one after the other."""
    contexts = [now + before for now, before in requests]
    width = -(-max(contexts) // 16)
    tables = torch.randperm(len(requests) * width, device=device, dtype=torch.int64).view(-1, width).int()
    positions = torch.cat([torch.arange(before, now + before) for now, before in requests]).to(device)
    owners = torch.repeat_interleave(torch.tensor([now for now, _ in requests])).to(device)
    cells = tables[owners, positions // 16].long() * 16 + positions % 16
    starts = torch.tensor([0, *[now for now, _ in requests]]).cumsum(0)
    ints = {"dtype": torch.int32, "device": device}
    return Batch(
        tokens=torch.zeros(len(positions), **ints),
        positions=positions.int(),
        cells=cells,
        starts=starts.to(**ints),
        contexts=torch.tensor(contexts, **ints),
        block_tables=tables,
        slots=torch.arange(len(requests), **ints),
        rows=torch.arange(len(requests), **ints),
        max_query=max(now for now, _ in requests),
        max_context=max(contexts),
    )


def weights(n: int, k: int, dtype: torch.dtype, device: torch.device) -> dict[str, Weight]:
    """A weight of each kind, of the size that keeps products near 1."""
    groups, size = -(-k // GROUP), k**-0.5
    four = torch.randint(-(1 << 31), 1 << 31, (n, -(-k // W4_CHUNK) * W4_CHUNK // 8), dtype=torch.int32, device=device)
    steps = torch.full((groups, n), 0.2 * size, dtype=dtype, device=device)
    signed = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
    by_row = torch.full((n,), 0.01 * k**-0.5, device=device)
    fp8 = torch.randn(n, k, dtype=dtype, device=device).to(FP8)
    return {
        "dense": Dense(torch.randn(n, k, dtype=dtype, device=device).mul_(size)),
        "w4": W4(four, steps, torch.full_like(steps, 8.0), k),
        "w8": W8(signed, by_row[None, :]),
        "i8": I8(signed, by_row),
        "f8 row": F8(fp8, (by_row * 50)[:, None]),
        "f8 block": F8(fp8, torch.full((-(-n // GROUP), groups), size, device=device), block=(GROUP, GROUP)),
    }


def roofs(dtype: torch.dtype, device: torch.device, small: bool) -> Row:
    """What the device gives at best: reading, copying, and the product of large matrices."""
    size, n = (1 << 20, 128) if small else (1 << 31, 8192)
    data = torch.randint(0, 100, (size // 4,), dtype=torch.int32, device=device).view(torch.float32)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out: Row = {"read_gb_s": size / timed([data.sum], device) / 1e9}
    out["copy_gb_s"] = 2 * size / timed([data.clone], device) / 1e9
    out["tflop_s"] = 2 * n**3 / timed([lambda: a @ b], device) / 1e12
    if device.type == "cuda":
        one = torch.ones((), device=device)
        f8 = a.to(FP8)
        product = timed([lambda: torch._scaled_mm(f8, f8.t(), one, one, out_dtype=dtype, use_fast_accum=True)], device)
        out["fp8_tflop_s"] = 2 * n**3 / product / 1e12
    return out


def weight_nbytes(weight: Weight) -> int:
    fields = [getattr(weight, name, None) for name in ("data", "codes", "scales", "zeros")]
    return sum(f.nbytes for f in fields if f is not None)


def micro(
    shapes: list[tuple[int, int]], dtype: torch.dtype, device: torch.device, small: bool
) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Bytes and operations per second of each kernel on real shapes."""
    decodes = ((2, 64),) if small else ((1, 1024), (8, 1024), (64, 1024), (256, 1024), (8, 16384))
    many = [[(1, context - 1)] * count for count, context in decodes]
    many += [[(tokens, 0)] for tokens in ((64,) if small else (1024, 4096, 16384))]
    for requests in many:
        name = f"attention {len(requests)} of {sum(requests[0])}, {requests[0][0]} at once"
        yield name, lambda r=requests: attention_row(r, dtype, device, small)  # type: ignore[misc]
    for n, k in shapes:
        for name, weight in weights(n, k, dtype, device).items():
            for rows in (1, 3, 70) if small else (1, 8, 64, 256, 4096):
                args = (name, (n, k), rows, weight_nbytes(weight), dtype, device)
                yield f"{name} {n}x{k} rows {rows}", lambda args=args: product_row(*args)  # type: ignore[misc]


def in_a_row(x: torch.Tensor, norm: torch.Tensor, weight: Weight) -> torch.Tensor:
    """Each kernel takes what the one before it has just written."""
    residual = x * 0
    for _ in range(ROW_KERNELS // 3):
        y, residual = ops.norm_matmul(x, residual, norm, 1e-6, weight)
        x = ops.matmul(ops.rms_norm(y, norm, 1e-6), weight)
    return x


def ahead_row(dtype: torch.dtype, device: torch.device, small: bool) -> Row:
    """The same kernels, started ahead and one after the other: as the results of both must be, to the bit. Raises
    RuntimeError where they are not."""
    n = 64 if small else 4096
    x, norm = torch.randn(1, n, device=device).to(dtype), torch.rand(n, device=device)
    weight = Dense(torch.randn(n, n, device=device).mul_(n**-0.5).to(dtype))
    calls = [lambda: in_a_row(x, norm, weight)] * (1 if small else 20)
    with dispatch(True):
        with apart():
            wanted, apart_s = in_a_row(x, norm, weight).clone(), timed(calls, device)
        got = [in_a_row(x, norm, weight) for _ in range(1 if small else 200)]
        wrong = sum(not torch.equal(each, wanted) for each in got)
        if wrong:
            raise RuntimeError(f"{wrong} of {len(got)} results differ where kernels start ahead; the rest runs without")
        return {"ahead_us": timed(calls, device) * 1e6 / ROW_KERNELS, "apart_us": apart_s * 1e6 / ROW_KERNELS}


@contextmanager
def apart() -> Iterator[None]:
    """Kernels start one after the other."""
    before = os.environ.get(AHEAD)
    os.environ[AHEAD] = "0"
    try:
        yield
    finally:
        os.environ.pop(AHEAD) if before is None else os.environ.update({AHEAD: before})


def product_row(
    name: str, shape: tuple[int, int], rows: int, nbytes: int, dtype: torch.dtype, device: torch.device
) -> Row:
    n, k = shape

    def make() -> Callable[[], Any]:
        own, x = weights(n, k, dtype, device)[name], torch.randn(rows, k, device=device).to(dtype)
        return lambda: ops.matmul(x, own)

    with dispatch(True):
        seconds = timed(in_turns(make, nbytes, device), device)
        row = {"kernel": f"{name} {n}x{k}", "rows": rows, **rates(seconds, nbytes, 2 * rows * n * k)}
        if rows > PROMPT_ROWS and name in ("i8", "f8 row", "f8 block"):
            x, own = torch.randn(rows, k, device=device).to(dtype), weights(n, k, dtype, device)[name]
            for other, call in instead(x, own).items():
                row[other] = duration(call, device)
    return row


def instead(x: torch.Tensor, weight: Weight) -> dict[str, Callable[[], Any]]:
    """What else there is for the product of a prompt with a matrix of 8 bits: floats made of it, cuBLAS' own blocks."""
    parts = matmul.operand(weight)
    assert parts is not None
    found = {"unpacked_us": lambda: torch.nn.functional.linear(x, matmul.unpacked(parts, x.dtype))}
    if isinstance(weight, F8) and weight.block is not None:
        scales = weight.scales.t()

        def blocks() -> torch.Tensor:
            codes, own = ops.quantize_f8(x, GROUP)
            by_column = own.t().contiguous().t()
            return torch._scaled_mm(codes, weight.codes.t(), by_column, scales, out_dtype=x.dtype)

        found["library_us"] = blocks
    return found


def duration(call: Callable[[], Any], device: torch.device) -> float | str:
    """Microseconds, or why there are none: not every GPU and version of PyTorch has every product."""
    try:
        return timed([call] * 3, device) * 1e6
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]


def attention_row(requests: list[tuple[int, int]], dtype: torch.dtype, device: torch.device, small: bool) -> Row:
    heads, kv_heads, size = (4, 2, 16) if small else (32, 8, 128)
    shape = Heads(heads, kv_heads, size, size**-0.5, None, 1e-6, False)
    batch, call = attention_call(requests, shape, dtype, device)
    keys = sum(now + before for now, before in requests)
    pairs = sum(now * before + now * (now + 1) // 2 for now, before in requests)
    kind = "decode" if batch.max_query == 1 else "prefill"
    seconds = timed([call], device)
    nbytes = 2 * keys * kv_heads * size * dtype.itemsize
    name = f"attention {kind} {heads}/{kv_heads}/{size} {len(requests)} of {requests[0][0] + requests[0][1]}"
    return {"kernel": name, "rows": len(requests), **rates(seconds, nbytes, 4 * pairs * heads * size)}


def attention_call(
    requests: list[tuple[int, int]], shape: Heads, dtype: torch.dtype, device: torch.device
) -> tuple[Batch, Callable[[], Any]]:
    batch = batch_of(requests, device)
    blocks = int(batch.block_tables.numel())
    k, v = (torch.randn(blocks, 16, shape.kv_heads, shape.head_dim, device=device).to(dtype) for _ in range(2))
    q = torch.randn(len(batch.tokens), shape.heads, shape.head_dim, device=device).to(dtype)
    with dispatch(True):
        batch = ops.prepared(batch)
    return batch, lambda: attention.paged_attention(q, k, v, batch, shape)


def rates(seconds: float, nbytes: int, operations: int) -> Row:
    return {"us": seconds * 1e6, "gb_s": nbytes / seconds / 1e9, "tflop_s": operations / seconds / 1e12}


# few enough that compiling them all leaves time to measure them
GEMV_TILES = tuple(Tile(n=n, k=k, warps=w) for n in (1, 2, 4) for k in (1024, 2048) for w in (2, 4))
W4_TILES = tuple(
    Tile(m=16, n=n, split=s, warps=w, stages=p)
    for n, w in ((32, 2), (64, 4), (128, 8))
    for s in (1, 2, 4, 8)
    for p in (3, 4)
)
W4_MANY = tuple(Tile(m=64, n=n, split=s, warps=w, stages=3) for n, w in ((64, 4), (128, 8)) for s in (1, 2, 4))
FEW_TILES = tuple(Tile(m=16, n=n, k=k, split=split, stages=4) for n in (16, 32) for k in (64, 128) for split in (1, 4))
MANY_TILES = tuple(Tile(m=64, n=n, warps=w, stages=s) for n in (64, 128) for w in (4, 8) for s in (3, 4))
PREFILL_TILES = tuple(Tile(m=m, n=n, warps=w, stages=2) for m in (64, 128) for n in (64, 128) for w in (4, 8))
DECODE_TILES = tuple(Tile(n=n, warps=w, stages=s) for n, s in ((32, 5), (32, 7), (64, 3), (64, 5)) for w in (2, 4))


def best(tiles: tuple[Tile, ...], seconds_of: Callable[[Tile], float], until: float) -> tuple[Tile | None, float]:
    """The fastest tile; those that do not fit the GPU are passed over."""
    found, least = None, float("inf")
    for tile in tiles:
        if time.monotonic() > until:
            break
        try:
            seconds = seconds_of(tile)
        except Exception:  # too much shared memory, too few registers: this tile is not for this GPU
            continue
        if seconds < least:
            found, least = tile, seconds
    return found, least


Tuning = Callable[[], tuple[str, Tile, Row] | None]


def autotune(
    shapes: list[tuple[int, int]], dtype: torch.dtype, device: torch.device, small: bool, until: float
) -> Iterator[tuple[str, Tuning]]:
    """Keys of tuned.json with the best tile. A float matrix gets one only where it beats cuBLAS by 3 %."""
    cut = slice(0, 1) if small else slice(None)
    for name, tiles, requests in (
        ("prefill", PREFILL_TILES, [(32 if small else 4096, 0)]),
        ("decode", DECODE_TILES, [(1, 63 if small else 1023)] * (2 if small else 64)),
    ):
        args = (name, tiles[cut], requests, dtype, device, small, until)
        yield name, lambda args=args: tuned_attention(*args)  # type: ignore[misc]
    for n, k in shapes:
        for name in ("w4", "f8 block", "dense"):
            for rows, tiles in ((1, GEMV_TILES), (8, FEW_TILES), (64, MANY_TILES)):
                if name == "w4":
                    tiles = W4_MANY if rows > 16 else W4_TILES
                of = (n, k, name, rows, tiles[cut], dtype, device, until)
                yield f"{name} {n}x{k} rows {rows}", lambda of=of: tuned_product(*of)  # type: ignore[misc]


def tuned_attention(
    name: str,
    tiles: tuple[Tile, ...],
    requests: list[tuple[int, int]],
    dtype: torch.dtype,
    device: torch.device,
    small: bool,
    until: float,
) -> tuple[str, Tile, Row] | None:
    shape = Heads(4, 2, 16, 0.25, None, 1e-6, False) if small else Heads(32, 8, 128, 128**-0.5, None, 1e-6, False)
    call = attention_call(requests, shape, dtype, device)[1]

    def attend(tile: Tile) -> float:
        before = attention.choose
        attention.choose = lambda kernel: tile
        try:
            return timed([call], device, 3)
        finally:
            attention.choose = before

    tile, seconds = best(tiles, attend, until)
    return (name, tile, {"us": seconds * 1e6, "default": asdict(DEFAULTS[name])}) if tile else None


def tuned_product(
    n: int,
    k: int,
    name: str,
    rows: int,
    tiles: tuple[Tile, ...],
    dtype: torch.dtype,
    device: torch.device,
    until: float,
) -> tuple[str, Tile, Row] | None:
    first = weights(n, k, dtype, device)[name]
    copies = [
        weights(n, k, dtype, device)[name]
        for _ in range(min(6 if device.type == "cuda" else 1, CACHE_BYTES // weight_nbytes(first)))
    ]
    operands = [matmul.operand(w) for w in (first, *copies)]
    x = torch.randn(rows, k, device=device).to(dtype)

    def seconds_of(tile: Tile) -> float:
        alone = rows == 1 and name != "w4"
        run = matmul.gemv if alone else lambda x, p, t: matmul.tiled(x, p, dtype, tile=t)
        return timed([lambda p=p: run(x, p, tile) for p in operands], device, 3)  # type: ignore[misc]

    tile, seconds = best(tiles, seconds_of, until)
    row: Row = {"us": seconds * 1e6, "gb_s": weight_nbytes(first) / seconds / 1e9}
    if name == "dense":
        plain = timed([lambda p=p: torch.nn.functional.linear(x, p.codes) for p in operands if p], device, 3)  # type: ignore[misc]
        row["cublas_us"] = plain * 1e6
        if seconds > 0.97 * plain:
            return None
    kernel = name.split()[0]
    key = f"{'gemv_' if rows == 1 and kernel != 'w4' else ''}{kernel}/{n}/{k}/{bucket(rows)}"
    return (key, tile, row) if tile else None
