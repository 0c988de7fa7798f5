"""The reference executor on tiny random checkpoints of every architecture and format, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from checkpoints import CASES, VOCAB, make_model, write_checkpoint, write_gguf_checkpoint
from reference_plans import Feed, make_plan

from pagoda.arch.registry import load_spec
from pagoda.backend.base import Limits
from pagoda.backend.reference import ReferenceExecutor
from pagoda.engine.core import EngineCore
from pagoda.options.engine_config import EngineConfig
from pagoda.text.tokenizer import load_tokenizer
from pagoda.types import Float32, Request, SamplingParams
from pagoda.weights.open import open_source

LIMITS = Limits(max_model_len=256, max_num_seqs=4, max_num_batched_tokens=128, num_blocks=32)
TOKENS = np.random.default_rng(0).integers(3, VOCAB, 100).tolist()
BOUND = 1e-4


def load(path: Path) -> ReferenceExecutor:
    source = open_source(str(path))
    return ReferenceExecutor.load(load_spec(source), source, LIMITS)


def prompt_logits(path: Path) -> Float32:
    """Logits after every token of the prompt, through blocks out of order."""
    rows = [(i, -1, -1) for i in range(len(TOKENS))]
    return load(path).logits(make_plan([Feed(TOKENS, blocks=[9, 2, 5, 3, 30, 0, 7], rows=rows)], VOCAB))


def expected_logits(model: Any) -> Float32:
    with torch.no_grad():
        return np.asarray(model(torch.tensor([TOKENS])).logits[0].numpy(), np.float32)


def worst(logits: Float32, expected: Float32) -> float:
    """The largest error of any logit in terms of the largest logit."""
    return float(np.abs(logits - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, case)
    assert worst(prompt_logits(tmp_path), expected_logits(model)) < BOUND


@pytest.mark.parametrize("case", ["llama", "qwen2-tied", "qwen3"])
def test_logits_of_a_sharded_checkpoint(case: str, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, case, sharded=True)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert worst(prompt_logits(tmp_path), expected_logits(model)) < BOUND


@pytest.mark.parametrize(
    "case",
    [
        "llama",
        "llama-tied",
        "llama-biases",
        "llama-wide-heads",
        "llama-llama3",
        "mistral",
        "qwen2",
        "qwen2-tied",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3",
    ],
)
def test_logits_of_gguf_equal_transformers(case: str, tmp_path: Path) -> None:
    model = make_model(case)
    write_gguf_checkpoint(tmp_path / "tiny.gguf", model)
    assert worst(prompt_logits(tmp_path / "tiny.gguf"), expected_logits(model)) < BOUND


@pytest.mark.parametrize("case", ["llama-linear", "llama-yarn"])
def test_logits_of_gguf_with_scaled_rope(case: str, tmp_path: Path) -> None:
    model = make_model(case)
    recipe = model.config.rope_parameters
    scaling = {"llama.rope.scaling.type": recipe["rope_type"], "llama.rope.scaling.factor": recipe["factor"]}
    if case == "llama-yarn":
        scaling["llama.rope.scaling.original_context_length"] = recipe["original_max_position_embeddings"]
    write_gguf_checkpoint(tmp_path / "tiny.gguf", model, metadata=scaling)
    assert worst(prompt_logits(tmp_path / "tiny.gguf"), expected_logits(model)) < BOUND


def test_prompt_logprobs_equal_transformers(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, "qwen3")
    rows = [(i, TOKENS[i + 1], 3) for i in range(len(TOKENS) - 1)]
    result = load(tmp_path).launch(make_plan([Feed(TOKENS, blocks=range(7), rows=rows)], VOCAB)).wait()
    expected = torch.log_softmax(torch.tensor(expected_logits(model)), dim=-1)[:-1]
    assert result.tokens.tolist() == TOKENS[1:]
    chosen = expected.gather(1, torch.tensor(TOKENS[1:])[:, None])[:, 0]
    np.testing.assert_allclose(result.logprobs, chosen, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(result.top_logprobs, expected.topk(3).values, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "case", ["llama-biases", "llama-yarn", "mistral-window", "qwen2-tied", "qwen3", "gemma2", "gemma3"]
)
def test_greedy_text_equals_transformers(case: str, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, case)
    prompt = TOKENS[:20]
    config = EngineConfig(model=str(tmp_path), device="reference", max_model_len=256, num_blocks=32)
    assert generate(EngineCore(config), prompt, 24) == greedy(model, prompt, 24)


@pytest.mark.slow
def test_greedy_text_of_smollm2_equals_transformers(smollm2_path: str) -> None:
    folder, file = str(Path(smollm2_path).parent), Path(smollm2_path).name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    core = EngineCore(EngineConfig(model=smollm2_path, device="reference", max_model_len=256, max_num_seqs=1))
    prompt = load_tokenizer(smollm2_path, core.metadata).encode("The three largest cities of Italy are")
    assert generate(core, prompt, 10) == greedy(model, prompt, 10)


def generate(core: EngineCore, prompt: list[int], count: int) -> list[int]:
    params = SamplingParams(temperature=0, max_tokens=count, seed=0)
    core.add(Request(request_id="a", prompt_token_ids=prompt, params=params))
    out: list[int] = []
    while core.has_work:
        for delta in core.step():
            assert delta.error is None
            out += delta.token_ids
    core.close()
    return out


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """By whole prompts, without transformers' own cache and stopping."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]
