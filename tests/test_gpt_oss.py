"""gpt-oss: its own layouts in both formats, MXFP4 experts and sinks in each executor, against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import httpx
import numpy as np
import numpy.typing as npt
import pytest
import torch
from checkpoints import VOCAB, make_model
from gguf_writer import write_gguf
from reference_plans import Feed, make_plan
from safetensors.torch import load_file, save_file
from server_process import running, serve
from test_gpt2 import KINDS, LIMITS, TOKENS, check_chunks, load, logits, relative
from test_reference_models import generate
from text_models import trained_json

from pagoda.arch.dummy import open_dummy
from pagoda.arch.registry import bind, load_spec
from pagoda.arch.sharding import check_size, share
from pagoda.backend.cpu.executor import CpuExecutor
from pagoda.backend.reference import ReferenceExecutor
from pagoda.backend.torch import ops
from pagoda.deploy.check.check import check_model
from pagoda.deploy.plan.model import model_of_config
from pagoda.engine.core import EngineCore
from pagoda.errors import ModelError
from pagoda.options.engine_config import EngineConfig
from pagoda.text.chat import load_chat_template
from pagoda.text.generation import load_generation_defaults
from pagoda.text.tokenizer import load_tokenizer
from pagoda.types import Float32
from pagoda.weights.ggml import dequantize, nbytes
from pagoda.weights.open import open_source

PLAN = make_plan([Feed(TOKENS, 0, [0, 1, 2, 3], rows=[(i, -1, -1) for i in range(len(TOKENS))])], VOCAB)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def tiny(**changes: Any) -> Any:
    """With sinks and gates that are large enough to matter."""
    model = make_model("gpt-oss", **changes)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith((".sinks", ".gate_up_proj", ".gate_up_proj_bias")):
                weight *= 10 if name.endswith(".sinks") else 5
            elif name.endswith(".down_proj"):
                weight *= 0.3
    return model


def expected(model: Any) -> Float32:
    with torch.no_grad():
        return np.asarray(model(torch.tensor([TOKENS])).logits[0].float().numpy(), np.float32)


def to_mxfp4(values: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Blocks [..., in / 32, 16] and scales [..., in / 32] of gpt-oss's files: values 2i and 2i + 1 in byte i."""
    groups = values.reshape(*values.shape[:-1], -1, 32)
    exponent = np.floor(np.log2(np.abs(groups).max(axis=-1))) - 2
    codes = np.abs(groups[..., None] / np.exp2(exponent)[..., None, None] - E2M1).argmin(axis=-1).astype(np.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponent + 127).astype(np.uint8)


