#!/usr/bin/env python3
"""Make the files that the benchmarks compare on: SmolLM2 in other types, and Qwen3-0.6B's shape with random weights.

    python bench/make_models.py --smollm2 FILE.gguf --llama BUILD/bin --out FOLDER

Writes smollm2-q4_1 (the given file), -q4_0 and -q8_0 (by llama-quantize, from the given file: for speed only) and
qwen3-0.6b-q4_0 and -q8_0 (random weights, SmolLM2's vocabulary filled up with names: its text is noise). Needs gguf.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np

HIDDEN, INTER, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 1024, 3072, 28, 16, 8, 128, 151936


def smollm2(a: argparse.Namespace) -> None:
    shutil.copy(a.smollm2, a.out / "smollm2-q4_1.gguf")
    for kind in ("q4_0", "q8_0"):
        target = a.out / f"smollm2-{kind}.gguf"
        command = [f"{a.llama}/llama-quantize", "--allow-requantize", a.smollm2, str(target), kind.upper()]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def vocabulary(writer: gguf.GGUFWriter, source: str) -> None:
    fields = gguf.GGUFReader(source).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    extra = VOCAB - len(tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(fields["tokenizer.ggml.pre"].contents())
    writer.add_token_list(tokens + [f"<extra-{i}>" for i in range(extra)])
    writer.add_token_types(types + [int(gguf.TokenType.UNUSED)] * extra)
    writer.add_token_merges(fields["tokenizer.ggml.merges"].contents())
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def qwen3(a: argparse.Namespace, kind: str) -> None:
    writer = gguf.GGUFWriter(str(a.out / f"qwen3-0.6b-{kind}.gguf"), "qwen3")
    writer.add_block_count(LAYERS)
    writer.add_context_length(40960)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    vocabulary(writer, a.smollm2)
    rng = np.random.default_rng(0)
    stored = gguf.GGMLQuantizationType[kind.upper()]

    def matrix(name: str, rows: int, columns: int) -> None:
        values = rng.standard_normal((rows, columns), dtype=np.float32) * 0.02
        writer.add_tensor(name, gguf.quants.quantize(values, stored), raw_dtype=stored)

    def ones(name: str, size: int) -> None:
        writer.add_tensor(name, np.ones(size, np.float32))

    matrix("token_embd.weight", VOCAB, HIDDEN)
    ones("output_norm.weight", HIDDEN)
    for i in range(LAYERS):
        shapes: dict[str, Any] = {
            "attn_q": (HEADS * HEAD_DIM, HIDDEN), "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
            "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN), "attn_output": (HIDDEN, HEADS * HEAD_DIM),
            "ffn_gate": (INTER, HIDDEN), "ffn_up": (INTER, HIDDEN), "ffn_down": (HIDDEN, INTER),
        }  # fmt: skip
        for name, shape in shapes.items():
            matrix(f"blk.{i}.{name}.weight", *shape)
        for name, size in (("attn_norm", HIDDEN), ("ffn_norm", HIDDEN), ("attn_q_norm", 128), ("attn_k_norm", 128)):
            ones(f"blk.{i}.{name}.weight", size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", required=True, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--llama", required=True, help="folder with llama-quantize")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    smollm2(a)
    for kind in ("q4_0", "q8_0"):
        qwen3(a, kind)


if __name__ == "__main__":
    main()
