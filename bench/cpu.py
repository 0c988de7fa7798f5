#!/usr/bin/env python3
"""Pagoda against llama.cpp on one GGUF file, in turns, in one process tree; prints a table, writes JSON.

    python bench/cpu.py --llama BUILD/bin --model smollm2-q4_1.gguf --out bench/results/NAME.json

Other servers can join: --peer "NAME=COMMAND ... {port}", started the same way, serving the model under the name m.

In process, through llama-bench and through the engine's core without speculation: prefill of 512 tokens; decode of one
stream (128 tokens behind a prompt of 128), alone and while another process keeps one core busy. Over HTTP: `pagoda
bench` with 1, 16 and 32 parallel requests (prompt 128, output 128), peak memory after 32 requests of 640 tokens, and 16
requests that share a prefix of 512 tokens (32 output), against llama-server (split and unified cache), the peers and
`pagoda serve`. Both sides get --threads threads.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

MEASURES = {
    "prefill_512": "prefill, 512 tokens, tok/s",
    "decode": "decode, one stream, tok/s",
    "decode_busy": "decode beside a busy process, tok/s",
}
CORE = """
import json, sys, time
from pagoda.options.engine_config import EngineConfig
from pagoda.engine.core import EngineCore
from pagoda.types import Request, SamplingParams
import random
core = EngineCore(EngineConfig(model=sys.argv[1], threads=int(sys.argv[2]), speculation=None))
rng = random.Random(time.time_ns())
def run(prompt, out):
    ids = [rng.randrange(1000, 40000) for _ in range(prompt)]
    core.add(Request(request_id="r", prompt_token_ids=ids,
        params=SamplingParams(temperature=0, max_tokens=out, ignore_eos=True, seed=0)))
    start = time.perf_counter(); first = None
    while core.has_work:
        if core.step() and first is None: first = time.perf_counter()
    return first - start, time.perf_counter() - first
run(64, 8)
prefill = max(512 / run(512, 1)[0] for _ in range(3))
decode = max(127 / run(128, 128)[1] for _ in range(3))
print(json.dumps({"prefill_512": prefill, "decode": decode, "device": core.info.device}))
"""


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


@contextmanager
def busy_core() -> Iterator[None]:
    """One other process that computes all the time, on the last core that this one may use."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    psutil.Process(process.pid).cpu_affinity([max(os.sched_getaffinity(0))])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def llama_bench(a: argparse.Namespace) -> dict[str, Any]:
    def rate(*work: str, repeats: int = 3) -> float:
        base = [f"{a.llama}/llama-bench", "-m", a.model, "-t", str(a.threads), "-fa", "1", "-r", str(repeats)]
        done = subprocess.run([*base, "-o", "json", *work], capture_output=True, check=True)
        return float(max(json.loads(done.stdout)[0]["samples_ts"]))

    out = {"prefill_512": rate("-p", "512", "-n", "0"), "decode": rate("-p", "0", "-n", "128", "-d", "128")}
    with busy_core():
        out["decode_busy"] = rate("-p", "0", "-n", "32", "-d", "128", repeats=1)
    return out


def engine_core(a: argparse.Namespace) -> dict[str, Any]:
    def run() -> dict[str, Any]:
        done = subprocess.run([sys.executable, "-c", CORE, a.model, str(a.threads)], capture_output=True, check=True)
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    out = run()
    with busy_core():
        out["decode_busy"] = run()["decode"]
    return out


def first_token(port: int, started: float, process: subprocess.Popen[bytes]) -> float:
    body = json.dumps({"model": "m", "prompt": "Hello world", "max_tokens": 1, "temperature": 0}).encode()
    while True:
        if process.poll() is not None:
            sys.exit(f"the server ended with {process.returncode}")
        try:
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
            )
            urllib.request.urlopen(request, timeout=60).read()
            return time.perf_counter() - started
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.01)


def load(a: argparse.Namespace, requests: int, repeats: int, *more: str) -> dict[str, float]:
    """So many requests at once, and no more; the median of each number."""
    command = [sys.executable, "-m", "pagoda.cli.main", "bench", "--base-url", f"http://127.0.0.1:{a.port}", "--json"]
    command += ["-", "--model", "m", "--concurrency", str(requests), "--num-prompts", str(requests), *more]
    runs = []
    for _ in range(repeats):
        done = subprocess.run(command, capture_output=True, text=True)
        if not done.stdout:
            sys.exit(f"the load could not be made: {done.stderr}")
        runs += json.loads(done.stdout)["runs"]
    names = ("output_throughput", "p50_ttft_ms", "p99_itl_ms", "duration", "failed")
    return {name: statistics.median(run.get(name, 0.0) for run in runs) for name in names}


