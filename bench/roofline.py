#!/usr/bin/env python3
"""How close the engine comes to what this machine can do: a roofline of GGUF models; prints a table, writes JSON, SVG.

    python bench/roofline.py --out bench/results/NAME smollm2-q4_1.gguf qwen3-0.6b-q8_0.gguf

The roof is measured here by `roofline_probe.cpp` (memory read, 8-bit products; needs a C++ compiler). For each model:
prefill of 512 tokens, decode of 1 stream and of 16 streams behind prompts of 128, without speculation. Counted are the
bytes of the weights and the products with them: neither attention nor its cache, so that a point stays below its truth.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from pagoda.engine.core import EngineCore
from pagoda.options.engine_config import EngineConfig
from pagoda.types import Request, SamplingParams
from pagoda.weights.open import open_source

HERE = Path(__file__).parent
PREFILL, PROMPT, OUTPUT, STREAMS = 512, 128, 64, 16


def measure_roof(threads: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        probe = f"{folder}/probe"
        source = str(HERE / "roofline_probe.cpp")
        subprocess.run(["c++", "-O3", "-march=native", "-pthread", source, "-o", probe], check=True)
        roof: dict[str, Any] = json.loads(subprocess.run([probe, str(threads)], capture_output=True, check=True).stdout)
        return roof


def count_weights(path: str) -> dict[str, int]:
    """Bytes of the matrices, and multiply-adds of a token: in the layers and in the output head."""
    tensors = open_source(path).tensors
    head = "output.weight" if "output.weight" in tensors else "token_embd.weight"
    layers = [t for name, t in tensors.items() if len(t.shape) == 2 and name.startswith("blk.")]
    return {
        "bytes": sum(t.nbytes for t in layers) + tensors[head].nbytes,
        "layer_macs": sum(math.prod(t.shape) for t in layers),
        "head_macs": math.prod(tensors[head].shape),
    }


def run(core: EngineCore, streams: int, prompt: int, output: int) -> float:
    """Seconds that `streams` requests of new random tokens take together."""
    rng = random.Random(time.time_ns())
    params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True, seed=0)
    for i in range(streams):
        ids = [rng.randrange(1000, 40000) for _ in range(prompt)]
        core.add(Request(request_id=str(i), prompt_token_ids=ids, params=params))
    start = time.perf_counter()
    while core.has_work:
        core.step()
    return time.perf_counter() - start


def tokens_per_s(path: str, threads: int, repeats: int) -> dict[str, float]:
    core = EngineCore(EngineConfig(model=path, threads=threads, speculation=None))
    run(core, 1, 64, 8)
    best = {"prefill": 0.0, "decode": 0.0, "decode16": 0.0}
    for _ in range(repeats):
        best["prefill"] = max(best["prefill"], PREFILL / run(core, 1, PREFILL, 1))
        for name, streams in (("decode", 1), ("decode16", STREAMS)):
            first = run(core, streams, PROMPT, 1)
            seconds = run(core, streams, PROMPT, OUTPUT + 1) - first
            best[name] = max(best[name], streams * OUTPUT / seconds)
    return best


def points(name: str, weights: dict[str, int], rates: dict[str, float], roof: dict[str, Any]) -> list[dict[str, Any]]:
    token = weights["layer_macs"] + weights["head_macs"]
    macs = {"prefill": weights["layer_macs"], "decode": token, "decode16": token}
    rows = {"prefill": PREFILL, "decode": 1, "decode16": STREAMS}
    found = []
    for kind, rate in rates.items():
        intensity = macs[kind] * rows[kind] / weights["bytes"]
        reached = macs[kind] * rate / 1e9
        limit = min(roof["int8_gmac_s"], intensity * roof["read_gb_s"])
        point = {"model": name, "kind": kind, "tokens_per_s": rate, "mac_per_byte": intensity, "gmac_s": reached}
        found.append({**point, "gb_s": reached / intensity, "limit_gmac_s": limit, "share": reached / limit})
    return found


def svg(roof: dict[str, Any], found: list[dict[str, Any]]) -> str:
    """The points under the roof, both axes logarithmic."""
    width, height, left, top, low_x, high_x, low_y, high_y = 760, 460, 60, 20, 0.5, 2000.0, 10.0, 1000.0
    colors = ("#c0392b", "#2471a3", "#1e8449", "#7d3c98", "#b9770e", "#34495e")
    names = list(dict.fromkeys(p["model"] for p in found))

    def x(value: float) -> float:
        return left + (width - left - 20) * math.log(value / low_x) / math.log(high_x / low_x)

    def y(value: float) -> float:
        return top + (height - top - 50) * (1 - math.log(value / low_y) / math.log(high_y / low_y))

    def text(at_x: float, at_y: float, words: str, more: str = "") -> str:
        return f'<text x="{at_x:.1f}" y="{at_y:.1f}" {more}>{words}</text>'

    peak, ridge = roof["int8_gmac_s"], roof["int8_gmac_s"] / roof["read_gb_s"]
    start = max(low_x, low_y / roof["read_gb_s"])
    line = [(start, start * roof["read_gb_s"]), (ridge, peak), (high_x, peak)]
    corners = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
           'font-size="12">', '<rect width="100%" height="100%" fill="white"/>',
           f'<polyline points="{corners}" fill="none" stroke="black" stroke-width="2"/>',
           text(x(ridge) + 6, y(peak) - 6, f"8-bit products: {peak:.0f} GMAC/s"),
           text(x(1.2), y(1.5 * roof["read_gb_s"]) - 14, f"memory: {roof['read_gb_s']:.0f} GB/s"),
           text(width / 2, height - 8, "multiply-adds per byte of weights", 'text-anchor="middle"'),
           text(left - 44, top + 10, "GMAC/s")]  # fmt: skip
    for tick in (1, 10, 100, 1000):
        out.append(text(x(tick), height - 30, str(tick), 'text-anchor="middle"'))
        if low_y <= tick <= high_y:
            out.append(text(left - 8, y(tick) + 4, str(tick), 'text-anchor="end"'))
    for i, name in enumerate(names):
        color = colors[i % len(colors)]
        out.append(text(width - 190, height - 150 + 16 * i, name, f'fill="{color}"'))
        for p in found:
            if p["model"] == name:
                where = f'cx="{x(p["mac_per_byte"]):.1f}" cy="{y(p["gmac_s"]):.1f}"'
                label = f"{name} {p['kind']}: {p['tokens_per_s']:.0f} tokens/s, {p['share']:.0%}"
                out.append(f'<circle {where} r="5" fill="{color}"><title>{label}</title></circle>')
    return "\n".join([*out, "</svg>\n"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--out", type=Path, required=True, help="path without suffix, for .json and .svg")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    a = parser.parse_args()
    found, roofs = [], []
    for path in a.models:
        roofs.append(measure_roof(a.threads))  # beside each model: a shared machine changes by the minute
        rates = tokens_per_s(path, a.threads, a.repeats)
        found += points(Path(path).stem, count_weights(path), rates, roofs[-1])
        for p in found[-3:]:
            print(f"{p['model']:<20} {p['kind']:<9} {p['tokens_per_s']:7.0f} tokens/s {p['gb_s']:6.1f} GB/s "
                  f"{p['gmac_s']:6.0f} of {p['limit_gmac_s']:6.0f} GMAC/s {p['share']:5.0%}")  # fmt: skip
    roof = {key: max(r[key] for r in roofs) for key in roofs[0]}
    a.out.with_suffix(".json").write_text(json.dumps({"roof": roof, "roofs": roofs, "points": found}, indent=1) + "\n")
    a.out.with_suffix(".svg").write_text(svg(roof, found))


if __name__ == "__main__":
    main()
