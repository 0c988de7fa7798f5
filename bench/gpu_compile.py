#!/usr/bin/env python3
"""Every kernel of the CUDA backend compiled for GPUs that are not here: does it build, does it fit, does it spill.

    python bench/gpu_compile.py                          # all that executors and bench/gpu.py launch, six GPUs
    python bench/gpu_compile.py --gpus 90,120 --quick    # a decode step and a prompt of small shapes

What is compiled is what models of public shapes launch (see gpu_launches.py), as the limits of each GPU make them
choose their tiles, and with --tiles those that bench/gpu.py tries. Ends with 1 where a kernel does not compile or
wants more shared memory than the GPU has for one program.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import gpu_cases
import gpu_kernels as kernels
import torch
import triton
from gpu_launches import META, Launch, noted, plan_of, step, without_data
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from pagoda.backend.torch import ops
from pagoda.backend.torch.batch import Heads
from pagoda.backend.torch.kernels import matmul
from pagoda.backend.torch.kernels.launch import Gpu
from pagoda.backend.torch.packs import FP8

GPUS = {
    80: ("A100", Gpu(108, 163 << 10, (8, 0))),
    86: ("RTX 30, A10", Gpu(84, 99 << 10, (8, 6))),
    89: ("RTX 40, L40", Gpu(142, 99 << 10, (8, 9))),
    90: ("H100, H200", Gpu(132, 227 << 10, (9, 0))),
    100: ("B200", Gpu(148, 227 << 10, (10, 0))),
    120: ("RTX 50", Gpu(170, 99 << 10, (12, 0))),
}
BF16, F32 = torch.bfloat16, torch.float32
MODELS = ("Qwen3-0.6B", "Qwen3-8B", "Qwen3-8B-FP8", "Qwen3-32B-AWQ", "Qwen3-30B-A3B")
TINY = ("tiny", "tiny-experts")
TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Source:
    """A kernel with the types and constants of a launch: what is compiled, for one GPU."""

    gpu: int
    module: str
    name: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    attributes: tuple[tuple[tuple[int, ...], Any], ...]
    options: tuple[tuple[str, Any], ...]


def source(note: Launch, gpu: int) -> Source:
    kernel: JITFunction[Any] = note.kernel
    backend = make_backend(GPUTarget("cuda", gpu, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, special, more = bind(*note.args, **note.options)
    _, signature, constants, attributes = kernel._pack_args(backend, more, bound, special, more)
    tuples = (tuple((k, _frozen(v)) for k, v in each.items()) for each in (signature, constants, attributes))
    return Source(gpu, kernel.fn.__module__, note.name, *tuples, tuple(more.items()))  # type: ignore[call-arg]


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def compiled(made: Source) -> dict[str, Any]:
    """Registers, bytes of stack (spills) and of shared memory of a program, or the error."""
    kernel = getattr(sys.modules[made.module], made.name)
    attributes = {k: [list(item) for item in v] for k, v in made.attributes}
    found: dict[str, Any] = {"gpu": made.gpu, "kernel": made.name, "tile": tile_of(made)}
    try:
        built = triton.compile(
            ASTSource(kernel, dict(made.signature), dict(made.constants), attributes),
            target=GPUTarget("cuda", made.gpu, 32), options=dict(made.options),
        )  # fmt: skip
    except Exception as error:
        return {**found, "error": f"{type(error).__name__}: {error}"[-400:]}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        text = subprocess.run([TOOL, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    used = dict(re.findall(r"(REG|STACK):(\d+)", text.stdout))
    return {**found, "registers": int(used["REG"]), "stack": int(used["STACK"]), "shared": built.metadata.shared}


def tile_of(made: Source) -> str:
    """Constants and options that tell variants of a kernel apart."""
    names = [name for name, _ in made.signature]
    constants = {names[path[0]]: value for path, value in made.constants}
    return " ".join(f"{k}={v}" for k, v in {**constants, **dict(made.options)}.items() if v is not None)


def of_models(models: Iterable[str], gpu: Gpu, batches: Iterable[int], prompts: Iterable[int]) -> Iterator[Launch]:
    """What steps of these models launch."""
    for model in models:
        decoder = without_data(model, 1, 4096, gpu)
        for requests in batches:
            yield from step(decoder, plan_of(requests), gpu)
            yield from step(decoder, plan_of(requests, temperature=0.7, top_k=40, top_p=0.9), gpu)
        for tokens in prompts:
            yield from step(decoder, plan_of(1, tokens), gpu)
            yield from step(decoder, plan_of(2, tokens), gpu)


def of_cases(gpu: Gpu) -> Iterator[Launch]:
    """What the first phase of bench/gpu.py launches: every kernel, every kind of weight."""
    with noted(gpu) as notes:
        for _, call in gpu_cases.cases(torch.bfloat16, META, small=False):
            call()
    yield from notes


def of_shapes(gpu: Gpu) -> Iterator[Launch]:
    """Attention of other shapes and types, and experts of each kind."""
    with noted(gpu) as notes:
        for heads, kv_heads, size in ((8, 4, 256), (32, 8, 64), (71, 1, 64), (32, 32, 96), (40, 8, 128)):
            shape = Heads(heads, kv_heads, size, 1.0, 4096, 1e-6, False)
            for kind, cached in (
                (torch.bfloat16, torch.bfloat16),
                (torch.bfloat16, FP8),
                (torch.float32, torch.float32),
            ):
                for requests in ([(70, 0), (33, 50)], [(1, 700), (1, 30)]):
                    batch = kernels.batch_of(requests, META)
                    caches = [torch.empty(64, 16, kv_heads, size, dtype=cached, device=META) for _ in range(2)]
                    qkv = torch.empty(len(batch.tokens), (heads + 2 * kv_heads) * size, dtype=kind, device=META)
                    table = torch.empty(4096, size, device=META)
                    q = ops.rope_and_cache(qkv, None, None, table, batch, *caches, shape)
                    ops.paged_attention(q, *caches, batch, shape)
        starts = torch.empty(9, dtype=torch.int32, device=META)
        for kind in (torch.bfloat16, torch.float32):
            for weight in kernels.weights(1024, 4096, kind, META).values():
                experts = weight.__class__(**{f: _eight(getattr(weight, f)) for f in weight.__slots__})
                for rows in (8, 64, 512, 4096):
                    ops.grouped_matmul(torch.empty(rows, 4096, dtype=kind, device=META), experts, starts)
                    if kind == torch.float32:
                        ops.matmul(torch.empty(rows, 4096, dtype=kind, device=META), weight)
    yield from notes


def of_tiles(gpu: Gpu) -> Iterator[Launch]:
    """The tiles of products that bench/gpu.py tries. It passes over those that do not fit."""
    with noted(gpu) as notes:
        for name in ("w4", "f8 block", "dense"):
            parts = matmul.operand(kernels.weights(4096, 4096, BF16, META)[name])
            for rows, tiles in ((1, kernels.GEMV_TILES), (8, kernels.FEW_TILES), (64, kernels.MANY_TILES)):
                if name == "w4":
                    tiles = kernels.W4_MANY if rows > 16 else kernels.W4_TILES
                x = torch.empty(rows, 4096, dtype=BF16, device=META)
                for tile in tiles:
                    if rows == 1 and name != "w4":
                        matmul.gemv(x, parts, tile)
                    else:
                        matmul.tiled(x, parts, BF16, tile=tile)
    yield from notes


def _eight(part: Any) -> Any:
    return part.expand(8, *part.shape).contiguous() if isinstance(part, torch.Tensor) else part


def sources(numbers: Iterable[int], *, quick: bool, tiles: bool) -> list[Source]:
    found: dict[Source, None] = {}
    for number in numbers:
        gpu = GPUS[number][1]
        sizes: tuple[Any, ...] = (TINY, (1, 3), (20,)) if quick else (MODELS, (1, 8, 16, 64, 256), (128, 4096))
        launches = [*of_models(sizes[0], gpu, *sizes[1:]), *(() if quick else (*of_cases(gpu), *of_shapes(gpu)))]
        launches += of_tiles(gpu) if tiles else ()
        found |= dict.fromkeys(source(note, number) for note in launches if note.kernel is not None)
    return list(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", default=",".join(map(str, GPUS)), help="compute capabilities, such as 90,120")
    parser.add_argument("--quick", action="store_true", help="small shapes, a few kernels")
    parser.add_argument("--tiles", action="store_true", help="the tiles that bench/gpu.py tries, too; some may not fit")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--only", default="", help="kernels whose name has this")
    parser.add_argument("--out", type=Path, help="a file for one line of JSON for each kernel")
    args = parser.parse_args()
    numbers = [int(number) for number in args.gpus.split(",")]
    todo = [s for s in sources(numbers, quick=args.quick, tiles=args.tiles) if args.only in s.name]
    print(f"{len(todo)} kernels", flush=True)
    rows = []
    with ProcessPoolExecutor(args.jobs) as pool:
        for row in pool.map(compiled, todo):
            rows.append(row)
            if "error" in row or row["shared"] > GPUS[row["gpu"]][1].shared_bytes or row["stack"]:
                print(json.dumps(row), flush=True)
    if args.out:
        args.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print("\n".join(table(rows)))
    if any("error" in row or row["shared"] > GPUS[row["gpu"]][1].shared_bytes for row in rows):
        sys.exit(1)


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The most that any variant of each kernel takes, by GPU."""
    yield "| kernel | " + " | ".join(f"sm_{n}" for n in GPUS if any(r["gpu"] == n for r in rows)) + " |"
    for name in sorted({row["kernel"] for row in rows}):
        cells = []
        for number in GPUS:
            own = [row for row in rows if row["kernel"] == name and row["gpu"] == number]
            good = [row for row in own if "error" not in row]
            if not own:
                continue
            most = [max((row[part] for row in good), default=0) for part in ("registers", "stack", "shared")]
            failed = f", {len(own) - len(good)} FAILED" if len(own) > len(good) else ""
            cells.append(f"{len(good)}: {most[0]} / {most[1]} / {most[2] / 1024:.0f} KiB{failed}")
        yield f"| `{name}` | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
