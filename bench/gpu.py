#!/usr/bin/env python3
"""The CUDA backend on one GPU, in one run of at most 8 minutes: right or wrong, and how near to what the GPU can do.

    python bench/gpu.py --out bench/results/gpu-NAME            # a GPU
    python bench/gpu.py --out DIR --quick                       # tiny shapes; without a GPU in Triton's interpreter

Needs the package, PyTorch and Triton; no network and no checkpoint: weights are random, of the public shapes. First
every kernel against plain PyTorch, then the kernels alone, whole models through the scheduler (decode at several batch
sizes, prefill, offline throughput, top kernels of a profile), and last a search for better tiles. Every line is written
to DIR/results.jsonl as it comes; tiles go to DIR/tuned.json, which src/pagoda/backend/torch/kernels/ takes as it is.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

STARTED = time.monotonic()
if "--quick" in sys.argv and not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

import gpu_kernels as kernels  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402

from pagoda.arch.dummy import dummy  # noqa: E402
from pagoda.arch.registry import bind, load_spec  # noqa: E402
from pagoda.backend.base import Capacity  # noqa: E402
from pagoda.backend.torch.convert import Target  # noqa: E402
from pagoda.backend.torch.device import Device  # noqa: E402
from pagoda.backend.torch.executor import TorchExecutor, make_caches  # noqa: E402
from pagoda.backend.torch.graphs import DecodeGraphs, Recorder  # noqa: E402
from pagoda.backend.torch.load import Loader  # noqa: E402
from pagoda.sched.scheduler import Scheduler, SchedulerConfig  # noqa: E402
from pagoda.types import Request, SamplingParams  # noqa: E402

Row = dict[str, Any]
QWEN3 = {"model_type": "qwen3", "head_dim": 128, "vocab_size": 151936, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
         "max_position_embeddings": 40960, "num_key_value_heads": 8, "tie_word_embeddings": False}  # fmt: skip


def qwen3(hidden: int, layers: int, heads: int, size: int, **more: Any) -> dict[str, Any]:
    table = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {**QWEN3, **table, "intermediate_size": size, **more}


GROUP = 128
STORED: dict[str, Row] = {
    "float": {},
    "w4": {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}},
    "fp8": {"quantization_config": {"quant_method": "fp8", "weight_block_size": [GROUP, GROUP]}},
}
EXPERTS = {"model_type": "qwen3_moe", "norm_topk_prob": True, "num_experts": 128, "num_experts_per_tok": 8}
LLAMA3 = {**qwen3(4096, 32, 32, 14336), "model_type": "llama", "vocab_size": 128256, "rope_theta": 5e5}
MODELS: dict[str, tuple[dict[str, Any], Any]] = {
    "Qwen3-0.6B": (qwen3(1024, 28, 16, 3072, tie_word_embeddings=True), "float"),
    "Qwen3-8B": (qwen3(4096, 36, 32, 12288), "float"),
    "Qwen3-8B-FP8": (qwen3(4096, 36, 32, 12288), "fp8"),
    "Qwen3-32B-AWQ": (qwen3(5120, 64, 64, 25600), "w4"),
    "Qwen3-4B": (qwen3(2560, 36, 32, 9728, tie_word_embeddings=True), "float"),
    "Llama-3-8B": (LLAMA3, "float"),
    "Qwen3-30B-A3B": (qwen3(2048, 48, 32, 6144, num_key_value_heads=4, moe_intermediate_size=768, **EXPERTS), "float"),
}
TINY = qwen3(64, 1, 4, 64, head_dim=32, num_key_value_heads=2, vocab_size=500, tie_word_embeddings=True)
TINY_MODELS: dict[str, tuple[dict[str, Any], Any]] = {
    "tiny": (TINY, "w4"),
    "tiny-experts": ({**TINY, **EXPERTS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
                     "float"),
}  # fmt: skip
SHAPES = [
    (6144, 4096),
    (4096, 4096),
    (24576, 4096),
    (4096, 12288),
    (1024, 3072),
    (6144, 1024),
    (51200, 5120),
    (5120, 25600),
]
LIMITS_S = {"correctness": 80, "kernels": 60, "models": 230, "autotune": 90}
TOTAL_S = 470


class Report:
    """Lines to the file as they come, kept for the table."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.rows = folder, []
        self._file = os.open(folder / "results.jsonl", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

    def add(self, phase: str, row: Row) -> None:
        row = {"phase": phase, "at_s": round(time.monotonic() - STARTED, 2), **row}
        self.rows.append(row)
        os.write(self._file, (json.dumps(row) + "\n").encode())  # a line is there whole, or not at all

    def tiles(self, found: dict[str, Row]) -> None:
        whole = self.folder / "tuned.json.new"
        whole.write_text(json.dumps(found, indent=1))
        whole.replace(self.folder / "tuned.json")

    def of(self, phase: str) -> list[Row]:
        return [row for row in self.rows if row["phase"] == phase]


class Model:
    """A random model behind the scheduler, as the engine runs it."""

    def __init__(self, name: str, config: dict[str, Any], kind: Any, device: Device, dtype: torch.dtype, small: bool):
        started = time.monotonic()
        source = dummy({**config, **STORED[kind]})
        self.spec = load_spec(source)
        self.name, self.kind, self.dtype, self.small = name, kind, dtype, small
        self.length, self.most, self.tokens = (256, 4, 64) if small else (18432, 256, 8192)
        target = Target(device.device, dtype, fp8_inputs=device.fp8)
        decoder = Loader(self.spec, bind(self.spec, source), target).decoder(self.length, None)
        per_block = 2 * 16 * dtype.itemsize * sum(x.attention.kv_heads * x.attention.head_dim for x in self.spec.layers)
        free = torch.cuda.mem_get_info()[0] - (14 << 30) if device.is_gpu else 0
        self.blocks = 64 if small else min(max(64, free // per_block), 40_000)
        decoder.caches = make_caches(self.spec, self.blocks, dtype, device.device)
        self.graphs = DecodeGraphs(
            decoder.hidden, Recorder(), most_requests=self.most, most_context=self.length, device=device.device
        ) if device.is_gpu else None  # fmt: skip
        self.executor = TorchExecutor(decoder, Capacity(self.blocks, 0, 0, 0, name), device, self.graphs)
        self.rng = np.random.default_rng(1)
        self.made_s = time.monotonic() - started

    def scheduler(self) -> Scheduler:
        return Scheduler(
            SchedulerConfig(self.blocks, self.most, self.tokens, self.length, self.spec.vocab_size, False, None, None)
        )

    def request(self, name: str, prompt: int, output: int, temperature: float = 0.0) -> Request:
        ids = self.rng.integers(0, self.spec.vocab_size, prompt).tolist()
        params = SamplingParams(temperature=temperature, seed=1, max_tokens=output, ignore_eos=True)
        return Request(request_id=name, prompt_token_ids=ids, params=params)

    def step(self, scheduler: Scheduler) -> tuple[float, int]:
        """Seconds of one step, tokens that came of it."""
        started = time.perf_counter()
        plan = scheduler.plan()
        if plan is None:
            raise RuntimeError("the scheduler has no step: more is asked of the cache than it holds")
        deltas = scheduler.apply(plan, self.executor.launch(plan).wait())
        return time.perf_counter() - started, sum(len(d.token_ids) for d in deltas)

    def streams(self, count: int, context: int, steps: int) -> Scheduler:
        """A scheduler whose `count` requests have read their prompts."""
        scheduler = self.scheduler()
        for i in range(count):
            scheduler.add(self.request(str(i), context, steps + 4))
        begun = 0
        while begun < count:
            begun += self.step(scheduler)[1]
        return scheduler

    def layer_values(self, mlps: float) -> float:
        """Numbers in the matrices of all layers, with so many MLPs in each."""
        layer, hidden, a = self.spec.layers[0], self.spec.hidden_size, self.spec.layers[0].attention
        values = hidden * (2 * a.heads + 2 * a.kv_heads) * a.head_dim + mlps * 3 * hidden * layer.mlp.size
        return values * len(self.spec.layers)

    def linear_nbytes(self, count: int) -> int:
        """Bytes of weights that a decode step of so many tokens reads: of the experts those that any token is sent to,
        if each takes its own by chance."""
        experts = self.spec.layers[0].mlp.experts
        mlps = 1.0 if experts is None else experts.count * (1 - (1 - experts.active / experts.count) ** count)
        bits = {"float": 16.0, "w4": 4 + 32 / GROUP, "fp8": 8 + 32 / GROUP**2}[self.kind]
        return int(self.layer_values(mlps) * bits / 8) + self.spec.vocab_size * self.spec.hidden_size * 2

    def floor_s(self, count: int, context: int, roof: Row) -> float:
        """The least time of a decode step: weights and keys read once, and the operations where they take longer."""
        kv = sum(4 * x.attention.kv_heads * x.attention.head_dim for x in self.spec.layers) * context * count
        operations = 2 * count * self.matrix_values()
        rate = roof.get("fp8_tflop_s", roof["tflop_s"]) if self.kind == "fp8" else roof["tflop_s"]
        read = roof["read_gb_s"] * 1e9
        return max(self.linear_nbytes(count) / read, operations / rate / 1e12) + kv / read

    def matrix_values(self) -> int:
        """Numbers that each token is multiplied with."""
        experts = self.spec.layers[0].mlp.experts
        return int(self.layer_values(experts.active if experts else 1)) + self.spec.vocab_size * self.spec.hidden_size


def decode(model: Model, count: int, roof: Row) -> Row:
    context, steps = (8, 2) if model.small else (1024, 30)
    scheduler = model.streams(count, context, steps)
    if not model.small:
        model.step(scheduler)
    seconds = statistics.median(model.step(scheduler)[0] for _ in range(steps))
    floor = model.floor_s(count, context, roof)
    return {"model": model.name, "batch": count, "context": context, "step_ms": seconds * 1e3,
            "tok_s": count / seconds, "floor_ms": floor * 1e3, "share": floor / seconds}  # fmt: skip


def prefill(model: Model, tokens: int, roof: Row) -> Row:
    times = []
    for _ in range(1 if model.small else 3):
        scheduler = model.scheduler()
        scheduler.add(model.request("p", tokens, 1))
        started = time.perf_counter()
        while scheduler.has_work:
            model.step(scheduler)
        times.append(time.perf_counter() - started)
    seconds, head = min(times), model.spec.vocab_size * model.spec.hidden_size
    width = sum(x.attention.heads * x.attention.head_dim for x in model.spec.layers)
    operations = 2 * tokens * (model.matrix_values() - head) + 2 * tokens**2 * width
    rate = roof.get("fp8_tflop_s", roof["tflop_s"]) if model.kind == "fp8" else roof["tflop_s"]
    return {"model": model.name, "prompt": tokens, "ms": seconds * 1e3, "tok_s": tokens / seconds,
            "share": operations / seconds / rate / 1e12}  # fmt: skip


def throughput(model: Model, until: float) -> Row:
    """256 requests, prompts and answers of 100 to 1,024 tokens, as the public offline benchmarks do it."""
    low, high, count = (2, 5, 3) if model.small else (100, 1025, 256)
    scheduler = model.scheduler()
    for i in range(count):
        prompt, output = (int(n) for n in model.rng.integers(low, high, 2))
        scheduler.add(model.request(str(i), prompt, output, temperature=0.6))
    started, done = time.perf_counter(), 0
    while scheduler.has_work and time.monotonic() < until:
        done += model.step(scheduler)[1]
    seconds = time.perf_counter() - started
    return {"model": model.name, "requests": count, "tokens": done, "seconds": seconds, "out_tok_s": done / seconds,
            "finished": not scheduler.has_work}  # fmt: skip


def profile(model: Model, count: int) -> Row:
    """Where the time of decode steps goes: the kernels that take most of it, per step."""
    steps = 1 if model.small else 3
    scheduler = model.streams(count, 8 if model.small else 1024, 8)
    model.step(scheduler)
    gpu = model.graphs is not None
    kinds = [torch.profiler.ProfilerActivity.CUDA if gpu else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as trace:
        for _ in range(steps):
            model.step(scheduler)
    events = trace.key_averages()
    taken = {e.key: e.self_device_time_total if gpu else e.self_cpu_time_total for e in events}
    top = sorted(((us / steps, name) for name, us in taken.items()), reverse=True)[:14]
    calls = {e.key: e.count / steps for e in events}
    lines = [{"us": round(us, 1), "calls": round(calls[name], 1), "kernel": name[:90]} for us, name in top]
    return {"model": model.name, "batch": count, "busy_us": sum(taken.values()) / steps, "top": lines}


def measure(model: Model, report: Report, roof: Row, until: float) -> None:
    started = time.monotonic()
    scheduler = model.scheduler()
    scheduler.add(model.request("first", 16, 2))
    model.step(scheduler)
    report.add("start", {"model": model.name, "weights_s": model.made_s, "first_step_s": time.monotonic() - started})
    work: list[tuple[str, Callable[[], Row]]] = []
    for count in (1, 3) if model.small else (1, 8, 64, 256):
        work.append(("decode", lambda count=count: decode(model, count, roof)))  # type: ignore[misc]
    for tokens in (16,) if model.small else (128, 1024, 4096):
        work.append(("prefill", lambda tokens=tokens: prefill(model, tokens, roof)))  # type: ignore[misc]
    for count in (1,) if model.small else (1, 64):
        work.append(("profile", lambda count=count: profile(model, count)))  # type: ignore[misc]
    if model.small or model.name in ("Qwen3-0.6B", "Qwen3-8B"):
        work.append(("throughput", lambda: throughput(model, until)))
    for phase, job in work:
        if time.monotonic() > until:
            report.add("cut", {"model": model.name, "what": phase})
            return
        try:
            report.add(phase, job())
        except Exception as error:  # what was measured of the others is worth having
            report.add("failed", {"model": model.name, "what": phase, "error": repr(error)[:300]})


def models(report: Report, device: Device, dtype: torch.dtype, small: bool, roof: Row, until: float) -> None:
    table = TINY_MODELS if small else MODELS
    for left, (name, (config, kind)) in zip(range(len(table), 0, -1), table.items(), strict=True):
        begun = time.monotonic()
        if begun > until:
            report.add("cut", {"model": name, "what": "all"})
            continue
        try:
            model = Model(name, config, kind, device, dtype, small)
            measure(model, report, roof, begun + 1.6 * (until - begun) / left)
            model.executor.close()
        except Exception as error:
            report.add("failed", {"model": name, "what": "model", "error": repr(error)[:300]})
        model = None
        gc.collect()
        if device.is_gpu:
            torch.cuda.empty_cache()


def autotune(report: Report, device: Device, dtype: torch.dtype, small: bool, until: float) -> None:
    found: dict[str, Row] = {}
    shapes = [(64, 128)] if small else SHAPES
    for key, tile, row in kernels.autotune(shapes, dtype, device.device, small, until):
        found[key] = asdict(tile)
        report.add("tile", {"key": key, **asdict(tile), **row})
        report.tiles(found)


FORMATS = {
    "kernel": "  {kernel:42} rows {rows:4} {us:9.1f} us {gb_s:7.0f} GB/s {tflop_s:6.1f} TFLOP/s",
    "decode": "{model:14} decode {batch:4}: {step_ms:8.3f} ms {tok_s:8.0f} tok/s, {share:.0%} of the floor",
    "prefill": "{model:14} prefill {prompt:5}: {ms:8.1f} ms {tok_s:8.0f} tok/s, {share:.0%} of the matrix rate",
    "throughput": "{model:14} throughput: {out_tok_s:.0f} tok/s ({tokens} tokens, {seconds:.1f} s)",
    "start": "{model:14} weights {weights_s:.1f} s, first step {first_step_s:.1f} s",
}


def lines(report: Report) -> Iterator[str]:
    wrong = [row for row in report.of("correctness") if not row["ok"]]
    yield f"kernels: {len(report.of('correctness'))} cases, {len(wrong)} wrong"
    yield from (f"  WRONG {row['kernel']}: {row['error']}" for row in wrong)
    for row in report.of("roof"):
        yield "roof: " + ", ".join(f"{k} {v:.1f}" for k, v in row.items() if k not in ("phase", "at_s"))
    for phase, form in FORMATS.items():
        yield from (form.format(**row) for row in report.of(phase))
    for row in report.of("profile"):
        yield f"{row['model']:14} batch {row['batch']}: kernels {row['busy_us']:.0f} us a step"
        yield from (f"    {top['us']:8.1f} us {top['calls']:6.1f}x {top['kernel']}" for top in row["top"][:8])
    for row in report.of("time"):
        yield "time: {what:12} {seconds:6.1f} s of {limit_s} s".format(**row)
    for phase in ("failed", "cut"):
        yield from (f"{phase}: {row}" for row in report.of(phase))


def measured(report: Report, phases: list[str], device: Device, dtype: torch.dtype, small: bool) -> None:
    """The phases, each within its own limit and all within the total; how long each took goes to the report."""
    report.add("roof", roof := kernels.roofs(dtype, device.device, small))

    def listed(name: str, rows: Iterator[Row], until: float) -> None:
        for row in rows:
            report.add(name, row)
            if time.monotonic() > until:
                report.add("cut", {"what": name})
                return

    shapes = [(48, 128)] if small else SHAPES
    work: dict[str, Callable[[float], None]] = {
        "correctness": lambda end: listed("correctness", kernels.correctness(dtype, device.device, small), end),
        "kernels": lambda end: listed("kernel", kernels.micro(shapes, dtype, device.device, small), end),
        "models": lambda end: models(report, device, dtype, small, roof, end),
        "autotune": lambda end: autotune(report, device, dtype, small, end),
    }
    for name in phases:
        started = time.monotonic()
        end = min(started + LIMITS_S[name], STARTED + TOTAL_S)
        with kernels.dispatch(True) if name == "models" else nullcontext():
            work[name](end)
        report.add("time", {"what": name, "seconds": time.monotonic() - started, "limit_s": LIMITS_S[name]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for results.jsonl, tuned.json and table.txt")
    parser.add_argument("--quick", action="store_true", help="tiny shapes; runs on a CPU too")
    parser.add_argument("--phases", default="correctness,kernels,models,autotune")
    parser.add_argument("--models", default="", help="only these, by name, separated by commas")
    args = parser.parse_args()
    gpu, small = torch.cuda.is_available(), args.quick
    if not gpu and not small:
        sys.exit("no GPU here; --quick runs everything on tiny shapes on a CPU")
    device = Device(torch.device("cpu"), "CPU, Triton's interpreter", None)
    if gpu:
        capability = torch.cuda.get_device_capability()
        device = Device(torch.device("cuda", 0), torch.cuda.get_device_name(), capability)
    dtype = torch.bfloat16 if gpu else torch.float32
    for name in set(MODELS) - set(args.models.split(",")) if args.models else ():
        del MODELS[name]
    report = Report(args.out)
    versions = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    report.add("machine", {"device": device.name, **versions, "imported_s": time.monotonic() - STARTED})

    torch.manual_seed(0)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with torch.inference_mode():
            measured(report, args.phases.split(","), device, dtype, small)
    finally:
        table = "\n".join(lines(report))
        (args.out / "table.txt").write_text(table + "\n")
        print(table)
    if any(not row["ok"] for row in report.of("correctness")) or report.of("failed"):
        sys.exit(1)


if __name__ == "__main__":
    main()
