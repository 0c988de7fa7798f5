#!/usr/bin/env python3
"""A mixture of experts against llama.cpp on one GGUF file, in turns; prints a table, writes JSON.

    python bench/experts.py --llama BUILD/bin --model qwen3-moe-q4_0.gguf --out bench/results/NAME.json

Prefill of 512 tokens, decode of 1, 8 and 16 streams (48 tokens behind prompts of 64): through llama-batched-bench, and
through the engine's core without speculation; all tokens are random, on both sides: equal ones would choose equal
experts. The speed of memory is measured in between (bench/roofline_probe.cpp): one stream has at most
that many tokens per second, over the bytes of the weights that a token goes through. It changes from minute to minute.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from roofline import measure_roof

from pagoda.arch.registry import bind, load_spec
from pagoda.weights.open import open_source

PROMPT, OUTPUT, STREAMS = 64, 48, (1, 8, 16)
CORE = """
import json, random, sys, time
from pagoda.options.engine_config import EngineConfig
from pagoda.engine.core import EngineCore
from pagoda.types import Request, SamplingParams
model, threads, prompt, output, streams = sys.argv[1], *map(int, sys.argv[2:5]), json.loads(sys.argv[5])
core = EngineCore(EngineConfig(model=model, threads=threads, speculation=None, max_model_len=1024))
rng = random.Random(time.time_ns())
def run(count, prompt, out):
    for i in range(count):
        ids = [rng.randrange(1000, 40000) for _ in range(prompt)]
        params = SamplingParams(temperature=8, max_tokens=out, ignore_eos=True, seed=rng.randrange(2**32))
        core.add(Request(request_id=str(i), prompt_token_ids=ids, params=params))
    seen, start, first = set(), time.perf_counter(), None
    while core.has_work:
        deltas = core.step()
        seen |= {d.request_id for d in deltas if d.token_ids}
        if first is None and len(seen) == count:
            first, done = time.perf_counter(), 0
        elif first is not None:
            done += sum(len(d.token_ids) for d in deltas)
    return first - start, done / (time.perf_counter() - first)
run(1, 64, 8)
out = {"prefill_512": max(512 / run(1, 512, 2)[0] for _ in range(2))}
for count in streams:
    out[f"decode_{count}"] = max(run(count, prompt, output)[1] for _ in range(2))
print(json.dumps({**out, "device": core.info.device}))
"""


def pagoda(a: argparse.Namespace) -> dict[str, Any]:
    numbers = [str(n) for n in (a.threads, PROMPT, OUTPUT)]
    command = [sys.executable, "-c", CORE, a.model, *numbers, json.dumps(STREAMS)]
    result: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return result


def llama(a: argparse.Namespace) -> dict[str, Any]:
    def run(*work: str) -> list[dict[str, Any]]:
        base = [f"{a.llama}/llama-batched-bench", "-m", a.model, "-t", str(a.threads), "-fa", "on", "-c", "4096"]
        done = subprocess.run([*base, "--output-format", "jsonl", *work], capture_output=True, text=True, check=True)
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    prefill = max(row["speed_pp"] for row in run("-npp", "512", "-ntg", "4", "-npl", "1"))
    rows = run("-npp", str(PROMPT), "-ntg", str(OUTPUT), "-npl", ",".join(map(str, STREAMS)))
    return {"prefill_512": prefill, **{f"decode_{row['pl']}": row["speed_tg"] for row in rows}}


def memory(a: argparse.Namespace) -> dict[str, Any]:
    return {"read_gb_s": max(measure_roof(a.threads)["read_gb_s"] for _ in range(2))}


def bytes_per_token(model: str) -> int:
    """Of the weights that one token goes through."""
    source = open_source(model)
    spec, total = load_spec(source), 0.0
    for slot, tensor in bind(spec, source).items():
        experts = spec.layers[0].mlp.experts
        share = experts.active / experts.count if experts and slot.endswith("_experts") else 1.0
        total += 0 if slot == "embed" and not spec.tied else tensor.nbytes * share
    return int(total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", help="folder with llama-batched-bench")
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    token_bytes = bytes_per_token(a.model)
    sides = {"memory": memory, **({"llama.cpp": llama} if a.llama else {}), "pagoda": pagoda}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for _ in range(a.rounds):
        for name, measure in sides.items():
            runs[name].append(measure(a))
            print(name, json.dumps(runs[name][-1]), flush=True)
    best = {
        name: {key: max(run[key] for run in found) for key in found[0] if key != "device"}
        for name, found in runs.items()
    }
    table: dict[str, Any] = {"model": Path(a.model).name, "threads": a.threads, "best": best, "runs": runs}
    table["bytes_per_token"] = token_bytes
    print(json.dumps({key: value for key, value in table.items() if key != "runs"}, indent=1))
    if a.out:
        a.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
