"""The arithmetic of memory: bytes counted by hand, and what is said when they are too many."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pagoda.arch import memory
from pagoda.arch.registry import load_spec
from pagoda.arch.spec import Attention, Layer, Mlp, ModelSpec, Rope
from pagoda.backend.base import Limits
from pagoda.backend.reference import ReferenceExecutor
from pagoda.errors import MemoryShort
from pagoda.weights.open import open_source
from pagoda.weights.source import Tensor

MIB = 1 << 20
# 2 layers of 2 KV heads of 16: a token takes 2 * 2 * 2 * 16 values, a block of 16 tokens in 16 bits 4096 bytes
LAYER = Layer(Attention(4, 2, 16, 0.25), Mlp(128))
SPEC = ModelSpec("llama", 256, 64, 1e-6, True, 1024, Rope(16, (1.0,) * 8), (LAYER, LAYER))
LIMITS = Limits(max_model_len=512, max_num_seqs=4, max_num_batched_tokens=64, memory_share=0.5)
ONE = 512 // 16


def fit(free_bytes: int, weight_bytes: int = 0, activation_bytes: int = 0, **limits: Any) -> int:
    chosen = replace(LIMITS, **limits)
    found = memory.fit(
        SPEC, chosen, free_bytes=free_bytes, weight_bytes=weight_bytes, activation_bytes=activation_bytes
    )
    assert found.kept_states == 0
    return found.blocks


def complaint(*args: int, **limits: Any) -> str:
    with pytest.raises(MemoryShort) as caught:
        fit(*args, **limits)
    return str(caught.value)


def test_kv_bytes_per_block() -> None:
    assert memory.kv_bytes_per_block(SPEC) == 4096
    assert memory.kv_bytes_per_block(SPEC, kv_type="float32") == 8192


def test_weight_bytes_are_the_stored_ones() -> None:
    bound = {
        "a": Tensor("a", (2, 32), "Q4_0", np.zeros(36, np.uint8)),
        "b": Tensor("b", (1,), "F32", np.zeros(4, np.uint8)),
    }
    assert memory.weight_bytes(bound) == 40


def test_float32_weight_bytes() -> None:
    attention = 64 * 64 * 2 + 32 * 64 * 2
    assert memory.float32_weight_bytes(SPEC) == 4 * (256 * 64 + 64 + 2 * (2 * 64 + attention + 3 * 128 * 64))


def test_activation_bytes() -> None:
    per_token = 2 * 64 + 2 * 64 + 2 * 32 + 2 * 128
    assert memory.activation_bytes(SPEC, LIMITS) == 4 * (64 * per_token + 4 * 256 + 512 * 16)


def test_all_requests_together_are_the_most() -> None:
    assert fit(100 * MIB) == 4 * ONE


def test_the_share_and_what_is_taken_first_are_counted() -> None:
    assert fit(2 * 4096 * 50) == 50
    assert fit(2 * (4096 * 50 + 4095)) == 50
    assert fit(2 * 4096 * 50, 4096 * 8, 4096 * 2) == 40


def test_without_a_share_half_is_left_unless_one_request_needs_it() -> None:
    assert fit(4096 * 200 * 10 // 9 + 9, memory_share=None) == 100
    assert fit(4096 * 50 * 10 // 9 + 9, memory_share=None) == ONE


def test_what_was_asked_for_is_given() -> None:
    assert fit(100 * MIB, num_blocks=700) == 700
    assert fit(100 * MIB, kv_cache_bytes=41 * 4096 + 7) == 41


def test_too_long_a_context_names_the_longest_that_fits() -> None:
    text = complaint(2 * 4096 * 30, 4096 * 9, 4096)
    assert "--max-model-len 320" in text
    assert fit(2 * 4096 * 30, 4096 * 9, 4096, max_model_len=320) == 20
    assert re.search(r"needs 0\.2 MiB .*KV cache of 512 tokens.*0\.1 MiB may be used, 50% of the 0\.2 MiB", text)


def test_the_share_that_would_do_is_named() -> None:
    free = 4096 * 40
    assert "--gpu-memory-utilization 0.80" in complaint(free)
    assert fit(free, memory_share=0.8) == ONE
    assert "--gpu-memory-utilization" not in complaint(4096 * 32)


def test_a_model_that_cannot_fit_at_all() -> None:
    text = complaint(10 * MIB, 20 * MIB)
    assert "smaller model" in text and "--max-model-len" not in text
    assert "smaller model" in complaint(0, 20 * MIB)


def test_the_models_own_maximum_stands_for_auto() -> None:
    assert fit(2 * 4096 * 40, max_model_len=1024) == 40  # one whole request would need 64
    assert "smaller model" in complaint(10 * MIB, 20 * MIB, max_model_len=1024)


def test_a_cache_asked_for_that_is_too_small_or_too_large() -> None:
    assert "--max-model-len 160" in complaint(100 * MIB, num_blocks=10)
    assert "fewer than one request" in complaint(100 * MIB, kv_cache_bytes=10)
    assert "--num-gpu-blocks-override 128" in complaint(MIB, num_blocks=1000)
    assert "smaller --kv-cache-memory-bytes" in complaint(MIB, kv_cache_bytes=2 * MIB)


def test_the_reference_takes_what_was_counted(tmp_path: Any) -> None:
    checkpoints = pytest.importorskip("checkpoints")
    checkpoints.write_checkpoint(tmp_path, "qwen3-biases")
    source = open_source(str(tmp_path))
    spec = load_spec(source)
    capacity = ReferenceExecutor.load(spec, source, replace(LIMITS, max_model_len=128, num_blocks=9)).capacity
    assert capacity.weight_bytes == memory.float32_weight_bytes(spec)
    assert capacity.kv_bytes == 9 * memory.kv_bytes_per_block(spec, kv_type="float32")
