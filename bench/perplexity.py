#!/usr/bin/env python3
"""Perplexity of GGUF files beside that of transformers in float32 on the same weights, dequantized; prints a table.

    python bench/perplexity.py --text tests/data/english.txt --out bench/results/NAME.json FILE.gguf ...

Both score the same tokens of one text, so the ratio shows what 8-bit activations and half precision cost, whatever the
text. Needs torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from pagoda.engine.core import EngineCore
from pagoda.options.engine_config import EngineConfig
from pagoda.text.tokenizer import load_tokenizer
from pagoda.types import Request, SamplingParams


def score(path: Path, text: str) -> tuple[list[int], float, dict[str, Any]]:
    """The text's token ids, the mean log-probability that the engine gives them, and what was run."""
    core = EngineCore(EngineConfig(model=str(path), speculation=None))
    ids = load_tokenizer(str(path), core.metadata).encode(text)
    params = SamplingParams(max_tokens=0, prompt_logprobs=0, seed=0)
    core.add(Request(request_id="p", prompt_token_ids=ids, params=params))
    scored: list[float] = []
    while core.has_work:
        for delta in core.step():
            if delta.error:
                raise SystemExit(f"{path.name}: {delta.error}")
            scored += [entry.logprob for entry in delta.prompt_logprobs or [] if entry is not None]
    about = {"types": core.info.weight_types, "device": core.info.device, "tokens": len(ids)}
    core.close()
    return ids, sum(scored) / len(scored), about


def score_float32(path: Path, ids: list[int]) -> float:
    model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].double()
    chosen = torch.log_softmax(logits, -1).gather(1, torch.tensor(ids[1:])[:, None])
    return float(chosen.mean())


def measure(path: Path, text: str) -> dict[str, Any]:
    ids, ours, about = score(path, text)
    expected = score_float32(path, ids)
    return {
        "file": path.name, **about, "float32": math.exp(-expected), "pagoda": math.exp(-ours),
        "ratio": math.exp(expected - ours),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help=".gguf files")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    rows = []
    print("| file | types | transformers, float32 | Pagoda | ratio |\n|---|---|---:|---:|---:|")
    for path in a.models:
        rows.append(row := measure(path, a.text.read_text()))
        print(f"| {row['file']} | {row['types']} | {row['float32']:.3f} | {row['pagoda']:.3f} | {row['ratio']:.4f} |")
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], text=True).strip()
    if a.out:
        a.out.write_text(json.dumps({"commit": commit, "text": a.text.name, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
