#!/usr/bin/env python3
"""Seconds to encode one picture with the shape of Qwen2.5-VL-3B's vision encoder: Pagoda, against transformers.

    PYTHONPATH=src python bench/vision.py --depth 8 --out bench/results/NAME.json

Random weights in bfloat16. Of the encoder's 32 layers every eighth attends to the whole picture, the others to windows.
`products` is the speed of the widest of the encoder's products alone.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from pagoda.arch.models.qwen2_5_vl import from_config
from pagoda.arch.spec import ModelSpec
from pagoda.backend.base import Limits
from pagoda.backend.cpu import records as native
from pagoda.backend.cpu.library import Native
from pagoda.backend.cpu.records import BufferShape, Dims, Op, Picture
from pagoda.backend.cpu.vision import VisionEncoder, split_tensors
from pagoda.backend.vision import WHOLE_S
from pagoda.types import Image
from pagoda.weights.source import Tensor

OUT = 2048


def config(depth: int) -> dict[str, Any]:
    """Qwen2.5-VL-3B's, with a language model that is not used."""
    return {
        "model_type": "qwen2_5_vl", "vocab_size": 16, "hidden_size": OUT, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 16, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768, "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "tie_word_embeddings": True,
        "vision_config": {
            "depth": depth, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "out_hidden_size": OUT,
            "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
            "fullatt_block_indexes": list(range(7, depth, 8)), "hidden_act": "silu",
        },
    }  # fmt: skip


def tensors(spec: ModelSpec) -> dict[str, Tensor]:
    noise = (np.random.default_rng(0).standard_normal(1 << 20, dtype=np.float32) * 0.02).view(np.uint32) >> 16
    made = {}
    for slot, shape in spec.slots().items():
        if slot.startswith("vision."):
            values = np.resize(noise.astype(np.uint16), shape)
            made[slot] = Tensor(slot, shape, "BF16", values.view(np.uint8).ravel())
    return made


def picture(side: int) -> Image:
    across = round(side / 28) * 2
    pixels = np.random.default_rng(1).integers(0, 256, (1, across * 14, across * 14, 3), dtype=np.uint8)
    return Image(start=0, tokens=across**2 // 4, grid=(1, across, across), pixels=pixels.tobytes(), digest=b"")


def pagoda(spec: ModelSpec, image: Image, threads: int, quantization: str | None) -> Callable[[], object]:
    limits = Limits(max_model_len=image.tokens, max_num_seqs=1, max_num_batched_tokens=64, quantization=quantization)
    encoder = VisionEncoder(spec, split_tensors(tensors(spec), spec.vision)[1], None, threads, limits)
    return lambda: encoder.encode(image)


def transformers(depth: int, image: Image, threads: int, dtype: str) -> Callable[[], object]:
    import torch
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as theirs

    torch.set_num_threads(threads)
    torch.set_default_dtype(getattr(torch, dtype))
    shape = theirs.Qwen2_5_VLVisionConfig(**config(depth)["vision_config"])
    shape._attn_implementation = "sdpa"
    model = theirs.Qwen2_5_VisionTransformerPretrainedModel(shape).eval()
    patches = torch.randn(image.tokens * 4, 3 * 2 * 14 * 14)

    def run() -> object:
        with torch.inference_mode():
            return model(patches, grid_thw=torch.tensor([image.grid]))

    return run


def product_speed(threads: int, kind: str) -> float:
    """GFLOP/s of gate and up of a layer, on a piece of the patches."""
    lib, k, out, rows, times = Native(threads), 1280, 6848, 512, 30
    values = np.full(out * k, 0x3C00, np.uint16).view(np.uint8)
    weight = lib.weight([(values, out, k, "BF16")], [kind])
    ops = [Op(native.PATCHES, -1, 0)]
    ops += [Op(native.MATMUL, 0, 1, weight, -1, -1) for _ in range(times)]
    freq = np.ones(8)
    dims = Dims(0, 1, 1, 16, 1, rows, 1, 0, 16, 0, 1.0, freq.ctypes.data)
    lib.program(dims, [BufferShape(k, 0), BufferShape(out, 0)], ops)
    pixels, ends = np.ones(14 * 14 * 3, np.uint8), np.array([0, rows], np.int32)
    three = ctypes.c_float * 3
    shown = Picture(None, 1, 14, 14, 14, 2, three(), three(1, 1, 1))

    def run() -> None:
        nothing, none = np.zeros(0, np.int32), np.zeros((0, 1), np.float32)
        lib.begin(shown, pixels, np.zeros((3, rows), np.int32), ends, ends, nothing, none)
        lib.go_on(WHOLE_S)

    speed = 2e-9 * rows * k * out * times / seconds(run)
    lib.close()
    return speed


def seconds(run: Callable[[], object]) -> float:
    """The best of two."""
    best = float("inf")
    for _ in range(2):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def work(spec: ModelSpec, patches: int) -> float:
    """GFLOP of products and attention."""
    v = spec.vision
    assert v is not None
    weights = sum(np.prod(s) for n, s in spec.slots().items() if n.startswith("vision.layers") and len(s) == 2)
    merger = (v.merged_size**2 + v.merged_size * OUT) / v.merge_size**2
    whole = sum(v.sees_all(i) for i in range(v.depth))
    seen = whole * patches + (v.depth - whole) * (v.window_size // v.patch_size) ** 2
    return 2e-9 * patches * float(weights + merger + v.patch_values * v.hidden_size + 2 * v.hidden_size * seen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=32)
    parser.add_argument("--side", type=int, default=1024, help="pixels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sides", default="bf16,int8,torch-bf16,torch-float32")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    spec, image = from_config(config(asked.depth)), picture(asked.side)
    patches = 4 * image.tokens
    makers: dict[str, Callable[[], Callable[[], object]]] = {
        "bf16": lambda: pagoda(spec, image, asked.threads, None),
        "int8": lambda: pagoda(spec, image, asked.threads, "int8"),
        "torch-bf16": lambda: transformers(asked.depth, image, asked.threads, "bfloat16"),
        "torch-float32": lambda: transformers(asked.depth, image, asked.threads, "float32"),
    }
    measured = {}
    for side in asked.sides.split(","):
        taken = seconds(makers[side]())
        row = {"s": round(taken, 2), "GFLOP/s": round(work(spec, patches) / taken, 1)}
        if not side.startswith("torch"):
            speed = product_speed(asked.threads, "BF16" if side == "bf16" else "Q8_0")
            row |= {"products, GFLOP/s": round(speed, 1), "share": round(row["GFLOP/s"] / speed, 2)}
        measured[side] = row
        print(side, row, flush=True)
    about = {"cpu": platform.machine(), "threads": asked.threads, "depth": asked.depth, "patches": patches}
    if asked.out:
        asked.out.write_text(json.dumps(about | {"measured": measured}, indent=2) + "\n")


if __name__ == "__main__":
    main()
