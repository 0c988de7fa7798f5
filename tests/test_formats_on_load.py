"""Float weights made 8 or 4 bits while they are loaded: the rounding, the memory, the quality, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from checkpoints import make_model, write_gguf_checkpoint
from gguf_quants import encode
from reference_plans import Feed, make_plan
from safetensors.numpy import save_file
from test_native_kernels import ISAS, floats, head_of, products, quantized_rows

from pagoda.arch.names.bind import checkpoint_name
from pagoda.arch.registry import bind, load_spec
from pagoda.backend.base import Limits
from pagoda.backend.cpu.executor import CpuExecutor, weight_bytes
from pagoda.errors import ConfigError
from pagoda.text.tokenizer import load_tokenizer
from pagoda.weights.ggml import dequantize
from pagoda.weights.open import open_source
from pagoda.weights.quantization import check_quantization
from pagoda.weights.source import Tensor

Floats = npt.NDArray[np.float32]
ENGLISH = (Path(__file__).parent / "data" / "english.txt").read_text()


def loaded(values: Floats, kind: str, becomes: str) -> Floats:
    """The rows of a matrix [n, 256] of a float type once it has become Q8_0 or Q4_1."""
    w = Tensor("w", values.shape, kind, encode(values, kind))
    return head_of(ISAS[0], w, [floats(np.eye(256, dtype=np.float32))], embedded_becomes=becomes)


@pytest.mark.parametrize("kind", ("F32", "F16", "BF16"))
def test_eight_bits_are_half_a_step_away_at_most(kind: str) -> None:
    values = (np.random.default_rng(1).standard_normal((37, 256)) * 0.05).astype(np.float32)
    values[3, 64:96] = 0
    exact = dequantize(Tensor("w", values.shape, kind, encode(values, kind)))
    step = np.abs(exact.reshape(-1, 32)).max(axis=1, keepdims=True) / 127
    error = np.abs(loaded(values, kind, "Q8_0") - exact).reshape(-1, 32)
    assert (error <= step * 0.57).all()  # half a step, and what rounding the scale to f16 adds at the ends


@pytest.mark.parametrize("becomes", ("Q4_1", "Q5_1"))
@pytest.mark.parametrize("kind", ("F32", "F16", "BF16"))
def test_a_line_through_the_codes_is_better_than_the_span_of_a_block(kind: str, becomes: str) -> None:
    values = (np.random.default_rng(2).standard_normal((64, 256)) * 0.05).astype(np.float32)
    values[5, 32:64] = -0.25
    exact = dequantize(Tensor("w", values.shape, kind, encode(values, kind)))
    plain = dequantize(Tensor("w", values.shape, becomes, encode(exact, becomes)))
    seen = loaded(values, kind, becomes)
    assert ((seen - exact) ** 2).mean() < (0.92 if becomes == "Q4_1" else 0.95) * ((plain - exact) ** 2).mean()
    blocks = ((seen - exact) ** 2).reshape(-1, 32).sum(axis=1), ((plain - exact) ** 2).reshape(-1, 32).sum(axis=1)
    assert (blocks[0] <= blocks[1] * 1.001 + 1e-9).all()
    assert np.array_equal(seen[5, 32:64], exact[5, 32:64])


def test_products_use_what_was_rounded() -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((5, 256)).astype(np.float32)
    values = (rng.standard_normal((52, 256)) * 0.1).astype(np.float32)
    for becomes in ("Q8_0", "Q5_1", "Q4_1"):
        expected = quantized_rows(x) @ loaded(values, "F32", becomes).T
        seen = products(ISAS[-1], x, [floats(values)], becomes=becomes)
        assert np.abs(seen - expected).max() < 1e-5 * np.abs(expected).max()


def test_extreme_weights_neither_wrap_nor_vanish() -> None:
    values = np.zeros((8, 256), np.float32)
    values[0, :32] = np.linspace(-1e-6, 1e-6, 32)  # scales below the normal range of f16
    values[1, :32] = 6e4
    values[2, 0] = 2.0**-24
    for becomes in ("Q8_0", "Q5_1", "Q4_1"):
        seen = loaded(values, "F16" if becomes == "Q8_0" else "F32", becomes)
        assert np.isfinite(seen).all()
        assert np.abs(seen[0] - values[0]).max() <= 1e-6
        assert np.abs(seen[1] - values[1]).max() <= 6e4 * 2**-8
    values[4, 40] = np.nan
    values[5, 40] = np.inf
    for kind in ("F32", "F16", "BF16"):
        seen = loaded(values, kind, "Q8_0")
        assert np.isnan(seen[4:6, 32:64]).all() and np.isfinite(seen[6:]).all()


def shuffled_smollm2(path: str, folder: Path) -> None:
    """SmolLM2 as an F16 checkpoint whose channels are in another order, which changes nothing but the blocks.

    As stored in 4 bits its values would fall on the grid of their own blocks again, and cost nothing.
    """
    source = open_source(path)
    spec = load_spec(source)
    rng = np.random.default_rng(0)
    hidden, mlp = rng.permutation(spec.hidden_size), rng.permutation(spec.layers[0].mlp.size)
    attention = spec.layers[0].attention
    stored = {}
    for slot, tensor in bind(spec, source).items():
        value, part = dequantize(tensor), slot.rpartition(".")[2]
        if part in ("q", "k"):  # GGUF keeps the rotated pairs of a head side by side
            heads = attention.heads if part == "q" else attention.kv_heads
            value = value.reshape(heads, -1, 2, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
        if part in ("gate", "up"):
            value = value[mlp]
        if part == "down":
            value = value[:, mlp]
        if part in ("o", "down"):
            value = value[hidden]
        elif part != "o":
            value = value[..., hidden]
        stored[checkpoint_name(slot, gguf=False)] = np.ascontiguousarray(value, np.float16)
    save_file(stored, folder / "model.safetensors")
    config = {
        "model_type": "llama", "vocab_size": spec.vocab_size, "hidden_size": spec.hidden_size,
        "intermediate_size": spec.layers[0].mlp.size, "num_hidden_layers": len(spec.layers),
        "num_attention_heads": attention.heads, "num_key_value_heads": attention.kv_heads,
        "rms_norm_eps": spec.norm_eps, "rope_theta": float(source.metadata["llama.rope.freq_base"]),
        "max_position_embeddings": spec.max_position, "tie_word_embeddings": spec.tied,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def perplexity(path: str, ids: list[int], quantization: str | None) -> tuple[float, int]:
    """Of the ids, and the bytes of the weights."""
    source = open_source(path)
    spec = load_spec(source)
    limits = Limits(1024, 1, len(ids), num_blocks=64, quantization=quantization)
    executor = CpuExecutor.load(spec, source, limits)
    rows = [(i, target, 0) for i, target in enumerate(ids[1:])]
    scored = executor.launch(make_plan([Feed(tokens=ids, blocks=range(64), rows=rows)], spec.vocab_size)).wait()
    executor.close()
    assert scored.ok.all()
    return math.exp(-float(scored.logprobs.mean())), executor.capacity.weight_bytes


@pytest.mark.slow
def test_perplexity_of_a_real_model(smollm2_path: str, tmp_path: Path) -> None:
    source = open_source(smollm2_path)
    ids = load_tokenizer(smollm2_path, source.metadata).encode(ENGLISH)[:1000]
    shuffled_smollm2(smollm2_path, tmp_path)
    same, stored = perplexity(smollm2_path, ids, None)
    plain, whole = perplexity(str(tmp_path), ids, None)
    eight, eight_bytes = perplexity(str(tmp_path), ids, "int8")
    four, four_bytes = perplexity(str(tmp_path), ids, "int4")
    print(f"perplexity: F16 {plain:.3f} (stored {same:.3f}), int8 {eight / plain:.4f}, int4 {four / plain:.4f} of it")
    print(f"weights: F16 {whole}, int8 {eight_bytes}, int4 {four_bytes}, stored {stored} bytes")
    assert abs(same / plain - 1) < 0.01
    assert abs(eight / plain - 1) < 0.01
    assert abs(four / plain - 1) < 0.16  # of a model this small; seen: 0.12
    assert eight_bytes < whole * 0.54 and four_bytes < eight_bytes * 0.78


def test_memory_is_planned_with_the_size_that_it_takes(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf_checkpoint(path, make_model("qwen2"), "F16")
    source = open_source(str(path))
    spec = load_spec(source)
    sizes = []
    for quantization in (None, "int8", "int4"):
        limits = Limits(256, 4, 128, num_blocks=32, quantization=quantization)
        executor = CpuExecutor.load(spec, source, limits)
        planned = weight_bytes(bind(spec, source), quantization)
        # vectors are padded by up to one vector of 8 floats
        assert planned <= executor.capacity.weight_bytes <= planned + 32 * 8 * len(spec.layers)
        sizes.append(planned)
        executor.close()
    assert sizes[0] > 1.7 * sizes[1] > 2 * sizes[2]


def test_what_is_quantized_already_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf_checkpoint(path, make_model("llama"), "Q4_0")
    source = open_source(str(path))
    for asked, words in (("int8", "Q4_0 already"), ("awq", "are gguf"), ("int3", "not known")):
        with pytest.raises(ConfigError, match=words):
            check_quantization(source, asked)
    check_quantization(source, "gguf")
    check_quantization(source, None)
