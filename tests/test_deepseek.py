"""DeepSeek-V2 and V3, GLM-4.5 and 4.7: latent attention and grouped experts in each executor, against transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import VOCAB
from deepseek_cases import CASES, PUBLIC, make_case, write_case, write_case_gguf
from family_cases import tokens_of
from reference_plans import Feed, make_plan
from safetensors.torch import load_file, save_file
from test_gpt2 import (
    KINDS,
    KV_ERROR,
    LAST,
    LIMITS,
    TOKENS,
    check_chunks,
    check_long_context,
    expected,
    load,
    logits,
    relative,
)
from test_reference_models import generate

from pagoda.arch import memory
from pagoda.arch.dummy import open_dummy
from pagoda.arch.lora import check_adapters
from pagoda.arch.names.deepseek import deepseek_tensors
from pagoda.arch.registry import bind, load_spec
from pagoda.arch.sharding import kv_bytes_per_block, share, weight_bytes
from pagoda.backend.cpu.executor import CpuExecutor
from pagoda.backend.torch import ops
from pagoda.deploy.plan.model import model_of_config, planned_model
from pagoda.engine.core import EngineCore
from pagoda.errors import ConfigError, ModelError
from pagoda.options.engine_config import EngineConfig
from pagoda.weights.fp8 import Scaled
from pagoda.weights.ggml import dequantize
from pagoda.weights.open import open_source
from pagoda.weights.source import Tensor

Folders = dict[str, tuple[Path, Any]]
"""The native executor keeps keys and values in float16."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Each case as safetensors and as tiny.gguf, and the model it came from."""
    made = {}
    for case in CASES:
        folder = tmp_path_factory.mktemp(case)
        made[case] = (folder, write_case(folder, case))
        write_case_gguf(folder / "tiny.gguf", made[case][1])
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, kind: str, folders: Folders) -> None:
    folder, model = folders[case]
    for path in (folder, folder / "tiny.gguf"):
        executor = load(path, kind)
        assert relative(logits(executor, LAST), expected(model)) < (KV_ERROR if kind == "cpu" else 1e-4)
        executor.close()


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_files_with_both_directions_in_one_matrix(kind: str, folders: Folders, tmp_path: Path) -> None:
    lite, dense = folders["deepseek_v2-lite"][1], make_case("deepseek_v3", first_k_dense_replace=3)
    # 8 bits without experts, of which rounding may choose others
    for model, stored, most in ((lite, "F32", KV_ERROR), (dense, "Q8_0", 0.08)):
        write_case_gguf(tmp_path / "old.gguf", model, stored, old=True)
        executor = load(tmp_path / "old.gguf", kind)
        assert relative(logits(executor, LAST), expected(model)) < most
        executor.close()


@pytest.mark.parametrize("case", ["deepseek_v2-lite", "deepseek_v3", "glm4_moe"])
def test_quantized_gguf_models_run_in_their_own_bits(case: str, folders: Folders, tmp_path: Path) -> None:
    write_case_gguf(tmp_path / "tiny.gguf", folders[case][1], "Q8_0")
    exact, native = load(tmp_path / "tiny.gguf", "reference"), load(tmp_path / "tiny.gguf", "cpu")
    assert native.capacity.weight_bytes < exact.capacity.weight_bytes / 2
    assert relative(logits(native, LAST), logits(exact, LAST)) < 0.08
    native.close()


@pytest.mark.parametrize("kind", ["cpu", "torch"])
@pytest.mark.parametrize("case", CASES)
def test_a_prompt_in_chunks_and_in_company_has_the_bits_of_the_whole(case: str, kind: str, folders: Folders) -> None:
    executor = load(folders[case][0], kind, quantization="int8", kv_cache_dtype="int8" if kind == "cpu" else "auto")
    check_chunks(executor, 23)
    executor.close()


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_a_long_context_of_many_heads_in_their_real_sizes(kv_cache_dtype: str, tmp_path: Path) -> None:
    """More heads than an attention job takes; segments by one thread or shared by four; another request's numbers."""
    sizes = {
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "hidden_size": 80,
        "vocab_size": VOCAB,
    }
    model = write_case(
        tmp_path, "deepseek_v3", num_attention_heads=40, num_key_value_heads=40, num_hidden_layers=1, **sizes
    )
    check_long_context(tmp_path, model, kv_cache_dtype)


