"""`--load-format dummy`: random weights of a config's shapes run in every backend, alike each time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vl_tiny

from pagoda.arch.dummy import dummy, open_dummy, open_model
from pagoda.arch.registry import bind, load_spec
from pagoda.engine.core import EngineCore
from pagoda.engine.llm import LLM
from pagoda.errors import ModelError
from pagoda.options.engine_config import EngineConfig
from pagoda.types import Request, SamplingParams
from pagoda.weights.ggml import dequantize

QWEN3 = {
    "model_type": "qwen3", "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 512, "vocab_size": 700, "rope_theta": 1e6,
    "rms_norm_eps": 1e-6, "max_position_embeddings": 512, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
BERT = {
    "model_type": "bert", "architectures": ["BertModel"], "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 300,
    "num_attention_heads": 2, "intermediate_size": 128, "max_position_embeddings": 64, "type_vocab_size": 2,
    "layer_norm_eps": 1e-12, "hidden_act": "gelu", "pad_token_id": 0, "torch_dtype": "float32",
}  # fmt: skip


def quantized(**table: Any) -> dict[str, Any]:
    return {**QWEN3, "quantization_config": table}


FORMATS: dict[str, dict[str, Any]] = {
    "floats": QWEN3,
    "awq": quantized(quant_method="awq", bits=4, group_size=128, version="gemm"),
    "gptq": quantized(quant_method="gptq", bits=4, group_size=64, desc_act=True),
    "gptq-8": quantized(quant_method="gptq", bits=8, group_size=-1),
    "fp8": quantized(quant_method="fp8", weight_block_size=[128, 128]),
    "fp8-whole": quantized(quant_method="fp8"),
    "experts": {
        **QWEN3, "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
        "norm_topk_prob": True,
    },
    "experts-shared": {
        **QWEN3, "model_type": "qwen2_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 256,
    },
}  # fmt: skip


def folder(path: Path, config: dict[str, Any]) -> str:
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def tokens(model: str, device: str, count: int = 5) -> list[int]:
    core = EngineCore(EngineConfig(model=model, load_format="dummy", device=device, max_model_len=64))
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    core.add(Request(request_id="a", prompt_token_ids=[1, 2, 3, 40, 50], params=params))
    found: list[int] = []
    while core.has_work:
        for delta in core.step():
            assert delta.finish_reason != "error", delta.error
            found += delta.token_ids
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_pytorch_says_what_the_reference_says(tmp_path: Path, name: str) -> None:
    pytest.importorskip("torch")
    model = folder(tmp_path, FORMATS[name])
    wanted = tokens(model, "reference", 2)
    assert len(set(tokens(model, "torch-cpu"))) > 1
    assert tokens(model, "torch-cpu", 2) == wanted


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_the_native_backend_after_a_restart(tmp_path: Path, name: str) -> None:
    model = folder(tmp_path, FORMATS[name])
    assert tokens(model, "cpu") == tokens(model, "cpu")


@pytest.mark.parametrize("config", [*FORMATS.values(), BERT], ids=[*FORMATS, "bert"])
def test_the_same_weights_each_time_and_no_two_rows_alike(config: dict[str, Any]) -> None:
    first, second = dummy(config), dummy(config)
    bound = bind(load_spec(first), first)
    again = bind(load_spec(second), second)
    for slot, tensor in bound.items():
        values = dequantize(tensor)
        assert np.isfinite(values).all() and np.array_equal(values, dequantize(again[slot])), slot
        if slot.endswith(".down") or slot == "embed":
            assert 0.3 < float(values.std()) * values.shape[-1] ** 0.5 < 2 and abs(float(values.mean())) < 0.1, slot
            assert len(np.unique(values, axis=0)) == len(values), slot
    gate, up = (bound.get(f"layers.0.{part}") for part in ("gate", "up"))
    assert gate is None or up is None or not np.array_equal(dequantize(gate), dequantize(up))


def test_text_from_a_folder_of_one_file(tmp_path: Path) -> None:
    model = LLM(folder(tmp_path, QWEN3), load_format="dummy", device="cpu", max_model_len=64)
    (answer,) = model.generate(["héllo"], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    assert answer.prompt_token_ids is not None and len(answer.prompt_token_ids) == len("héllo".encode())
    assert len(answer.outputs[0].token_ids) == 4
    assert model.get_tokenizer().decode(answer.prompt_token_ids) == "héllo"


def test_an_encoder(tmp_path: Path) -> None:
    core = EngineCore(EngineConfig(model=folder(tmp_path, BERT), load_format="dummy", device="cpu"))
    for name, ids in {"one": [1, 2, 3], "other": [9, 8, 7]}.items():
        core.add(Request(request_id=name, prompt_token_ids=ids, params=SamplingParams(max_tokens=1)))
    found = {}
    while core.has_work:
        found |= {delta.request_id: delta.pooled for delta in core.step() if delta.pooled}
    one, other = (np.frombuffer(found[name], np.float32) for name in ("one", "other"))
    assert len(one) == 64 and np.isfinite(one).all() and not np.array_equal(one, other)


@pytest.mark.parametrize(
    ("content", "says"), [(None, "cannot read"), ("{", "not a JSON object"), ("[1]", "not a JSON")]
)
def test_a_folder_without_a_config_is_refused(tmp_path: Path, content: str | None, says: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=says):
        open_dummy(str(tmp_path))


def test_other_formats_read_the_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no model"):
        open_model(folder(tmp_path, QWEN3), "auto")


@pytest.mark.parametrize("kind", vl_tiny.KINDS)
def test_models_that_see(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(vl_tiny.config(kind)))
    source = open_dummy(str(tmp_path))
    bound = bind(load_spec(source), source)
    assert bound["vision.patch"].shape == (64, 3 * 2 * 14 * 14)
    assert np.abs(dequantize(bound["vision.layers.1.qkv"])).max() > 0.01
