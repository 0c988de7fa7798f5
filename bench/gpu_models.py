"""Models of random weights in the engine's own loop: decode, prefill, throughput, profiles, the start."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pagoda.arch.dummy import dummy
from pagoda.engine.core import EngineCore
from pagoda.options.engine_config import EngineConfig
from pagoda.types import Delta, Request, SamplingParams

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
    "mxfp4": {"quantization_config": {"quant_method": "mxfp4"}},
}
EXPERTS = {"model_type": "qwen3_moe", "norm_topk_prob": True, "num_experts": 128, "num_experts_per_tok": 8}
LLAMA3 = {**qwen3(4096, 32, 32, 14336), "model_type": "llama", "vocab_size": 128256, "rope_theta": 5e5}
GPT_OSS = {**qwen3(2880, 24, 64, 2880), "model_type": "gpt_oss", "head_dim": 64, "vocab_size": 201088,
           "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128, "rope_theta": 150000,
           "rms_norm_eps": 1e-5}  # fmt: skip
MODELS: dict[str, tuple[dict[str, Any], Any]] = {
    "Qwen3-0.6B": (qwen3(1024, 28, 16, 3072, tie_word_embeddings=True), "float"),
    "Qwen3-8B": (qwen3(4096, 36, 32, 12288), "float"),
    "Qwen3-8B-FP8": (qwen3(4096, 36, 32, 12288), "fp8"),
    "Qwen3-32B-AWQ": (qwen3(5120, 64, 64, 25600), "w4"),
    "Qwen3-4B": (qwen3(2560, 36, 32, 9728, tie_word_embeddings=True), "float"),
    "Llama-3-8B": (LLAMA3, "float"),
    "Qwen3-30B-A3B": (qwen3(2048, 48, 32, 6144, num_key_value_heads=4, moe_intermediate_size=768, **EXPERTS), "float"),
    "gpt-oss-20b": (GPT_OSS, "mxfp4"),
}
TINY = qwen3(64, 1, 4, 64, head_dim=32, num_key_value_heads=2, vocab_size=500, tie_word_embeddings=True)
TINY_MODELS: dict[str, tuple[dict[str, Any], Any]] = {
    "tiny": (TINY, "w4"),
    "tiny-experts": ({**TINY, **EXPERTS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
                     "float"),
}  # fmt: skip
CONTEXT = 1024
STEPS = 30
STARTED_MODEL = "Qwen3-8B"
"""The one that is written to disk and started from there."""
PARALLEL = ("Qwen3-8B", "Qwen3-32B-AWQ")


class Model:
    """A random model in the engine's loop: steps are launched ahead and recorded as the server does it."""

    def __init__(self, name: str, config: Row, kind: str, folder: Path, small: bool, ranks: int = 1) -> None:
        self.name, self.kind, self.small, self.ranks = name if ranks == 1 else f"{name} x{ranks}", kind, small, ranks
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({**config, **STORED[kind]}))
        started = time.monotonic()
        self.core = EngineCore(engine_config(folder, small, ranks, load_format="dummy"))
        self.made_s = time.monotonic() - started
        self.spec = self.core.spec
        self._rng = np.random.default_rng(1)
        self._names: list[str] = []

    def add(self, prompt: int, output: int, temperature: float = 0.0) -> None:
        ids = self._rng.integers(0, self.spec.vocab_size, prompt).tolist()
        params = SamplingParams(temperature=temperature, seed=1, max_tokens=output, ignore_eos=True)
        name = f"{len(self._names)}"
        self._names.append(name)
        self.core.add(Request(request_id=name, prompt_token_ids=ids, params=params))

    def lengths(self, low: int, high: int) -> tuple[int, int]:
        prompt, output = (int(n) for n in self._rng.integers(low, high, 2))
        return prompt, output

    def step(self) -> tuple[float, list[Delta]]:
        """Seconds until the next step has landed (another one is then under way), and what came of it."""
        started = time.perf_counter()
        deltas = self.core.step()
        for delta in deltas:
            if delta.error:
                raise RuntimeError(f"a request ended with: {delta.error}")
        return time.perf_counter() - started, deltas

    def streams(self, count: int, context: int, steps: int) -> None:
        """`count` requests that have read their prompts and answer for `steps` steps more."""
        reading = -(-count * context // most_tokens(self.small))
        for _ in range(count):
            self.add(context, reading + steps + 8)
        begun: set[str] = set()
        while len(begun) < count:
            begun |= {delta.request_id for delta in self.step()[1] if delta.token_ids}

    def clear(self) -> None:
        """End what is under way, the step in flight too."""
        for name in self._names:
            self.core.cancel(name)
        while self.core.has_work:
            self.core.step()
        self.core.step()
        self._names.clear()

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
        read = roof["read_gb_s"] * 1e9 * self.ranks
        return max(self.linear_nbytes(count) / read, operations / self.rate(roof) / 1e12) + kv / read

    def matrix_values(self) -> int:
        """Numbers that each token is multiplied with."""
        experts = self.spec.layers[0].mlp.experts
        return int(self.layer_values(experts.active if experts else 1)) + self.spec.vocab_size * self.spec.hidden_size

    def rate(self, roof: Row) -> float:
        """Tera-operations per second of the matrix units, of all GPUs that share the model."""
        each: float = roof.get("fp8_tflop_s", roof["tflop_s"]) if self.kind == "fp8" else roof["tflop_s"]
        return each * self.ranks


def most_tokens(small: bool) -> int:
    return 64 if small else 8192


def engine_config(folder: Path, small: bool, ranks: int = 1, load_format: str = "auto") -> EngineConfig:
    gpu = torch.cuda.is_available()
    return EngineConfig(
        model=str(folder),
        device="cuda" if gpu else "torch-cpu",
        load_format=load_format,
        max_model_len=256 if small else 18432,
        max_num_seqs=4 if small else 256,
        max_num_batched_tokens=most_tokens(small),
        num_blocks=64 if small else None,
        prefix_caching=False,
        speculation=None,
        step_time_target_s=0,
        tensor_parallel_size=ranks,
    )


def decode(model: Model, count: int, roof: Row) -> Row:
    context, steps = (8, 2) if model.small else (CONTEXT, STEPS)
    model.streams(count, context, steps)
    if not model.small:
        model.step()
    taken = [model.step() for _ in range(steps)]
    full = [seconds for seconds, deltas in taken if sum(len(d.token_ids) for d in deltas) == count]
    if not full:
        raise RuntimeError(f"no step of {count} tokens: the cache does not hold so many requests")
    seconds = statistics.median(full)
    floor = model.floor_s(count, context, roof)
    return {"model": model.name, "batch": count, "context": context, "step_ms": seconds * 1e3, "steps": len(full),
            "tok_s": count / seconds, "floor_ms": floor * 1e3, "share": floor / seconds}  # fmt: skip


def prefill(model: Model, tokens: int, roof: Row) -> Row:
    times = []
    for _ in range(1 if model.small else 3):
        model.add(tokens, 1)
        started = time.perf_counter()
        while model.core.has_work:
            model.step()
        times.append(time.perf_counter() - started)
    seconds, head = min(times), model.spec.vocab_size * model.spec.hidden_size
    width = sum(x.attention.heads * x.attention.head_dim for x in model.spec.layers)
    operations = 2 * tokens * (model.matrix_values() - head) + 2 * tokens**2 * width
    return {"model": model.name, "prompt": tokens, "ms": seconds * 1e3, "tok_s": tokens / seconds,
            "share": operations / seconds / model.rate(roof) / 1e12}  # fmt: skip


def throughput(model: Model, until: float) -> Row:
    """256 requests, prompts and answers of 100 to 1,024 tokens, as the public offline benchmarks do it."""
    low, high, count = (2, 5, 3) if model.small else (100, 1025, 256)
    for _ in range(count):
        model.add(*model.lengths(low, high), temperature=0.6)
    started, done = time.perf_counter(), 0
    while model.core.has_work and time.monotonic() < until:
        done += sum(len(delta.token_ids) for delta in model.step()[1])
    seconds = time.perf_counter() - started
    return {"model": model.name, "requests": count, "tokens": done, "seconds": seconds, "out_tok_s": done / seconds,
            "finished": not model.core.has_work}  # fmt: skip


def profile(model: Model, count: int) -> Row:
    """Where the time of decode steps goes: the kernels that take most of it, per step."""
    steps = 1 if model.small else 3
    model.streams(count, 8 if model.small else CONTEXT, 8)
    model.step()
    gpu = torch.cuda.is_available()
    kinds = [torch.profiler.ProfilerActivity.CUDA if gpu else torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as trace:
        for _ in range(steps):
            model.step()
    events = trace.key_averages()
    taken = {e.key: e.self_device_time_total if gpu else e.self_cpu_time_total for e in events}
    top = sorted(((us / steps, name) for name, us in taken.items()), reverse=True)[:14]
    calls = {e.key: e.count / steps for e in events}
    lines = [{"us": round(us, 1), "calls": round(calls[name], 1), "kernel": name[:90]} for us, name in top]
    return {"model": model.name, "batch": count, "busy_us": sum(taken.values()) / steps, "top": lines}


def first(model: Model) -> Row:
    started = time.monotonic()
    model.add(16, 2)
    while not model.step()[1]:
        pass
    prompts_by = getattr(model.core._executor, "prompts_by", "")
    return {"model": model.name, "weights_s": model.made_s, "first_step_s": time.monotonic() - started,
            "prompts_by": prompts_by}  # fmt: skip


def measures(name: str, small: bool, roof: Row, until: float) -> Iterator[tuple[str, str, Callable[[Model], Row]]]:
    """What is measured of a model: a name, the phase of its line, and how."""
    yield "first", "first", first
    for count in (1, 3) if small else (1, 8, 64, 256):
        yield f"decode {count}", "decode", lambda model, count=count: decode(model, count, roof)  # type: ignore[misc]
    for tokens in (16,) if small else (128, 1024, 4096):
        yield f"prefill {tokens}", "prefill", lambda model, n=tokens: prefill(model, n, roof)  # type: ignore[misc]
    for count in (1,) if small else (1, 64):
        yield f"profile {count}", "profile", lambda model, count=count: profile(model, count)  # type: ignore[misc]
    if small or name in ("Qwen3-0.6B", "Qwen3-8B"):
        yield "throughput", "throughput", lambda model: throughput(model, until)


def write_checkpoint(config: Row, folder: Path) -> int:
    """A checkpoint of random weights on the disk; how many bytes it has."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors, table, end = list(dummy(config).tensors.values()), dict[str, Row](), 0
    for t in tensors:
        table[t.name] = {"dtype": t.type, "shape": t.shape, "data_offsets": (end, end + t.nbytes)}
        end += t.nbytes
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    if shutil.disk_usage(folder).free < end + (1 << 30):
        raise OSError(f"{end >> 30} GiB of weights do not fit the disk of {folder}")
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.flush()

        def write(tensor: Any) -> None:
            data, at = memoryview(tensor.data), 8 + len(header) + table[tensor.name]["data_offsets"][0]
            while data:
                done = os.pwrite(file.fileno(), data, at)
                data, at = data[done:], at + done

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(write, tensors))
    return end


def forget(path: Path) -> None:
    """Put a file out of the memory of the system: the next reader goes to the disk, where the system lets it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def start(folder: Path, small: bool, limit_s: float) -> Iterator[Row]:
    """Seconds from the start of a process to its first token: of a model not read lately, and of one read just now."""
    name, (config, _) = (
        ("tiny-experts", TINY_MODELS["tiny-experts"]) if small else (STARTED_MODEL, MODELS[STARTED_MODEL])
    )
    until = time.monotonic() + limit_s
    try:
        nbytes = write_checkpoint(config, folder)
        written_s = limit_s - (until - time.monotonic())
        forget(folder / "model.safetensors")
        for cache in ("cold", "warm"):
            begun = time.monotonic()
            command = [sys.executable, __file__, str(folder), *["--quick"] * small]
            done = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, until - begun))
            if done.returncode:
                raise RuntimeError(done.stderr[-300:])
            at = json.loads(done.stdout.splitlines()[-1])
            yield {"model": name, "cache": cache, "gb": nbytes / 1e9, "written_s": written_s,
                   "imported_s": at["imported"] - begun, "loaded_s": at["loaded"] - begun,
                   "first_token_s": at["token"] - begun}  # fmt: skip
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def answer_once(folder: Path, small: bool) -> None:
    """What `start` runs: load, one token, and when each was there (a clock that all processes share)."""
    at = {"imported": time.monotonic()}
    core = EngineCore(engine_config(folder, small))
    at["loaded"] = time.monotonic()
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    core.add(Request(request_id="first", prompt_token_ids=list(range(16)), params=params))
    while not any(delta.token_ids for delta in core.step()):
        pass
    at["token"] = time.monotonic()
    core.close()
    print(json.dumps(at), flush=True)


if __name__ == "__main__":
    answer_once(Path(sys.argv[1]), "--quick" in sys.argv)