def resident_mib(process: subprocess.Popen[bytes]) -> int:
    """Peak resident memory of the process and its children, MiB."""
    total = 0
    for one in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)):
        status = Path(f"/proc/{one.pid}/status").read_text()
        total += int(status.split("VmHWM:")[1].split()[0]) // 1024
    return total


def serve(a: argparse.Namespace, command: list[str]) -> dict[str, Any]:
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        out: dict[str, Any] = {"first_token_s": first_token(a.port, started, process)}
        for count in (1, 16, 32):
            name, value = f"throughput_c{count}", load(a, count, a.repeats)
            out[name] = value["output_throughput"]
            out[name + "_ttft_ms"], out[name + "_itl_p99_ms"] = value["p50_ttft_ms"], value["p99_itl_ms"]
            if value["failed"]:
                out[name + "_failed"] = value["failed"]
        load(a, 32, 1, "--input-len", "512", "--num-warmups", "0")
        out["resident_mib"] = resident_mib(process)
        shared = ("--prefix-len", "512", "--input-len", "16", "--output-len", "32", "--num-warmups")
        for name, words in (
            ("prefix_distinct_s", ("--input-len", "528", "--output-len", "32")),
            ("prefix_cold_s", (*shared, "0")),
            ("prefix_warm_s", (*shared, "1")),
        ):
            out[name] = load(a, 16, 1, *words)["duration"]
        return out
    finally:
        os.killpg(process.pid, 15)
        process.wait(60)


def servers(a: argparse.Namespace) -> dict[str, list[str]]:
    llama = [
        f"{a.llama}/llama-server", "-m", a.model, "-t", str(a.threads), "--host", "127.0.0.1", "--port", str(a.port),
        "--alias", "m", "-np", "32",
    ]  # fmt: skip
    pagoda = [
        sys.executable, "-m", "pagoda.entrypoints.openai.api_server", "--model", a.model, "--port", str(a.port),
        "--served-model-name", "m", "--threads", str(a.threads),
    ]  # fmt: skip
    named = (peer.split("=", 1) for peer in a.peer)
    return {
        "llama.cpp split": [*llama, "-c", "24576"],
        "llama.cpp unified": [*llama, "--kv-unified", "-c", "20480"],
        **{name: shlex.split(command.replace("{port}", str(a.port))) for name, command in named},
        "pagoda": pagoda,
    }


def table(results: dict[str, Any]) -> str:
    names = list(results["servers"]) or ["llama.cpp", "pagoda"]
    rows = ["| measure | " + " | ".join(names) + " | pagoda to the best peer |", "|---|" + "---|" * (len(names) + 1)]
    for key, name in MEASURES.items():
        peer, ours = results["core"]["llama.cpp"][key], results["core"]["pagoda"][key]
        gap = " |" * (len(names) - 1)
        rows.append(f"| {name} | {peer:.0f}{gap} {ours:.0f} | {ours / peer:.2f} |")
    for key in ("throughput_c1", "throughput_c16", "throughput_c32", "prefix_cold_s", "first_token_s", "resident_mib"):
        values = [s[key] for s in results["servers"].values()]
        if not values:
            break
        less = key.endswith(("_s", "_mib"))
        best = min(values[:-1]) if less else max(values[:-1])
        ratio = best / values[-1] if less else values[-1] / best
        rows.append(f"| {key} | " + " | ".join(f"{v:.2f}" for v in values) + f" | {ratio:.2f} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", required=True, help="folder with llama-bench and llama-server")
    parser.add_argument("--model", required=True, help="a .gguf file")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--port", type=int, default=18300)
    parser.add_argument("--core", action="store_true", help="only what runs in process")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND", help="another server")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    rounds: dict[str, list[dict[str, Any]]] = {"llama.cpp": [], "pagoda": []}
    for _ in range(a.repeats):
        rounds["llama.cpp"].append(llama_bench(a))
        rounds["pagoda"].append(engine_core(a))
    core = {name: {k: statistics.median(r[k] for r in runs) for k in MEASURES} for name, runs in rounds.items()}
    results: dict[str, Any] = {
        "model": Path(a.model).name,
        "machine": cpu_name(),
        "device": rounds["pagoda"][0]["device"],
        "threads": a.threads,
        "commit": subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True).strip(),
        "core": core,
        "servers": {},
    }
    for name, command in () if a.core else servers(a).items():
        results["servers"][name] = serve(a, command)
        save(a, results)
    save(a, results)
    print(table(results))


def save(a: argparse.Namespace, results: dict[str, Any]) -> None:
    """After every server, so that a run that is cut off keeps what it measured."""
    if a.out:
        a.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
