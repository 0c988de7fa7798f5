#!/usr/bin/env python3
"""The pauses of a running stream while a picture comes in, with the shape of Qwen2.5-VL-3B's vision encoder.

    PYTHONPATH=src python bench/picture_pause.py --depth 8 --out bench/results/NAME.json

Random weights; the language model is as wide as that model's and has but a few layers, so that a stream's own steps are
short. `pause` is the longest time between two tokens of the stream until the first one about the picture.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
from vision import config, picture

from pagoda.engine.core import EngineCore
from pagoda.options.engine_config import EngineConfig
from pagoda.types import Image, Request, SamplingParams

PLACEHOLDER = 7


def engine(depth: int, threads: int, quantization: str | None, folder: Path) -> EngineCore:
    shape = config(depth) | {"vocab_size": 1024, "num_hidden_layers": 2, "intermediate_size": 2048}
    ids = {"image_token_id": PLACEHOLDER, "video_token_id": PLACEHOLDER + 1}
    (folder / "config.json").write_text(json.dumps(shape | ids))
    return EngineCore(
        EngineConfig(
            model=str(folder),
            load_format="dummy",
            device="cpu",
            threads=threads,
            quantization=quantization,
            max_model_len=4096,
        )
    )


def request(name: str, count: int, image: Image | None = None) -> Request:
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, seed=0)
    prompt = list(range(100, 116)) + ([] if image is None else [PLACEHOLDER] * image.tokens + [9])
    return Request(request_id=name, prompt_token_ids=prompt, params=params, images=[] if image is None else [image])


def measure(core: EngineCore, side: int) -> dict[str, float]:
    shown = picture(side)
    image = Image(start=16, tokens=shown.tokens, grid=shown.grid, pixels=shown.pixels, digest=bytes(16))
    core.add(request("stream", 4000))
    for _ in range(50):
        core.step()
    core.add(request("picture", 1, image))
    begun = last = time.perf_counter()
    gaps: list[float] = []
    done = False
    while not done:
        for delta in core.step():
            now = time.perf_counter()
            if delta.request_id == "stream":
                gaps.append(now - last)
                last = now
            elif delta.error is not None:
                raise SystemExit(delta.error)
            else:
                done = True
    core.close()
    ordered = np.sort(gaps)
    return {
        "pause_ms": round(1000 * float(ordered[-1]), 1),
        "p99_ms": round(1000 * float(np.quantile(ordered, 0.99)), 1),
        "tokens_meanwhile": len(gaps),
        "picture_s": round(time.perf_counter() - begun, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=32)
    parser.add_argument("--side", type=int, default=1024, help="pixels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quantization", default="int8", help="int8, or none: the weights as they are stored")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        quantization = None if asked.quantization == "none" else asked.quantization
        core = engine(asked.depth, asked.threads, quantization, Path(folder))
        measured = measure(core, asked.side)
    print(measured)
    if asked.out:
        about = {"depth": asked.depth, "side": asked.side, "threads": asked.threads, "quantization": quantization}
        asked.out.write_text(json.dumps(about | measured, indent=2) + "\n")


if __name__ == "__main__":
    main()
