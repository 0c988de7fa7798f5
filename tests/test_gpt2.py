"""GPT-2: its own names and layouts in both formats, each executor, and a server, against transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import httpx
import numpy as np
import pytest
import torch
from checkpoints import VOCAB, make_model, write_checkpoint
from gguf_writer import write_gguf
from reference_plans import Feed, make_plan
from safetensors.torch import load_file, save_file
from server_process import running, serve
from test_reference_models import generate
from text_models import trained_json
from transformers import GPT2TokenizerFast

from pagoda.arch.dummy import open_dummy
from pagoda.arch.registry import bind, load_spec
from pagoda.backend.base import Limits
from pagoda.backend.cpu.executor import CpuExecutor
from pagoda.backend.reference import ReferenceExecutor
from pagoda.backend.torch.executor import TorchCpuExecutor
from pagoda.backend.torch.upload import upload
from pagoda.deploy.check.check import check_model
from pagoda.engine.core import EngineCore
from pagoda.errors import ConfigError, ModelError
from pagoda.options.engine_config import EngineConfig
from pagoda.text.chat import load_chat_template
from pagoda.text.tokenizer import load_tokenizer
from pagoda.types import Float32, StepPlan
from pagoda.weights.ggml import dequantize
from pagoda.weights.open import open_source

LIMITS = Limits(max_model_len=256, max_num_seqs=4, max_num_batched_tokens=128, num_blocks=32)
KV_ERROR = 5e-3
TOKENS: list[int] = np.random.default_rng(0).integers(3, VOCAB, 60).tolist()
LAST = make_plan([Feed(TOKENS, 0, [0, 1, 2, 3], rows=[(len(TOKENS) - 1, -1, -1)])], VOCAB)
KINDS = {"cpu": CpuExecutor, "reference": ReferenceExecutor, "torch": TorchCpuExecutor}


def load(path: Path, kind: str, **limits: Any) -> Any:
    source = open_source(str(path))
    return KINDS[kind].load(load_spec(source), source, replace(LIMITS, **limits))


def logits(executor: Any, plan: StepPlan) -> Float32:
    if isinstance(executor, ReferenceExecutor):
        return executor.logits(plan)
    if isinstance(executor, CpuExecutor):
        out = np.zeros((len(plan.rows), VOCAB), np.float32)
        executor._lib.run(plan, out)
        return out
    with torch.inference_mode():
        batch, _ = upload(plan, torch.device("cpu"), executor.capacity.num_blocks)
        found: Float32 = executor.decoder.logits(executor.hidden(batch)).float().numpy()
        return found


def check_chunks(executor: Any, size: int) -> None:
    """TOKENS in chunks of that size, each beside another prompt, end in the bits of the whole."""
    whole = logits(executor, LAST)[0]
    for start in range(0, len(TOKENS), size):
        part = TOKENS[start : start + size]
        here = Feed(part, start, [4, 5, 6, 7], rows=[(len(part) - 1, -1, -1)])
        other = Feed(TOKENS[start : start + 1] * 9, 0, [8], rows=[(8, -1, -1)])
        both = logits(executor, make_plan([other, here], VOCAB, slots=[2, 0]))
    assert np.array_equal(both[1], whole)


def check_long_context(folder: Path, model: Any, kv_cache_dtype: str) -> None:
    """Behind 549 tokens, by one thread in one go or by four in chunks: the same bits, near those of transformers."""
    tokens = np.random.default_rng(3).integers(3, VOCAB, 549).tolist()
    with torch.no_grad():
        wanted = model(torch.tensor([[*tokens, 7]])).logits[0, -1:].numpy()
    found = []
    for threads, chunk in ((1, 549), (4, 200)):
        limits = {"max_model_len": 600, "num_blocks": 40, "max_num_batched_tokens": 600, "threads": threads}
        executor = load(folder, "cpu", kv_cache_dtype=kv_cache_dtype, **limits)
        for start in range(0, len(tokens), chunk):
            part = tokens[start : start + chunk]
            logits(executor, make_plan([Feed(part, start, range(39), rows=[(len(part) - 1, -1, -1)])], VOCAB))
        found.append(logits(executor, make_plan([Feed([7], len(tokens), range(39), rows=[(0, -1, -1)])], VOCAB)))
        executor.close()
    assert np.array_equal(*found)
    assert relative(found[0], wanted) < (KV_ERROR if kv_cache_dtype == "auto" else 0.05)


def expected(model: Any) -> Float32:
    """What transformers says after TOKENS, [1, VOCAB]."""
    with torch.no_grad():
        return np.asarray(model(torch.tensor([TOKENS])).logits[0, -1:].numpy(), np.float32)


def relative(values: Float32, exact: Float32) -> float:
    return float(np.sqrt(((values - exact) ** 2).mean() / (exact**2).mean()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_prompt_in_chunks_and_in_company_has_the_bits_of_the_whole(
    kind: str, quantization: str | None, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, "gpt2")
    executor = load(tmp_path, kind, quantization=quantization)
    check_chunks(executor, 7)
    executor.close()


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_matrices_quantized_on_load_stay_near(quantization: str, tmp_path: Path) -> None:
    model = make_model("gpt2")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "wte" not in name:
                weight *= 0.5
    model.save_pretrained(tmp_path)
    executor = load(tmp_path, "cpu", quantization=quantization)
    assert 1e-4 < relative(logits(executor, LAST), expected(model)) < (0.02 if quantization == "int8" else 0.2)
    executor.close()


@pytest.mark.parametrize("device", ["cpu", "reference", "torch-cpu"])
def test_greedy_text_equals_transformers_up_to_the_last_position(device: str, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, "gpt2", max_position_embeddings=32)
    tokens = TOKENS[:20]
    with torch.no_grad():
        while len(tokens) < 32:
            tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    assert 2 not in tokens[20:]
    core = EngineCore(EngineConfig(model=str(tmp_path), device=device, num_blocks=32))
    assert generate(core, TOKENS[:20], 100) == tokens[20:]


def test_a_context_beyond_the_table_of_positions_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "gpt2", max_position_embeddings=32)
    with pytest.raises(ConfigError, match="32"):
        EngineCore(EngineConfig(model=str(tmp_path), max_model_len=33, device="cpu"))


def write_gguf_gpt2(path: Path, model: Any, kind: str) -> None:
    """As converters do: matrices turned to [out, in], q, k and v as one."""
    config = model.config
    numbers = {
        "block_count": config.n_layer,
        "context_length": config.n_positions,
        "embedding_length": config.n_embd,
        "feed_forward_length": 4 * config.n_embd,
        "attention.head_count": config.n_head,
        "attention.layer_norm_epsilon": config.layer_norm_epsilon,
    }
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    tensors: dict[str, Any] = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        weight = weight.t().contiguous() if ".c_" in name and weight.ndim == 2 else weight
        tensors[stored] = (weight.numpy(), kind if ".c_" in name else "F32") if weight.ndim == 2 else weight.numpy()
    ends = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    table = {"general.architecture": "gpt2", **{f"gpt2.{name}": value for name, value in numbers.items()}, **ends}
    write_gguf(path, table, tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_models_equal_transformers(kind: str, tmp_path: Path) -> None:
    model = make_model("gpt2")
    write_gguf_gpt2(tmp_path / "tiny.gguf", model, "F32")
    executor = load(tmp_path / "tiny.gguf", kind)
    assert relative(logits(executor, LAST), expected(model)) < 1e-3
    executor.close()


def test_quantized_gguf_models_are_cut_between_rows(tmp_path: Path) -> None:
    write_gguf_gpt2(tmp_path / "tiny.gguf", make_model("gpt2"), "Q8_0")
    exact, native = load(tmp_path / "tiny.gguf", "reference"), load(tmp_path / "tiny.gguf", "cpu")
    assert native.capacity.weight_bytes < exact.capacity.weight_bytes / 2
    assert relative(logits(native, LAST), logits(exact, LAST)) < 0.05
    native.close()


def test_other_spellings_hold_the_same_model(tmp_path: Path) -> None:
    """Without the outer class and with the masks that old exporters stored, as openai-community/gpt2 has it."""
    write_checkpoint(tmp_path, "gpt2")
    source = open_source(str(tmp_path))
    usual = {slot: dequantize(t) for slot, t in bind(load_spec(source), source).items()}
    stored = load_file(tmp_path / "model.safetensors")
    plain = {name.removeprefix("transformer."): t for name, t in stored.items()}
    for i in range(3):
        plain[f"h.{i}.attn.bias"] = torch.ones(1, 1, 256, 256)
        plain[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(plain, tmp_path / "model.safetensors")
    source = open_source(str(tmp_path))
    found = bind(load_spec(source), source)
    assert found.keys() == usual.keys()
    assert all(np.array_equal(dequantize(found[slot]), values) for slot, values in usual.items())
    save_file({**plain, "h.0.mlp.c_gate.weight": torch.ones(64, 64)}, tmp_path / "model.safetensors")
    source = open_source(str(tmp_path))
    with pytest.raises(ModelError, match=r"lacks: h\.0\.mlp\.c_gate\.weight"):
        bind(load_spec(source), source)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"activation_function": "relu"}, "'relu'; GPT-2 is supported with gelu_new"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is true"),
        ({"scale_attn_weights": False}, "scale_attn_weights is false"),
        ({"n_head": 5}, "64 cannot be cut into 5 heads"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "gpt2")
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ModelError, match=said):
        load_spec(open_source(str(tmp_path)))


def test_random_weights_of_a_config_run(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "gpt2")
    (tmp_path / "model.safetensors").unlink()
    source = open_dummy(str(tmp_path))
    executor = CpuExecutor.load(load_spec(source), source, LIMITS)
    assert executor.launch(LAST).wait().ok.all()
    executor.close()


END = "<|endoftext|>"
CHAT = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"


def write_dialogpt(folder: Path, **tokenizer_config: Any) -> Any:
    """The files of DialoGPT: no tokenizer.json, no special tokens named anywhere."""
    table = json.loads(trained_json())["model"]
    model = write_checkpoint(folder, "gpt2", vocab_size=len(table["vocab"]), eos_token_id=table["vocab"][END])
    (folder / "vocab.json").write_text(json.dumps(table["vocab"]), encoding="utf-8")
    lines = [merge if isinstance(merge, str) else " ".join(merge) for merge in table["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 256, **tokenizer_config}))
    return model


def test_the_older_form_of_the_tokenizer_equals_transformers(tmp_path: Path) -> None:
    write_dialogpt(tmp_path, chat_template=CHAT)
    theirs = GPT2TokenizerFast.from_pretrained(tmp_path)
    ours = load_tokenizer(str(tmp_path), {})
    for text in ("Does money buy happiness?", f"Hello  there{END}it's 12\n\n  x", "塔 🗼 naïve", ""):
        assert ours.encode(text) == theirs.encode(text), text
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)
    end = theirs.eos_token_id
    assert (ours.eos_token_ids, ours.bos_token_id, ours.special_ids) == ((end,), end, {end})
    template = load_chat_template(str(tmp_path), {})
    assert template is not None
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "x"},
    ]
    assert template.render(messages, add_generation_prompt=True) == f"Hi{END}Ho{END}x{END}"


@pytest.mark.parametrize(("name", "text"), [("merges.txt", "a\nb"), ("vocab.json", '{"a": "b"}')])
def test_a_broken_older_form_is_named(name: str, text: str, tmp_path: Path) -> None:
    write_dialogpt(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ModelError, match=r"cannot read vocab\.json and merges\.txt"):
        load_tokenizer(str(tmp_path), {})


def test_a_server_completes_text_and_says_what_chat_needs(tmp_path: Path) -> None:
    model = write_dialogpt(tmp_path)
    assert not [finding for finding in check_model(str(tmp_path), {}) if finding.level == "problem"]
    tokenizer = GPT2TokenizerFast.from_pretrained(tmp_path)
    ids = tokenizer.encode("Does money buy happiness?")
    prompt = len(ids)
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    assert tokenizer.eos_token_id not in ids[prompt:]
    body = {"model": "dialo", "prompt": "Does money buy happiness?", "max_tokens": 12, "temperature": 0}
    chat = {"model": "dialo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    command = serve(str(tmp_path), "--served-model-name", "dialo", "--device", "cpu", "--num-gpu-blocks-override", "32")
    with running(*command) as url, httpx.Client(base_url=url, timeout=120) as client:
        answer = client.post("/v1/completions", json=body).json()
        refused = client.post("/v1/chat/completions", json=chat)
    assert answer["choices"][0]["text"] == tokenizer.decode(ids[prompt:])
    assert answer["usage"]["prompt_tokens"] == prompt
    assert refused.status_code == 400 and "/v1/completions" in refused.text
