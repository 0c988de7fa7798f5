"""LoRA adapters on tiny random models: logits as of the merged model in transformers, no bit moved by the company."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import VOCAB, make_model, write_checkpoint, write_gguf_checkpoint
from gguf_writer import write_gguf
from lora_files import write_adapter
from reference_plans import Feed, make_plan

from pagoda.arch.lora import adapters_bytes, read_adapter
from pagoda.arch.registry import load_spec
from pagoda.arch.spec import ModelSpec
from pagoda.backend.base import Limits
from pagoda.backend.reference import ReferenceExecutor
from pagoda.cli.main import main
from pagoda.errors import ModelError
from pagoda.types import Float32, StepPlan
from pagoda.weights.lora import find_adapter
from pagoda.weights.open import open_source

torch = pytest.importorskip("torch")
LIMITS = Limits(max_model_len=256, max_num_seqs=4, max_num_batched_tokens=128, num_blocks=32, max_loras=2)
TOKENS: list[int] = np.random.default_rng(0).integers(3, VOCAB, 40).tolist()
ROWS = [(i, -1, -1) for i in range(len(TOKENS))]


def load(path: Path, adapters: Sequence[Path]) -> ReferenceExecutor:
    source = open_source(str(path))
    spec = load_spec(source)
    executor = ReferenceExecutor.load(spec, source, LIMITS)
    for place, folder in enumerate(adapters):
        executor.adapt(place, weights(folder, spec, gguf=bool(source.metadata)))
    return executor


def weights(folder: Path, spec: ModelSpec, *, gguf: bool = False, max_rank: int = 16) -> Any:
    return read_adapter(find_adapter("a", str(folder)), spec, gguf=gguf, max_rank=max_rank)


def plan(places: Sequence[int]) -> StepPlan:
    """The same prompt for requests with the adapters in these places, -1 for none."""
    feeds = [Feed(TOKENS, blocks=range(3 * i, 3 * i + 3), rows=ROWS) for i in range(len(places))]
    return replace(make_plan(feeds, VOCAB), adapters=np.array(places, np.int32))


def expected(model: Any) -> Float32:
    with torch.no_grad():
        return np.asarray(model(torch.tensor([TOKENS])).logits[0].float().numpy(), np.float32)


def worst(logits: Float32, exact: Float32) -> float:
    return float(np.abs(logits - exact).max() / np.abs(exact).max())


@pytest.mark.parametrize("case", ["llama-biases", "qwen3", "gemma2"])
def test_adapters_and_none_in_one_step_equal_the_merged_models(case: str, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", case)
    one = write_adapter(tmp_path / "one", model, rank=4, alpha=8)
    two = write_adapter(tmp_path / "two", model, rank=6, alpha=3, targets=("q_proj", "v_proj"), seed=2, use_rslora=True)
    executor = load(tmp_path / "model", [tmp_path / "one", tmp_path / "two"])
    logits = executor.logits(plan([1, -1, 0])).reshape(3, len(TOKENS), VOCAB)
    for found, exact in zip(logits, (two, model, one), strict=True):
        assert worst(found, expected(exact)) < 1e-4
    assert worst(logits[2], logits[1]) > 0.05
    assert np.array_equal(logits[1], load(tmp_path / "model", []).logits(plan([-1])))
    assert np.array_equal(logits[2], load(tmp_path / "model", [tmp_path / "one"]).logits(plan([0])))


@pytest.mark.parametrize("case", ["llama", "qwen2"])
def test_adapter_of_peft_on_a_gguf_model(case: str, tmp_path: Path) -> None:
    model = make_model(case)
    write_gguf_checkpoint(tmp_path / "tiny.gguf", model)
    merged = write_adapter(tmp_path / "one", model, torch_file=True)
    logits = load(tmp_path / "tiny.gguf", [tmp_path / "one"]).logits(plan([0]))
    assert worst(logits, expected(merged)) < 1e-4


def test_adapter_of_llama_cpp(tmp_path: Path) -> None:
    """Its rows of q and k are in GGUF's order; on safetensors they are put back."""
    model = write_checkpoint(tmp_path / "model", "llama")
    write_gguf_checkpoint(tmp_path / "tiny.gguf", model)
    merged = write_adapter(tmp_path / "one", model, alpha=6)
    spec = load_spec(open_source(str(tmp_path / "tiny.gguf")))
    names = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
    names |= {"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
    tensors: dict[str, Any] = {}
    for slot, low in weights(tmp_path / "one", spec, gguf=True).items():
        _, layer, part = slot.split(".")
        tensors[f"blk.{layer}.{names[part]}.weight.lora_a"] = low.down
        tensors[f"blk.{layer}.{names[part]}.weight.lora_b"] = low.up / np.float32(6 / 4)
    table = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 6.0}
    write_gguf(tmp_path / "one.gguf", {"general.architecture": "llama", **table}, tensors)
    for path in ("tiny.gguf", "model"):
        logits = load(tmp_path / path, [tmp_path / "one.gguf"]).logits(plan([0]))
        assert worst(logits, expected(merged)) < 1e-4, path


