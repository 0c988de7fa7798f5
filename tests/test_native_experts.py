"""Mixtures of experts in the native executor: the grouped products in every type, whole models, every bit."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from checkpoints import EXPERT_CASES, VOCAB, write_checkpoint, write_gguf_experts
from reference_plans import Feed, make_plan
from test_native_kernels import FLOAT, ISAS, QUANTIZED, flat_plan, floats, stored, taken_by
from test_native_models import LIMITS, TOKENS, expected_logits, native_logits, reference_logits, relative

from pagoda.arch.dummy import dummy
from pagoda.arch.registry import bind, load_spec
from pagoda.backend.cpu import records as native
from pagoda.backend.cpu.executor import CpuExecutor, weight_bytes
from pagoda.backend.cpu.library import Native
from pagoda.backend.cpu.records import BufferShape, Dims, Op, Router
from pagoda.backend.reference import ReferenceExecutor
from pagoda.engine.core import EngineCore
from pagoda.errors import ModelError
from pagoda.options.engine_config import EngineConfig
from pagoda.types import Request, SamplingParams
from pagoda.weights.ggml import dequantize
from pagoda.weights.open import open_source
from pagoda.weights.source import Tensor

Array = npt.NDArray[Any]
CONFIG = {
    "model_type": "qwen2_moe",
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 96,
    "shared_expert_intermediate_size": 64,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
}


@dataclass
class Mixture:
    router: Array
    gate: list[Tensor]
    up: list[Tensor]
    down: list[Tensor]
    active: int
    normalized: bool = True


def mixture(
    kind: str, experts: int, active: int, size: int = 256, hidden: int = 256, normalized: bool = True
) -> Mixture:
    rng = np.random.default_rng(7)
    router = rng.standard_normal((experts, hidden)).astype(np.float32) * 0.1
    gate, up = ([stored(rng, size, hidden, kind) for _ in range(experts)] for _ in range(2))
    return Mixture(router, gate, up, [stored(rng, hidden, size, kind) for _ in range(experts)], active, normalized)


def run(isa: str, m: Mixture, x: Array, threads: int = 2) -> Array:
    """What the library adds to the rows of x."""
    lib, hidden, size = Native(threads, isa), x.shape[1], m.gate[0].shape[0]
    embed = lib.weight([(floats(x).data, *x.shape, "F32")])
    zeros = lib.weight([(floats(x * 0).data, *x.shape, "F32")])
    router = lib.weight([(floats(m.router).data, *m.router.shape, "F32")])
    up = down = -1
    for gate_part, up_part, down_part in zip(m.gate, m.up, m.down, strict=True):
        up = lib.weight([(t.data, *t.shape, t.type) for t in (gate_part, up_part)], behind=up)
        down = lib.weight([(down_part.data, *down_part.shape, down_part.type)], behind=down)
    inv_freq, count = np.ones(8), len(m.gate)
    dims = Dims(1, 1, 1, 16, len(x), 1024, 1024, 64, 16, 0, 1.0, inv_freq.ctypes.data)
    dims.router = Router(count, m.active, m.normalized, groups=1, scale=1.0)
    widths = [(hidden, 0), (hidden, 0), (count, 0), (size * m.active, 0), (hidden, 1)]
    lib.program(
        dims,
        [BufferShape(width, rows) for width, rows in widths],
        [
            Op(native.EMBED, -1, 0, embed, -1, -1, 0, 0, 0),
            Op(native.EMBED, -1, 1, zeros, -1, -1, 0, 0, 0),
            Op(native.MATMUL, 0, 2, router, -1, -1, 0, 0, 0),
            Op(native.ROUTE, 2, -1, -1, -1, -1, 0, 0, 0),
            Op(native.EXPERTS_UP, 0, 3, up, -1, -1, 0, 0, 0),
            Op(native.EXPERTS_DOWN, 3, 1, down, -1, -1, 0, 0, 0),
            Op(native.GATHER, 1, 4, -1, -1, -1, 0, native.LOGIT_ROWS, 0),
            Op(native.HIDDEN, 4, -1, -1, -1, -1, 0, native.LOGIT_ROWS, 0),
        ],
        hidden,
    )
    result = lib.run(flat_plan(len(x), list(range(len(x))), len(x)))
    lib.close()
    assert result.hidden is not None
    return result.hidden


def expected(isa: str, m: Mixture, x: Array) -> Array:
    """The same in double precision, each product on the activations that it takes."""
    taken = taken_by(isa, m.gate[0].type)
    logits = x.astype(np.float64) @ m.router.T
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    chosen = np.argsort(-shares, axis=1, kind="stable")[:, : m.active]
    total = np.take_along_axis(shares, chosen, axis=1).sum(axis=1) if m.normalized else np.ones(len(x))
    out = np.zeros(x.shape)
    for e in np.unique(chosen):
        rows = np.flatnonzero((chosen == e).any(axis=1))
        gate, up = (taken(x[rows]) @ dequantize(part[e]).T for part in (m.gate, m.up))
        inner = taken((gate / (1 + np.exp(-gate)) * up).astype(np.float32))
        out[rows] += (shares[rows, e] / total[rows])[:, None] * (inner @ dequantize(m.down[e]).T.astype(np.float64))
    return out


def rows(count: int, hidden: int = 256) -> Array:
    return np.random.default_rng(count).standard_normal((count, hidden)).astype(np.float32)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", FLOAT + QUANTIZED)
def test_experts_are_those_of_plain_arithmetic(isa: str, kind: str) -> None:
    m = mixture(kind, 6, 2)
    for count in (1, 2, 37):
        x = rows(count)
        exact = expected(isa, m, x)
        # a value that lies between two codes, or two bf16, may become either
        bound = 1e-5 if kind in ("F32", "F16") else 2e-3
        assert np.abs(run(isa, m, x) - exact).max() <= bound * np.abs(exact).max()


@pytest.mark.parametrize("shape", [(3, 1, 32, 64), (40, 8, 96, 128), (5, 5, 64, 320), (2, 1, 32, 256)])
@pytest.mark.parametrize(("kind", "normalized"), [("Q4_0", True), ("BF16", False)])
def test_other_shapes(shape: tuple[int, int, int, int], kind: str, normalized: bool) -> None:
    m = mixture(kind, *shape, normalized=normalized)
    for count in (1, 9, 1000):
        x = rows(count, shape[3])
        exact = expected(ISAS[-1], m, x)
        bound = 2e-3 if kind in FLOAT else 5e-3
        assert np.abs(run(ISAS[-1], m, x, threads=3) - exact).max() <= bound * np.abs(exact).max()


@pytest.mark.parametrize("kind", ("F16", "BF16"))
def test_sizes_that_are_no_whole_blocks_run_in_floats(kind: str) -> None:
    m = mixture(kind, 4, 2, size=44, hidden=52)
    x = rows(21, 52)
    exact = expected(ISAS[-1], m, x)
    assert np.abs(run(ISAS[-1], m, x) - exact).max() < (1e-4 if kind == "F16" else 2e-3 * np.abs(exact).max())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", ("Q4_0", "Q4_K", "Q6_K", "Q8_0", "BF16"))
def test_company_and_threads_change_no_bit(isa: str, kind: str) -> None:
    m, x = mixture(kind, 6, 3), rows(150)
    together = run(isa, m, x)
    for count in (1, 2, 3, 9, 40, 150):
        assert np.array_equal(run(isa, m, x[-count:], threads=1 + count % 4), together[-count:])


def test_of_equal_experts_those_of_lower_number_are_taken() -> None:
    m = mixture("F32", 6, 2)
    m.router[[1, 3, 5]] = m.router[1]
    x = np.sign(m.router[1])[None].repeat(3, axis=0)  # 1, 3 and 5 like it best
    assert np.abs(run(ISAS[-1], m, x) - expected(ISAS[-1], m, x)).max() < 1e-4
    m.router[:] = 0
    assert np.abs(run(ISAS[-1], m, x) - expected(ISAS[-1], m, x)).max() < 1e-4


def test_a_nan_stays_in_its_row() -> None:
    m, x = mixture("Q4_0", 6, 2), rows(12)
    clean = run(ISAS[-1], m, x)
    x[4, 7] = np.nan
    seen = run(ISAS[-1], m, x)
    others = np.arange(12) != 4
    assert np.isnan(seen[4]).any() and np.array_equal(seen[others], clean[others])


@pytest.mark.parametrize("case", EXPERT_CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    exact = expected_logits(write_checkpoint(tmp_path, case), TOKENS)
    assert relative(native_logits(tmp_path, TOKENS) - exact, exact) < 1e-3


@pytest.mark.parametrize("case", ["qwen3-experts", "qwen2-experts", "mixtral"])
@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0", "Q4_0"])
def test_gguf_logits_equal_the_reference_on_the_same_weights(case: str, kind: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, case, **({"norm_topk_prob": True} if case == "qwen3-experts" else {}))
    path = write_gguf_experts(tmp_path, kind)
    exact = reference_logits(path)
    error = relative(native_logits(path, TOKENS) - exact, exact)
    assert error < {"F32": 3e-4, "BF16": 0.1}.get(kind, 0.15)  # a rounded router input may choose another expert


@pytest.mark.parametrize("kind", ["F32", "Q4_0"])
def test_gguf_with_a_tensor_for_each_expert_is_the_same_model(kind: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "mixtral")
    exact = native_logits(write_gguf_experts(tmp_path, kind), TOKENS)
    path = write_gguf_experts(tmp_path, kind, apart=True)
    assert "blk.0.ffn_gate.1.weight" in open_source(str(path)).tensors
    np.testing.assert_array_equal(native_logits(path, TOKENS), exact)
    other = make_gguf_lack(path, "blk.1.ffn_up.3.weight")
    with pytest.raises(ModelError, match=r"lacks 1 tensors.*blk\.1\.ffn_up\.3\.weight"):
        native_logits(other, TOKENS)


def make_gguf_lack(path: Path, name: str) -> Path:
    """The same file with a tensor under another name of the same length."""
    other = path.with_name("other.gguf")
    other.write_bytes(path.read_bytes().replace(name.encode(), name.replace("ffn_up", "xxx_up").encode()))
    return other


PACKED: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False},
    "gptq-8": {"quant_method": "gptq", "bits": 8, "group_size": -1},
    "fp8": {"quant_method": "fp8", "weight_block_size": [32, 32]},
}


@pytest.mark.parametrize("kind", PACKED)
def test_packed_experts_run_in_their_own_bits(kind: str) -> None:
    source = dummy({**CONFIG, "moe_intermediate_size": 128, "vocab_size": VOCAB, "quantization_config": PACKED[kind]})
    spec = load_spec(source)
    plan = make_plan([Feed(TOKENS, blocks=range(8), rows=[(i, -1, -1) for i in range(len(TOKENS))])], VOCAB)
    exact = ReferenceExecutor.load(spec, source, LIMITS, kv_type="float16").logits(plan)
    executor = CpuExecutor.load(spec, source, LIMITS)
    logits = np.zeros_like(exact)
    executor._lib.run(plan, logits)
    floats = weight_bytes(bind(spec, dummy({**CONFIG, "moe_intermediate_size": 128, "vocab_size": VOCAB})))
    assert executor.capacity.weight_bytes < (0.7 if "gptq-8" in kind else 1.01 if kind == "fp8" else 0.5) * floats
    executor.close()
    assert relative(logits - exact, exact) < (0.02 if kind == "fp8" else 0.1)


def answers(model: Path, asked: list[list[int]], **options: Any) -> list[list[int]]:
    config = EngineConfig(model=str(model), load_format="dummy", max_model_len=128, speculation=None, **options)
    core = EngineCore(config)
    for i, prompt in enumerate(asked):
        params = SamplingParams(temperature=0.9, seed=prompt[0], max_tokens=20, ignore_eos=True)
        core.add(Request(request_id=str(i), prompt_token_ids=prompt, params=params))
    found: list[list[int]] = [[] for _ in asked]
    while core.has_work:
        for delta in core.step():
            assert delta.finish_reason != "error", delta.error
            found[int(delta.request_id)] += delta.token_ids
    core.close()
    return found


@pytest.mark.parametrize("quantization", [None, "int4"])
def test_an_answer_depends_on_nothing_but_prompt_and_seed(quantization: str | None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    prompts = [[7 + i, *range(3, 60 + i)] for i in range(12)]
    together = answers(tmp_path, prompts, quantization=quantization, threads=2)
    assert len({tuple(a) for a in together}) > 6
    alone = [answers(tmp_path, [p], quantization=quantization, threads=1)[0] for p in prompts[:3]]
    in_parts = answers(tmp_path, prompts, quantization=quantization, threads=3, max_num_batched_tokens=24)
    assert alone == together[:3] and in_parts == together


@pytest.mark.parametrize(("asked", "most"), [(None, 1e-3), ("int8", 0.3), ("int4", 1.0)])
def test_what_is_quantized_on_load_takes_what_was_said(asked: str | None, most: float, tmp_path: Path) -> None:
    exact = expected_logits(write_checkpoint(tmp_path, "qwen3-experts", torch_dtype="bfloat16"), TOKENS)
    source = open_source(str(tmp_path))
    spec = load_spec(source)
    executor = CpuExecutor.load(spec, source, replace(LIMITS, quantization=asked))
    said = weight_bytes(bind(spec, source), asked)
    assert said <= executor.capacity.weight_bytes < said + 64 * 64  # vectors are a little longer
    plan = make_plan([Feed(TOKENS, blocks=range(8), rows=[(i, -1, -1) for i in range(len(TOKENS))])], VOCAB)
    logits = np.zeros((len(TOKENS), VOCAB), np.float32)
    executor._lib.run(plan, logits)
    executor.close()
    assert relative(logits - exact, exact) < most
