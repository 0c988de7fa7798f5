"""Gemma 4 against transformers, from both formats; what its configs say in their spellings, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import VOCAB
from family_cases import SMALL
from gemma4_cases import CASES, write_gemma4, write_gemma4_gguf
from reference_plans import Feed, make_plan
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
from test_hybrid import answers, core
from test_reference_models import generate

from pagoda.arch import memory
from pagoda.arch.dummy import open_dummy
from pagoda.arch.models import gemma4
from pagoda.arch.registry import load_spec
from pagoda.arch.sharding import parallel_sizes
from pagoda.backend.reference import ReferenceExecutor
from pagoda.backend.torch import ops
from pagoda.deploy.plan.model import planned_model
from pagoda.engine.core import EngineCore
from pagoda.errors import ModelError
from pagoda.options.engine_config import EngineConfig
from pagoda.types import BLOCK_SIZE
from pagoda.weights.device_size import tensor_bytes
from pagoda.weights.source import Tensor

E2B: dict[str, Any] = {
    "model_type": "gemma4",
    "dtype": "bfloat16",
    "eos_token_id": [1, 106],
    "vision_config": {"model_type": "gemma4_vision"},
    "text_config": {
        "model_type": "gemma4_text",
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "num_hidden_layers": 35,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 20,
        "use_double_wide_mlp": True,
        "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7,
    },
}
"""In the shape of gemma-4-E2B-it."""


Folders = dict[str, tuple[Path, Any]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Each case as safetensors and as tiny.gguf, and the model it came from."""
    made = {}
    for case in CASES:
        folder = tmp_path_factory.mktemp(case)
        made[case] = (folder, write_gemma4(folder, case))
        write_gemma4_gguf(folder / "tiny.gguf", made[case][1])
    return made


@pytest.mark.parametrize("file", ["", "tiny.gguf"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, kind: str, file: str, folders: Folders) -> None:
    folder, model = folders[case]
    executor = load(folder / file, kind)
    assert relative(logits(executor, LAST), expected(model)) < (KV_ERROR if kind == "cpu" else 1e-5)
    executor.close()


@pytest.mark.parametrize("kind", ["cpu", "torch"])
@pytest.mark.parametrize("case", CASES)
def test_a_prompt_in_chunks_and_in_company_has_the_bits_of_the_whole(case: str, kind: str, folders: Folders) -> None:
    executor = load(folders[case][0], kind, quantization="int8", kv_cache_dtype="int8" if kind == "cpu" else "auto")
    check_chunks(executor, 23)
    executor.close()


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
@pytest.mark.parametrize("case", CASES)
def test_a_long_context_on_many_threads_has_the_bits_of_one(case: str, kv_cache_dtype: str, folders: Folders) -> None:
    """Keys in segments, that two kinds of heads have in the same block; rows that go through the layers apart."""
    check_long_context(*folders[case], kv_cache_dtype)


@pytest.mark.parametrize("case", CASES)
def test_a_cached_prefix_gives_the_tokens_of_the_whole(case: str, folders: Folders) -> None:
    path, prompt = folders[case][0], TOKENS + TOKENS[::-1]
    engine, other = core(path, "cpu"), core(path, "cpu")
    answers(engine, [prompt[:-5]])
    assert answers(engine, [prompt]) == answers(other, [prompt])
    assert engine.stats().scheduler.prefix_hits_tokens == 112
    engine.close()
    other.close()


@pytest.mark.parametrize("case", CASES)
def test_random_weights_and_the_plan_of_a_config(case: str, folders: Folders, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folders[case][0] / "config.json").read_bytes())
    source = open_dummy(str(tmp_path))
    assert ReferenceExecutor.load(load_spec(source), source, LIMITS).launch(LAST).wait().ok.all()
    stored = {slot: tensor.shape for slot, tensor in planned_model(folders[case][0]).tensors.items()}
    assert stored == {slot: tensor.shape for slot, tensor in planned_model(tmp_path).tensors.items()}


@pytest.mark.slow
def test_two_ranks_give_the_tokens_of_one(folders: Folders) -> None:
    told = []
    for size in (1, 2):
        table: dict[str, Any] = {"num_blocks": 32, "tensor_parallel_size": size}
        core = EngineCore(EngineConfig(model=str(folders["dense"][0]), device="torch-cpu", **table))
        told.append(generate(core, TOKENS[:20], 8))
    assert told[0] == told[1]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_through_the_triton_kernels(case: str, folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan([Feed([3, 4, 5, 6, 7], 0, [1, 2], rows=[(4, -1, -1)])], VOCAB)
    plain = logits(load(folders[case][0], "torch"), plan)
    monkeypatch.setattr(ops, "on_gpu", lambda x: True)
    assert relative(logits(load(folders[case][0], "torch"), plan), plain) < 2e-3


def test_experts_beside_an_mlp_share_no_gpus(folders: Folders) -> None:
    assert parallel_sizes(planned_model(folders["experts"][0]).spec, 2) == [1]


@pytest.mark.parametrize("case", CASES)
def test_heads_are_said_once_or_for_each_layer(case: str, tmp_path: Path) -> None:
    write_gemma4(tmp_path, case)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "per_layer_config" in saved
    published = {**SMALL, **CASES[case], "dtype": "float32"}
    assert gemma4.from_config(published) == gemma4.from_config(saved)
    assert gemma4.from_config({"model_type": "gemma4", "text_config": published}) == gemma4.from_config(saved)


def test_the_last_layers_of_e2b_keep_nothing() -> None:
    spec = gemma4.from_config(E2B)
    sources = [layer.attention.source for layer in spec.layers]
    assert sources == [None] * 15 + ([13] * 4 + [14]) * 4
    assert [layer.mlp.size for layer in spec.layers] == [6144] * 15 + [12288] * 20
    heads = 12 * 2 * 256 + 3 * 2 * 512  # of 12 layers with a window, and of 3 that see all
    assert memory.kv_bytes_per_block(spec) == BLOCK_SIZE * 2 * heads
    assert (spec.embed_scale, spec.layer_embed, spec.eos_token_ids) == (39.25, 256, (1, 106))
    table = Tensor("per_layer_token_embd.weight", (256, 1024), "Q4_0", np.zeros(0, np.uint8))
    assert tensor_bytes("layer_embed", table, "int4", 2) == 256 * 1024 * 2  # rows of it are taken as they are
    wide, near = spec.ropes
    assert (wide.dim, near.dim) == (512, 256)
    assert wide.inv_freq[63] > 0 and not any(wide.inv_freq[64:])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_bidirectional_attention": "all"}, "'all', which is not supported"),
        ({"vocab_size_per_layer_input": 1000}, "must be that of all tokens"),
        ({"num_kv_shared_layers": 35}, "no layer in front of the last 35"),
        ({"rope_parameters": {"rope_theta": 1e6}}, "must have a table for"),
        ({"per_layer_config": {"0": {"head_dim": 512}}}, "must be the same for all layers of full_attention"),
        ({"num_key_value_heads": 3}, "cannot share 3 KV heads"),
        ({"enable_moe_block": True, "num_experts": 2, "top_k_experts": 3, "moe_intermediate_size": 32}, "3 of 2"),
    ],
)
def test_what_a_config_cannot_ask_for(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        gemma4.from_config({**E2B, "text_config": {**E2B["text_config"], **changes}})