def from_mxfp4(blocks: npt.NDArray[np.uint8], scales: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    codes = np.stack((blocks & 15, blocks >> 4), axis=-1).reshape(*scales.shape, 32)
    values = E2M1[codes] * np.exp2(scales.astype(np.float32) - 127)[..., None]
    return np.asarray(values.reshape(*scales.shape[:-1], -1), np.float32)


def write_mxfp4(folder: Path, **changes: Any) -> Any:
    """The files of openai/gpt-oss: experts as blocks and scales; the model with just those values."""
    model = tiny(**changes)
    packed: dict[str, Any] = {}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("gate_up_proj", "down_proj")):
                blocks, scales = map(np.ascontiguousarray, to_mxfp4(weight.transpose(1, 2).numpy()))
                weight.copy_(torch.from_numpy(from_mxfp4(blocks, scales)).transpose(1, 2))
                packed |= {f"{name}_blocks": torch.from_numpy(blocks), f"{name}_scales": torch.from_numpy(scales)}
    model.save_pretrained(folder)
    kept = {n: t for n, t in load_file(folder / "model.safetensors").items() if f"{n}_blocks" not in packed}
    save_file({**kept, **packed}, folder / "model.safetensors")
    change_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return model


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def write_gguf_model(path: Path, model: Any, kind: str, words: dict[str, Any] | None = None) -> None:
    """As the converter does: gate and up apart, experts turned to [out, in], in `kind`."""
    config = model.config
    numbers = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "expert_feed_forward_length": config.intermediate_size,
        "expert_count": config.num_local_experts,
        "expert_used_count": config.num_experts_per_tok,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.sliding_window": config.sliding_window,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(config.rope_parameters["factor"]),
        "rope.scaling.original_context_length": config.rope_parameters["original_max_position_embeddings"],
        "rope.scaling.yarn_beta_fast": float(config.rope_parameters["beta_fast"]),
        "rope.scaling.yarn_beta_slow": float(config.rope_parameters["beta_slow"]),
    }
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT_OSS, config.num_hidden_layers)
    tensors: dict[str, Any] = {}
    for name, weight in model.state_dict().items():
        layer = name.split(".")[2] if ".layers." in name else ""
        if ".experts." in name:
            end = "bias" if name.endswith("_bias") else "weight"
            values = (weight if end == "bias" else weight.transpose(1, 2)).numpy()
            parts = {"gate": values[:, 0::2], "up": values[:, 1::2]} if "gate_up" in name else {"down": values}
            for part, own in parts.items():
                own = np.ascontiguousarray(own)
                tensors[f"blk.{layer}.ffn_{part}_exps.{end}"] = own if end == "bias" else (own, kind)
        else:
            stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
            stored = f"{stored}.weight" if name.endswith("sinks") else stored
            tensors[stored] = weight.numpy()
    assert "blk.0.attn_sinks.weight" in tensors and "blk.0.post_attention_norm.weight" in tensors
    ends = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    table = {"general.architecture": "gpt-oss", **{f"gpt-oss.{name}": value for name, value in numbers.items()}}
    table |= ends if words is None else words
    write_gguf(path, table, tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_in_floats_equal_transformers(kind: str, tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    executor = load(tmp_path, kind)
    assert relative(logits(executor, PLAN), expected(model)) < (3e-3 if kind == "cpu" else 1e-4)  # its cache is float16
    executor.close()


@pytest.mark.parametrize("kind", KINDS)
def test_mxfp4_experts_have_the_values_of_their_blocks(kind: str, tmp_path: Path) -> None:
    model = write_mxfp4(tmp_path)
    executor = load(tmp_path, kind)
    bound = 0.06 if kind == "cpu" else 1e-4  # there activations of experts have 8 bits
    assert relative(logits(executor, PLAN), expected(model)) < bound
    executor.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored", ["F32", "MXFP4"])
def test_gguf_models_equal_transformers(kind: str, stored: str, tmp_path: Path) -> None:
    model = write_mxfp4(tmp_path)  # whose values MXFP4 keeps as they are
    write_gguf_model(tmp_path / "tiny.gguf", model, stored)
    executor = load(tmp_path / "tiny.gguf", kind)
    bound = 1e-4 if kind != "cpu" else 3e-3 if stored == "F32" else 0.06
    assert relative(logits(executor, PLAN), expected(model)) < bound
    executor.close()


def test_both_formats_keep_the_same_bits(tmp_path: Path) -> None:
    write_gguf_model(tmp_path / "tiny.gguf", write_mxfp4(tmp_path), "MXFP4")
    plain, turned = (open_source(str(path)) for path in (tmp_path, tmp_path / "tiny.gguf"))
    ours, theirs = (bind(load_spec(source), source) for source in (plain, turned))
    assert {slot for slot, t in ours.items() if t.type == "MXFP4"} == {s for s in ours if s.endswith("_experts")}
    for slot, tensor in ours.items():
        if tensor.type == "MXFP4":
            # two codes are zero, of which a converter may take either
            np.testing.assert_array_equal(dequantize(tensor), dequantize(theirs[slot]))
    assert load_spec(plain).layers == load_spec(turned).layers
    assert np.allclose(load_spec(plain).rope.inv_freq, load_spec(turned).rope.inv_freq, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_a_prompt_in_chunks_and_in_company_has_the_bits_of_the_whole(
    kind: str, kv_cache_dtype: str, tmp_path: Path
) -> None:
    if kind == "torch" and kv_cache_dtype == "int8":
        pytest.skip("a cache of 8 bits is FP8 there")
    write_mxfp4(tmp_path)
    executor = load(tmp_path, kind, kv_cache_dtype=kv_cache_dtype)
    check_chunks(executor, 7)
    executor.close()


def test_a_long_context_split_over_threads_has_the_bits_of_one(tmp_path: Path) -> None:
    """Segments of the whole attention are joined before a sink takes its share."""
    write_mxfp4(tmp_path, max_position_embeddings=2048)
    tokens = np.random.default_rng(3).integers(3, VOCAB, 1300).tolist()
    found = []
    for threads, chunk in ((1, 1300), (4, 400)):
        limits = {"max_model_len": 1400, "num_blocks": 90, "max_num_batched_tokens": 1300, "threads": threads}
        executor = load(tmp_path, "cpu", **limits)
        for start in range(0, len(tokens), chunk):
            part = tokens[start : start + chunk]
            logits(executor, make_plan([Feed(part, start, range(90), rows=[(len(part) - 1, -1, -1)])], VOCAB))
        last = make_plan([Feed([7], len(tokens), range(90), rows=[(0, -1, -1)])], VOCAB)  # its keys in segments
        found.append(logits(executor, last)[0])
        executor.close()
    assert np.array_equal(*found)


@pytest.mark.parametrize("device", ["cpu", "reference", "torch-cpu"])
def test_greedy_text_equals_transformers(device: str, tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    tokens = TOKENS[:20]
    with torch.no_grad():
        while len(tokens) < 50:
            tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    wanted = tokens[20 : tokens.index(2, 20)] if 2 in tokens[20:] else tokens[20:]
    core = EngineCore(EngineConfig(model=str(tmp_path), device=device, num_blocks=32))
    assert generate(core, TOKENS[:20], 30)[: len(wanted)] == wanted


@pytest.mark.parametrize(("asked", "most"), [("int8", 0.35), ("int4", 0.9)])
@pytest.mark.parametrize("kind", ["cpu", "torch"])
def test_floats_quantized_on_load_stay_near(kind: str, asked: str, most: float, tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    executor = load(tmp_path, kind, quantization=asked)
    assert 1e-4 < relative(logits(executor, PLAN), expected(model)) < most
    executor.close()


def test_the_ranks_of_a_group_add_up_to_the_whole(tmp_path: Path) -> None:
    write_mxfp4(tmp_path)
    source = open_source(str(tmp_path))
    spec = load_spec(source)
    whole = bind(spec, source)
    check_size(spec, whole, 2)
    parts = [share(spec, whole, rank, 2) for rank in range(2)]
    assert [own.layers[0].attention.heads for own, _ in parts] == [2, 2]
    name = "layers.1."
    for slot, axis in (("sinks", 0), ("gate_experts", 1), ("up_experts_bias", 1), ("down_experts", 2)):
        halves = [dequantize(bound[name + slot]) for _, bound in parts]
        np.testing.assert_array_equal(np.concatenate(halves, axis=axis), dequantize(whole[name + slot]))
    assert name + "down_experts_bias" in parts[0][1] and name + "down_experts_bias" not in parts[1][1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"swiglu_limit": 5.0}, "swiglu_limit is 5.0; gpt-oss is supported with 7.0 only"),
        ({"layer_types": ["full_attention"]}, "layer_types is"),
        ({"num_experts_per_tok": 9}, "9 of 8 experts"),
        ({"hidden_act": "gelu"}, "'gelu'"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(ModelError, match=said):
        load_spec(open_source(str(tmp_path)))


def test_damaged_experts_are_named(tmp_path: Path) -> None:
    write_mxfp4(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj_scales"
    save_file({**stored, name: stored[name][:, :-1].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="no MXFP4 experts"):
        open_source(str(tmp_path))
    save_file({n: t for n, t in stored.items() if n != name}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=f"lacks the tensor {name}"):
        open_source(str(tmp_path))


PUBLIC: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]},
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "vocab_size": 201088,
}


def test_the_sizes_of_the_published_models_are_planned() -> None:
    small = model_of_config(PUBLIC, ())
    assert 20.9e9 < small.parameters < 21.0e9
    stored = sum(nbytes(tensor.type, tensor.shape) for tensor in small.tensors.values())
    assert 12.8 < stored / 2**30 < 12.85
    assert small.spec.max_position == 131072 and [a.attention.window for a in small.spec.layers[:2]] == [128, None]
    large = model_of_config(
        {**PUBLIC, "num_local_experts": 128, "num_hidden_layers": 36, "layer_types": PUBLIC["layer_types"][:2] * 18},
        (),
    )
    assert 116.7e9 < large.parameters < 116.9e9


def test_random_weights_of_a_config_run_in_the_bits_it_names(tmp_path: Path) -> None:
    write_mxfp4(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    source = open_dummy(str(tmp_path))
    spec = load_spec(source)
    exact = ReferenceExecutor.load(spec, source, LIMITS, kv_type="float16")
    executor = CpuExecutor.load(spec, source, LIMITS)
    assert executor.capacity.weight_bytes < exact.capacity.weight_bytes / 2
    assert relative(logits(executor, PLAN), logits(exact, PLAN)) < 0.05
    executor.close()


TEMPLATE = """{%- macro message(role, text) %}<|start|>{{ role }}<|message|>{{ text }}<|end|>{% endmacro %}
{{- message("system", "Reasoning: " + (reasoning_effort or "medium")) }}
{%- if tools %}<|start|>developer<|message|>namespace functions {
{%- for tool in tools %}type {{ tool.function.name }} = {{ tool.function.parameters | tojson }};{% endfor -%}
}<|end|>{% endif %}
{%- for m in messages %}
{%- if m.tool_calls %}<|start|>assistant to=functions.{{ m.tool_calls[0].function.name -}}
<|channel|>commentary json<|message|>{{ m.tool_calls[0].function.arguments | tojson }}<|call|>
{%- elif m.role == "tool" %}<|start|>functions.x to=assistant<|channel|>commentary<|message|>{{ m.content }}<|end|>
{%- elif m.role == "assistant" %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>
{%- else %}{{ message(m.role, m.content) }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|start|>assistant{% endif %}
{#- <|start|>assistant<|channel|>analysis<|message|> #}"""
MARKS = ("<|return|>", "<|call|>", "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>")
TOOL = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
}


def vocabulary() -> dict[str, Any]:
    """The tokenizer of a GGUF file, with the marks of the format as its last tokens."""
    table = json.loads(trained_json())["model"]
    tokens = [token for token, _ in sorted(table["vocab"].items(), key=lambda item: item[1])]
    kinds = [1] * len(tokens) + [3] * len(MARKS)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in table["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-4o",
        "tokenizer.ggml.tokens": [*tokens, *MARKS],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": len(tokens),
        "tokenizer.chat_template": TEMPLATE,
    }


def test_a_gguf_file_is_served_with_its_channels_by_itself(tmp_path: Path) -> None:
    words = vocabulary()
    size = len(words["tokenizer.ggml.tokens"])
    write_gguf_model(tmp_path / "oss.gguf", tiny(vocab_size=size), "MXFP4", words)
    first = size - len(MARKS)
    assert load_generation_defaults("", words).eos_token_ids == (first, first + 1)
    assert not [finding for finding in check_model(str(tmp_path / "oss.gguf"), {}) if finding.level == "problem"]
    body: dict[str, Any] = {
        "model": "oss",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 60,
        "tools": [TOOL],
        "temperature": 0,
        "reasoning_effort": "high",
        "tool_choice": {"type": "function", "function": {"name": "look"}},
    }
    command = serve(
        str(tmp_path / "oss.gguf"), "--served-model-name", "oss", "--device", "cpu", "--max-model-len", "256"
    )
    with running(*command) as url, httpx.Client(base_url=url, timeout=120) as client:
        answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    template = load_chat_template("", words)
    assert template is not None
    tokens = {
        effort: len(
            template.encode(
                load_tokenizer("", words), body["messages"], tools=[TOOL], template_kwargs={"reasoning_effort": effort}
            )
        )
        for effort in ("high", "medium")
    }
    assert answer.json()["usage"]["prompt_tokens"] == tokens["high"] != tokens["medium"]
    choice = answer.json()["choices"][0]
    assert [(call["function"]["name"], call["function"]["arguments"]) for call in choice["message"]["tool_calls"]] == [
        ("look", "{}")
    ]
    assert choice["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "float16"])
def test_mxfp4_experts_through_the_kernels(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mxfp4(tmp_path)
    plan = make_plan([Feed(TOKENS[:20], 0, [0, 1], rows=[(19, -1, -1)])], VOCAB)
    plain = logits(load(tmp_path, "torch", dtype=dtype), plan)
    monkeypatch.setattr(ops, "on_gpu", lambda x: True)
    fused = logits(load(tmp_path, "torch", dtype=dtype), plan)
    assert relative(fused, plain) < (1e-4 if dtype == "float32" else 0.02)