def test_the_cache_keeps_what_is_latent_alone(folders: Folders) -> None:
    folder = folders["deepseek_v3"][0]
    layers, each = 3, 32 + 16
    for kind, size in (("cpu", 2), ("reference", 4), ("torch", 4)):
        executor = load(folder, kind)
        assert executor.capacity.kv_bytes == LIMITS.num_blocks * 16 * layers * each * size
        executor.close()


@pytest.mark.parametrize("case", ["deepseek_v2-lite", "glm4_moe_lite"])
def test_greedy_text_equals_transformers(case: str, folders: Folders) -> None:
    folder, model = folders[case]
    core = EngineCore(EngineConfig(model=str(folder), device="cpu", num_blocks=32))
    wanted = tokens_of(model, TOKENS[:20], 12)
    core.close, close = (lambda: None), core.close  # type: ignore[method-assign]
    assert generate(core, TOKENS[:20], 12) == wanted
    assert generate(core, TOKENS[:20], 12) == wanted  # its prefix is in the cache now
    close()


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "float16"])
def test_through_the_triton_kernels(dtype: str, folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folders["deepseek_v3" if dtype == "float32" else "deepseek_v2-lite"][0]
    long, short = Feed(TOKENS[:35], 0, [1, 2, 3], rows=[(34, -1, -1)]), Feed([3], 0, [4], rows=[(0, -1, -1)])
    plan = make_plan([long, short], VOCAB)
    limits = {"dtype": dtype, "kv_cache_dtype": "fp8" if dtype == "float16" else "auto"}
    plain = logits(load(folder, "torch", **limits), plan)
    monkeypatch.setattr(ops, "on_gpu", lambda x: True)
    assert relative(logits(load(folder, "torch", **limits), plan), plain) < (2e-3 if dtype == "float32" else 0.1)


@pytest.mark.parametrize("case", ["deepseek_v3", "glm4_moe", pytest.param("deepseek_v2-lite", marks=pytest.mark.slow)])
def test_two_ranks_give_the_logits_of_one(case: str, folders: Folders) -> None:
    source = open_source(str(folders[case][0]))
    spec = load_spec(source)
    whole = bind(spec, source)
    parts = [share(spec, whole, rank, 2) for rank in range(2)]
    assert [own.layers[0].attention.heads for own, _ in parts] == [2, 2]
    for slot, axis in (("k_b", 0), ("v_b", 0), ("o", 1), ("down_experts", 2), ("q_b", 0)):
        if (name := "layers.1." + slot) in whole:
            halves = [dequantize(bound[name]) for _, bound in parts]
            np.testing.assert_array_equal(np.concatenate(halves, axis=axis), dequantize(whole[name]))
    stored = {slot: tensor.nbytes for slot, tensor in whole.items()}
    assert weight_bytes(spec, stored, 2) == memory.weight_bytes(parts[0][1])
    if spec.layers[0].attention.latent is not None:  # what is kept is on each of them
        assert kv_bytes_per_block(spec, 2) == kv_bytes_per_block(spec, 1) == memory.kv_bytes_per_block(spec)
    told = []
    for size in (1, 2):
        table = {"num_blocks": 32, "tensor_parallel_size": size}
        core = EngineCore(EngineConfig(model=str(folders[case][0]), device="torch-cpu", **table))
        told.append(generate(core, TOKENS[:20], 8))
    assert told[0] == told[1]


@pytest.mark.parametrize("case", CASES)
def test_random_weights_and_the_plan_of_a_config(case: str, folders: Folders, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folders[case][0] / "config.json").read_bytes())
    source = open_dummy(str(tmp_path))
    executor = CpuExecutor.load(load_spec(source), source, LIMITS)
    assert executor.launch(LAST).wait().ok.all()
    executor.close()
    stored = {slot: tensor.shape for slot, tensor in planned_model(folders[case][0]).tensors.items()}
    assert stored == {slot: tensor.shape for slot, tensor in planned_model(tmp_path).tensors.items()}