def test_patterns_and_fused_names(tmp_path: Path) -> None:
    """alpha_pattern holds for the modules it names; q, k and v of one matrix share what is below."""
    model = write_checkpoint(tmp_path / "model", "llama")
    write_adapter(tmp_path / "one", model, targets=("q_proj", "k_proj"), alpha_pattern={"k_proj": 80})
    spec = load_spec(open_source(str(tmp_path / "model")))
    plainly = tmp_path / "plain"
    write_adapter(plainly, model, targets=("q_proj", "k_proj"))
    one, plain = weights(tmp_path / "one", spec), weights(plainly, spec)
    assert np.array_equal(one["layers.0.q"].up, plain["layers.0.q"].up)
    assert np.allclose(one["layers.0.k"].up, 10 * plain["layers.0.k"].up)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "biases"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"init_lora_weights": "pissa_niter_16"}, "path_initial_model_for_weight_conversion"),
        ({"lora_alpha": "x"}, "not a number"),
    ],
)
def test_what_is_no_plain_lora_is_refused(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", "qwen3")
    write_adapter(tmp_path / "one", model, targets=("q_proj",))
    file = tmp_path / "one" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    with pytest.raises(ModelError, match=words):
        weights(tmp_path / "one", load_spec(open_source(str(tmp_path / "model"))))


@pytest.mark.parametrize(
    ("targets", "case", "words"),
    [
        (("lm_head",), "qwen3", "embeddings or the head"),
        (("q_proj",), "llama-wide-heads", "another model"),
        (("q_proj",), "rank", "--max-lora-rank 4"),
        (("q_proj",), "changed", "were changed"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(targets: Sequence[str], case: str, words: str, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", "qwen3")
    trained = make_model(case) if case == "llama-wide-heads" else model
    if case == "llama-wide-heads":
        trained.model.layers[0].self_attn.q_proj = torch.nn.Linear(64, 96)
    write_adapter(tmp_path / "one", trained, targets=targets)
    adapter = find_adapter("a", str(tmp_path / "one"))
    if case == "changed":
        write_adapter(tmp_path / "one", model, targets=targets, rank=2)
    with pytest.raises(ModelError, match=words):
        spec = load_spec(open_source(str(tmp_path / "model")))
        read_adapter(adapter, spec, gguf=False, max_rank=2 if case == "rank" else 16)


@pytest.mark.parametrize(("path", "words"), [("nowhere", "is no folder"), ("model", "adapter_config.json")])
def test_paths_without_an_adapter(path: str, words: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", "qwen3")
    with pytest.raises(ModelError, match=words):
        find_adapter("a", str(tmp_path / path))


def test_memory_of_adapters(tmp_path: Path) -> None:
    """What is set aside is what adapters of the largest rank on all matrices take."""
    model = write_checkpoint(tmp_path / "model", "llama")
    write_adapter(tmp_path / "one", model, rank=16)
    spec = load_spec(open_source(str(tmp_path / "model")))
    found = weights(tmp_path / "one", spec).values()
    assert adapters_bytes(spec, LIMITS) == 2 * sum(low.down.nbytes + low.up.nbytes for low in found)


def test_the_plan_counts_them_and_tells_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path, "llama")
    spec = load_spec(open_source(str(tmp_path)))
    words = ["plan", str(tmp_path), "--device", "cpu", "--json"]
    told = []
    for more in ([], ["--lora-modules", "a=./a", "b=./b", "--max-lora-rank", "8", "--no-enforce-eager"]):
        assert main([*words, *more]) == 0
        told.append(json.loads(capsys.readouterr().out))
    both = replace(LIMITS, max_loras=2, max_lora_rank=8)
    assert told[1]["weight_bytes"] - told[0]["weight_bytes"] == adapters_bytes(spec, both)
    assert "--lora-modules a=./a b=./b" in told[1]["command"] and "--no-enforce-eager" in told[1]["command"]
