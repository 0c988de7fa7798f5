#!/usr/bin/env python3
"""Every kernel of the CUDA backend compiled for GPUs that are not here: does it build, does it fit, does it spill.

    python bench/gpu_compile.py                          # all that executors and bench/gpu.py launch, six GPUs
    python bench/gpu_compile.py --gpus 90,120 --quick    # a decode step and a prompt of small shapes
    python bench/gpu_compile.py --gpus 90 --models Qwen3-8B --steps 200    # compilations before and behind the start

What is compiled is what models of public shapes launch (see gpu_launches.py), as the limits of each GPU make them
choose their tiles, and with --tiles those that bench/gpu.py tries. Ends with 1 where a kernel does not compile or
wants more shared memory than the GPU has for one program.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import gpu_cases
import gpu_kernels as kernels
import gpu_sass
import numpy as np
import torch
import triton
from gpu_launches import META, Launch, noted, plan_of, step, without_data
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from pagoda.backend.torch import executor as executors
from pagoda.backend.torch import ops
from pagoda.backend.torch.batch import Heads
from pagoda.backend.torch.graphs import padding
from pagoda.backend.torch.graphs import sizes as graph_sizes
from pagoda.backend.torch.kernels import matmul
from pagoda.backend.torch.kernels.launch import Gpu
from pagoda.backend.torch.kernels.stage import stage
from pagoda.backend.torch.packs import FP8
from pagoda.types import StepPlan

GPUS = {
    80: ("A100", Gpu(108, 163 << 10, (8, 0))),
    86: ("RTX 30, A10", Gpu(84, 99 << 10, (8, 6))),
    89: ("RTX 40, L40", Gpu(142, 99 << 10, (8, 9))),
    90: ("H100, H200", Gpu(132, 227 << 10, (9, 0))),
    100: ("B200", Gpu(148, 227 << 10, (10, 0))),
    120: ("RTX 50", Gpu(170, 99 << 10, (12, 0))),
}
BF16, F32 = torch.bfloat16, torch.float32
MODELS = ("Qwen3-0.6B", "Qwen3-8B", "Qwen3-8B-FP8", "Qwen3-32B-AWQ", "Qwen3-30B-A3B", "gpt-oss-20b")
TINY = ("tiny", "tiny-experts")


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
    """What the machine code of a program says (see gpu_sass.facts), what it takes, how many fit; or the error."""
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
    with tempfile.TemporaryDirectory() as folder:
        found |= gpu_sass.facts(built.asm["cubin"], Path(folder))
    shared, warps = built.metadata.shared, built.metadata.num_warps
    room = GPUS[made.gpu][1].shared_bytes
    found["programs"] = gpu_sass.programs(made.gpu, room, found["registers"], shared, warps)
    return {**found, "shared": shared, "warps": warps}


def tile_of(made: Source) -> str:
    """Constants and options that tell variants of a kernel apart."""
    names = [name for name, _ in made.signature]
    constants = {names[path[0]]: value for path, value in made.constants}
    return " ".join(f"{k}={v}" for k, v in {**constants, **dict(made.options)}.items() if v is not None)


def of_models(
    models: Iterable[str], gpu: Gpu, batches: Iterable[int], prompts: Iterable[int]
) -> Iterator[tuple[str, Launch]]:
    """What steps of these models launch, and which one."""
    for model in models:
        decoder = without_data(model, 1, 4096, gpu)
        for requests in batches:
            for sampling in ({}, {"top_k": 40, "top_p": 0.9}, {"top_p": 0.9}):
                plan = plan_of(requests, temperature=0.7 if sampling else 0.0, **sampling)
                yield from ((f"{model} {requests}", each) for each in step(decoder, plan, gpu))
        for tokens in prompts:
            for requests in (1, 2):
                name = f"{model} {requests} of {tokens}"
                yield from ((name, each) for each in step(decoder, plan_of(requests, tokens), gpu))


def mixed(rng: random.Random, most: int, before: int) -> StepPlan:
    """Requests of which most generate and some begin, in any way of drawing, behind up to `before` others."""
    count = rng.randint(1, most)
    lengths = [rng.randint(2, 600) if rng.random() < 0.2 else 1 for _ in range(count)]
    sampling = rng.choice(({}, {"temperature": 0.7}, {"temperature": 0.7, "top_p": 0.9}))
    starts = np.cumsum([0, *lengths], dtype=np.int32)
    old = np.array([rng.randint(0, before) for _ in lengths], np.int32)
    tables = np.tile(np.arange((before + 600) // 16 + 1, dtype=np.int32), (count, 1))
    plan, tokens = plan_of(count, **sampling), np.zeros(starts[-1], np.int32)
    return replace(plan, tokens=tokens, starts=starts, positions=old, block_tables=tables, rows=starts[1:] - 1)


def compilations(model: str, number: int, steps: int) -> dict[str, Any]:
    """How many programs a server has compiled when it is ready, how many it compiles for its graphs while nobody asks,
    and which ones so many steps of all kinds make it compile all the same."""
    gpu, rng, most = GPUS[number][1], random.Random(1), 256
    decoder, seen = without_data(model, 1, 4096, gpu), set[Source]()

    def fresh(launches: Iterable[Launch]) -> list[Source]:
        new = {source(note, number) for note in launches if note.kernel is not None} - seen
        seen.update(new)
        return list(new)

    def padded(requests: int) -> list[Launch]:
        with noted(gpu) as notes:
            hidden = decoder.hidden(batch := padding(requests, 4096, META, three=False))
            decoder.logits(hidden[:1])
            stage(batch, batch)
        return notes

    trials = executors.trial_steps(2048, most, 4096)
    ready = [new for plan in trials for new in fresh(step(decoder, plan, gpu))]
    ready += [new for requests in (most, 1) for new in fresh(padded(requests))]
    idle = [new for requests in graph_sizes(most) for new in fresh(padded(requests))]
    asked = [mixed(rng, rng.choice((1, 2, 4, 16, 100)), 3000) for _ in range(steps)]
    late = [new for plan in asked for new in fresh(step(decoder, plan, gpu))]
    return {"model": model, "ready": len(ready), "idle": len(idle), "late": [f"{x.name} {tile_of(x)}" for x in late]}


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
                    ops.attend(qkv, None, None, table, ops.prepared(batch), *caches, shape)
        for heads in (16, 20, 128):
            shape = Heads(heads, 1, 576, 1.0, None, 1e-6, False, turned=64)
            for kind, cached in ((BF16, BF16), (BF16, FP8), (F32, F32)):
                for requests in ([(70, 0), (33, 50)], [(1, 700), (1, 30)]):
                    cache = torch.empty(64, 16, 1, 576, dtype=cached, device=META)
                    batch = ops.prepared(kernels.batch_of(requests, META))
                    q = torch.empty(len(batch.tokens), heads, 576, dtype=kind, device=META)
                    ops.paged_attention(q, cache, cache, batch, shape)
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


def sources(numbers: Iterable[int], sizes: tuple[Any, ...], *, cases: bool, tiles: bool) -> dict[Source, str]:
    """All that is to be compiled, and what launches it first. `sizes`: models, batches, lengths of prompts."""
    found: dict[Source, str] = {}
    for number in numbers:
        gpu = GPUS[number][1]
        launches = [*of_models(sizes[0], gpu, *sizes[1:])]
        launches += [("", each) for each in (*of_cases(gpu), *of_shapes(gpu))] if cases else ()
        launches += [("", each) for each in of_tiles(gpu)] if tiles else ()
        for name, note in launches:
            if note.kernel is not None:
                found.setdefault(source(note, number), name)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", default=",".join(map(str, GPUS)), help="compute capabilities, such as 90,120")
    parser.add_argument("--quick", action="store_true", help="small shapes, a few kernels")
    parser.add_argument("--models", help="steps of these alone, separated by commas")
    parser.add_argument("--batches", default="1,8,64,256", help="with --models: requests of a token each")
    parser.add_argument("--prompts", action="store_true", help="with --models: prompts too")
    parser.add_argument("--tiles", action="store_true", help="the tiles that bench/gpu.py tries, too; some may not fit")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--only", default="", help="kernels whose name has one of these, separated by commas")
    parser.add_argument("--facts", action="store_true", help="a table of what the machine code of each program does")
    parser.add_argument("--out", type=Path, help="a file for one line of JSON for each kernel")
    parser.add_argument("--steps", type=int, help="with --models: what so many steps compile behind a server's start")
    args = parser.parse_args()
    numbers = [int(number) for number in args.gpus.split(",")]
    if args.steps:
        for model in args.models.split(","):
            print(json.dumps(compilations(model, numbers[0], args.steps)), flush=True)
        return
    sizes: tuple[Any, ...] = (MODELS, (1, 8, 16, 64, 256), (128, 4096))
    if args.quick:
        sizes = (TINY, (1, 3), (20,))
    elif args.models:
        sizes = (args.models.split(","), [int(n) for n in args.batches.split(",")], (128, 4096) if args.prompts else ())
    names = sources(numbers, sizes, cases=not (args.quick or args.models), tiles=args.tiles)
    todo = [s for s in names if any(part in s.name for part in args.only.split(","))]
    print(f"{len(todo)} kernels", flush=True)
    rows = []
    with ProcessPoolExecutor(args.jobs) as pool:
        for made, row in zip(todo, pool.map(compiled, todo), strict=True):
            rows.append(row | {"of": names[made]})
            if "error" in row or row["shared"] > GPUS[row["gpu"]][1].shared_bytes or row["stack"]:
                print(json.dumps(row), flush=True)
    if args.out:
        args.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print("\n".join(facts_table(rows) if args.facts else table(rows)))
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


def facts_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Programs that differ, in the order of the models that launch them."""
    yield "| kernel | of a step of | sm | registers | spills | shared | programs | loads | matrix |"
    yield "|---|---|---|---|---|---|---|---|---|"
    seen = set()
    for row in rows:
        if "error" in row or not row["of"]:
            continue
        loads = ", ".join(f"{count} x {width}" for width, count in row["loads"].items())
        matrix = ", ".join(f"{count} {name}" for name, count in row["matrix"].items()) or "–"
        facts = (row["registers"], row["local"], f"{row['shared'] / 1024:.0f} KiB", row["programs"], loads, matrix)
        if (row["gpu"], row["kernel"], facts) not in seen:
            seen.add((row["gpu"], row["kernel"], facts))
            yield f"| `{row['kernel']}` | {row['of']} | {row['gpu']} | " + " | ".join(map(str, facts)) + " |"


if __name__ == "__main__":
    main()