def test_both_formats_have_one_spec(folders: Folders) -> None:
    for case in CASES:
        ours, theirs = (load_spec(open_source(str(folders[case][0] / name))) for name in ("", "tiny.gguf"))
        for a, b in zip(ours.layers, theirs.layers, strict=True):
            assert a.attention.scale == pytest.approx(b.attention.scale, rel=1e-6)
            assert (a.attention.latent, a.mlp.size) == (b.attention.latent, b.mlp.size)
            if a.mlp.experts is not None and b.mlp.experts is not None:
                assert replace(a.mlp.experts, scale=b.mlp.experts.scale) == b.mlp.experts
                assert a.mlp.experts.scale == pytest.approx(b.mlp.experts.scale, rel=1e-6)


def test_blocks_that_predict_several_tokens_are_left_out(folders: Folders, tmp_path: Path) -> None:
    folder, model = folders["deepseek_v3"]
    stored = load_file(folder / "model.safetensors")
    extra = {name.replace("layers.2.", "layers.3."): t.clone() for name, t in stored.items() if "layers.2." in name}
    save_file({**stored, **extra, "model.layers.3.enorm.weight": torch.ones(64)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    executor = load(tmp_path, "reference")
    assert relative(logits(executor, LAST), expected(model)) < 1e-4


@pytest.mark.parametrize("block", [32, 48])
def test_blocks_of_fp8_need_not_end_with_the_heads(block: int) -> None:
    spec, rng = model_of_config({**PUBLIC["deepseek_v2-lite"], "kv_lora_rank": 32}, ()).spec, np.random.default_rng(0)
    rows = 16 * 256
    codes = Tensor("c", (rows, 32), "F8_E4M3", rng.integers(0, 120, rows * 32, np.uint8))
    scales = rng.uniform(0.5, 2, (-(-rows // block), 1)).astype(np.float32)
    stored = Tensor("s", scales.shape, "F32", scales.reshape(-1).view(np.uint8))
    whole = Scaled(codes, stored, (block, 32), None).tensor()
    found = deepseek_tensors(spec, {"model.layers.0.self_attn.kv_b_proj.weight": whole})
    k_b, v_b = (dequantize(found[f"model.layers.0.self_attn.{name}_b_proj.weight"]) for name in "kv")
    values = dequantize(whole).reshape(16, 256, 32)
    np.testing.assert_array_equal(k_b.transpose(0, 2, 1), values[:, :128])
    np.testing.assert_array_equal(v_b, values[:, 128:])


def test_adapters_are_refused() -> None:
    with pytest.raises(ConfigError, match="latent attention"):
        check_adapters(model_of_config(PUBLIC["deepseek_v3"], ()).spec)


def test_the_sizes_of_the_published_models_are_planned() -> None:
    for name, parameters, kv_bytes in (
        ("deepseek_v2-lite", 15.7e9, 27 * 576 * 2),
        ("deepseek_v3", 671e9, 61 * 576 * 2),
        ("glm4_moe_lite", 29.9e9, 47 * 576 * 2),
        ("glm4_moe", 106.9e9, 46 * 2 * 8 * 128 * 2),
    ):
        model = model_of_config(PUBLIC[name], ())
        assert model.parameters == pytest.approx(parameters, rel=0.01), name
        assert memory.kv_bytes_per_block(model.spec) == 16 * kv_bytes
    lite = model_of_config(PUBLIC["deepseek_v2-lite"], ()).spec.layers[0].attention
    assert lite.scale == pytest.approx(0.114721386) and (lite.heads, lite.head_dim) == (16, 576)


@pytest.mark.parametrize(
    ("case", "changes", "said"),
    [
        ("deepseek_v2", {"topk_method": "best"}, "topk_method is 'best'"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is true"),
        ("deepseek_v3", {"attention_bias": True}, "attention_bias is true"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "supported with sigmoid only"),
        ("deepseek_v3", {"n_group": 3}, "cannot come from 2 of 3 groups"),
        ("glm4_moe_lite", {"mlp_layer_types": ["dense"]}, "dense or sparse for each layer"),
    ],
)
def test_what_is_not_supported_is_named(
    case: str, changes: dict[str, Any], said: str, folders: Folders, tmp_path: Path
) -> None:
    config = json.loads((folders[case][0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ModelError, match=said):
        planned_model(tmp_path)
