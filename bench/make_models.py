#!/usr/bin/env python3
"""Make the files that the benchmarks compare on: SmolLM2 in other types, Qwen3's shapes with random weights.

    python bench/make_models.py --smollm2 FILE.gguf --llama BUILD/bin --out FOLDER

Writes smollm2-q4_1 (the given file), -q4_0 and -q8_0 (by llama-quantize, from the given file: for speed only) and
qwen3-0.6b-q4_0 and -q8_0 (random weights, SmolLM2's vocabulary filled up with names: its text is noise), and
qwen3-moe-q4_0 and -q4_k: 6 of the 48 layers of Qwen3-30B-A3B and a third of its vocabulary; qwen3.5-0.8b-q4_0 and -q8_0
and qwen3.5-4b-q4_0 (8 of its 32 layers), with delta nets, and SmolLM2's vocabulary too. Needs gguf.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

HIDDEN, INTER, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 1024, 3072, 28, 16, 8, 128, 151936


MOE_HIDDEN, MOE_LAYERS, MOE_HEADS, MOE_KV_HEADS, EXPERTS, ACTIVE, MOE_SIZE = 2048, 6, 32, 4, 128, 8, 768


@dataclass(frozen=True)
class Hybrid:
    hidden: int
    inter: int
    layers: int
    heads: int
    kv_heads: int
    value_heads: int


HYBRIDS = {"qwen3.5-0.8b": Hybrid(1024, 3584, 24, 8, 2, 16), "qwen3.5-4b": Hybrid(2560, 9216, 8, 16, 4, 32)}


def smollm2(a: argparse.Namespace) -> None:
    shutil.copy(a.smollm2, a.out / "smollm2-q4_1.gguf")
    for kind in ("q4_0", "q8_0"):
        target = a.out / f"smollm2-{kind}.gguf"
        command = [f"{a.llama}/llama-quantize", "--allow-requantize", a.smollm2, str(target), kind.upper()]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def vocabulary(writer: gguf.GGUFWriter, source: str, size: int) -> None:
    fields = gguf.GGUFReader(source).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    extra = size - len(tokens)
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
    vocabulary(writer, a.smollm2, VOCAB)
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


def moe(a: argparse.Namespace, kind: str) -> None:
    """Random codes, of which matrices are cut at random places: nothing has to be quantized."""
    writer = gguf.GGUFWriter(str(a.out / f"qwen3-moe-{kind}.gguf"), "qwen3moe")
    writer.add_block_count(MOE_LAYERS)
    writer.add_context_length(40960)
    writer.add_embedding_length(MOE_HIDDEN)
    writer.add_feed_forward_length(6144)
    writer.add_head_count(MOE_HEADS)
    writer.add_head_count_kv(MOE_KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(ACTIVE)
    writer.add_expert_feed_forward_length(MOE_SIZE)
    vocab = len(gguf.GGUFReader(a.smollm2).fields["tokenizer.ggml.tokens"].contents())
    vocabulary(writer, a.smollm2, vocab)
    rng = np.random.default_rng(0)
    stored = gguf.GGMLQuantizationType[kind.upper()]
    values, block_bytes = gguf.GGML_QUANT_SIZES[stored]
    blocks = rng.integers(0, 256, (EXPERTS * MOE_SIZE * MOE_HIDDEN // values + 65536, block_bytes), np.uint8)
    scales = [0.004] if kind == "q4_0" else [0.00014, 0.001]  # of the codes, and of the minima
    signs = rng.choice([-1.0, 1.0], (len(blocks), 1))  # or all tokens would look, and choose, more and more alike
    blocks[:, : 2 * len(scales)] = (signs * scales).astype(np.float16).view(np.uint8)

    def matrix(name: str, *shape: int) -> None:
        count, first = int(np.prod(shape)) // values, int(rng.integers(65536))
        rows = blocks[first : first + count].reshape(*shape[:-1], -1)
        writer.add_tensor(name, rows, raw_dtype=stored)

    def ones(name: str, size: int) -> None:
        writer.add_tensor(name, np.ones(size, np.float32))

    matrix("token_embd.weight", vocab, MOE_HIDDEN)
    matrix("output.weight", vocab, MOE_HIDDEN)
    ones("output_norm.weight", MOE_HIDDEN)
    for i in range(MOE_LAYERS):
        p, wide, narrow = f"blk.{i}.", MOE_HEADS * HEAD_DIM, MOE_KV_HEADS * HEAD_DIM
        router = rng.standard_normal((EXPERTS, MOE_HIDDEN), np.float32) * MOE_HIDDEN**-0.5
        writer.add_tensor(f"{p}ffn_gate_inp.weight", router)
        shapes: dict[str, Any] = {
            "attn_q": (wide, MOE_HIDDEN), "attn_k": (narrow, MOE_HIDDEN), "attn_v": (narrow, MOE_HIDDEN),
            "attn_output": (MOE_HIDDEN, wide), "ffn_gate_exps": (EXPERTS, MOE_SIZE, MOE_HIDDEN),
            "ffn_up_exps": (EXPERTS, MOE_SIZE, MOE_HIDDEN), "ffn_down_exps": (EXPERTS, MOE_HIDDEN, MOE_SIZE),
        }  # fmt: skip
        for name, shape in shapes.items():
            matrix(f"{p}{name}.weight", *shape)
        for name, size in (
            ("attn_norm", MOE_HIDDEN),
            ("ffn_norm", MOE_HIDDEN),
            ("attn_q_norm", 128),
            ("attn_k_norm", 128),
        ):
            ones(f"{p}{name}.weight", size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Random:
    """Random codes, of which matrices are cut at random places: nothing has to be quantized."""

    def __init__(self, writer: gguf.GGUFWriter, kind: str, size: int) -> None:
        self._writer, self._stored = writer, gguf.GGMLQuantizationType[kind.upper()]
        self._rng = np.random.default_rng(0)
        self._values, block_bytes = gguf.GGML_QUANT_SIZES[self._stored]
        self._blocks = self._rng.integers(0, 256, (size // self._values + 65536, block_bytes), np.uint8)
        scale = {"q4_0": 0.004, "q8_0": 0.0003}[kind]
        signs = self._rng.choice([-scale, scale], (len(self._blocks), 1))
        self._blocks[:, :2] = signs.astype(np.float16).view(np.uint8)

    def matrix(self, name: str, *shape: int) -> None:
        count, first = int(np.prod(shape)) // self._values, int(self._rng.integers(65536))
        rows = self._blocks[first : first + count].reshape(*shape[:-1], -1)
        self._writer.add_tensor(name, rows, raw_dtype=self._stored)

    def normal(self, name: str, *shape: int, around: float = 0.0, scale: float = 1.0) -> None:
        values = self._rng.standard_normal(shape, np.float32) * scale + around
        self._writer.add_tensor(name, values.astype(np.float32))


def hybrid(a: argparse.Namespace, name: str, kind: str) -> None:
    s = HYBRIDS[name]
    writer = gguf.GGUFWriter(str(a.out / f"{name}-{kind}.gguf"), "qwen35")
    numbers = {
        "block_count": s.layers, "context_length": 40960, "embedding_length": s.hidden, "feed_forward_length": s.inter,
        "attention.head_count": s.heads, "attention.head_count_kv": s.kv_heads, "attention.key_length": 256,
        "attention.value_length": 256, "rope.dimension_count": 64, "full_attention_interval": 4, "ssm.conv_kernel": 4,
        "ssm.state_size": 128, "ssm.group_count": 16, "ssm.time_step_rank": s.value_heads,
        "ssm.inner_size": s.value_heads * 128,
    }  # fmt: skip
    for field, number in numbers.items():
        writer.add_uint32(f"qwen35.{field}", number)
    writer.add_array("qwen35.rope.dimension_sections", [11, 11, 10, 0])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e7)
    vocab = len(gguf.GGUFReader(a.smollm2).fields["tokenizer.ggml.tokens"].contents())
    vocabulary(writer, a.smollm2, vocab)
    tensors = Random(writer, kind, max(vocab, s.inter) * s.hidden)
    tensors.matrix("token_embd.weight", vocab, s.hidden)
    tensors.normal("output_norm.weight", s.hidden, around=1.0, scale=0.02)
    for i in range(s.layers):
        _hybrid_layer(tensors, s, f"blk.{i}.", attends=i % 4 == 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _hybrid_layer(tensors: Random, s: Hybrid, p: str, *, attends: bool) -> None:
    wide, keys, values = s.heads * 256, 16 * 128, s.value_heads * 128
    shapes = {"ffn_gate": (s.inter, s.hidden), "ffn_up": (s.inter, s.hidden), "ffn_down": (s.hidden, s.inter)}
    norms = {"attn_norm": s.hidden, "post_attention_norm": s.hidden}
    if attends:
        shapes |= {"attn_q": (2 * wide, s.hidden), "attn_k": (s.kv_heads * 256, s.hidden)}
        shapes |= {"attn_v": (s.kv_heads * 256, s.hidden), "attn_output": (s.hidden, wide)}
        norms |= {"attn_q_norm": 256, "attn_k_norm": 256}
    else:
        shapes |= {"attn_qkv": (2 * keys + values, s.hidden), "attn_gate": (values, s.hidden)}
        shapes |= {"ssm_beta": (s.value_heads, s.hidden), "ssm_alpha": (s.value_heads, s.hidden)}
        shapes |= {"ssm_out": (s.hidden, values)}
        norms |= {"ssm_norm": 128}
        tensors.normal(f"{p}ssm_conv1d.weight", 2 * keys + values, 4, scale=0.5)
        tensors.normal(f"{p}ssm_dt.bias", s.value_heads)
        tensors.normal(f"{p}ssm_a", s.value_heads, around=-0.5, scale=0.1)
    for name, shape in shapes.items():
        tensors.matrix(f"{p}{name}.weight", *shape)
    for name, size in norms.items():
        tensors.normal(f"{p}{name}.weight", size, around=1.0, scale=0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", required=True, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--llama", required=True, help="folder with llama-quantize")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=("all", "experts", "hybrids"), default="all", help="qwen3-moe, or qwen3.5")
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    if a.only == "all":
        smollm2(a)
        for kind in ("q4_0", "q8_0"):
            qwen3(a, kind)
    if a.only != "hybrids":
        for kind in ("q4_0", "q4_k"):
            moe(a, kind)
    if a.only != "experts":
        for name, kind in (("qwen3.5-0.8b", "q4_0"), ("qwen3.5-0.8b", "q8_0"), ("qwen3.5-4b", "q4_0")):
            hybrid(a, name, kind)


if __name__ == "__main__":
    main()
