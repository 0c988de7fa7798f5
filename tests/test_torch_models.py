"""The PyTorch executor on tiny random checkpoints of every architecture, on the CPU, against transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import CASES, VOCAB, make_model, write_checkpoint, write_gguf_checkpoint
from reference_plans import Feed, make_plan
from torch_models import PLAN, TOKENS, expected, load, logits, reference, relative

from pagoda.backend import sampling
from pagoda.errors import EngineError
from pagoda.types import StepPlan, StepResult


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, case)
    executor = load(tmp_path)
    assert relative(logits(executor, PLAN), expected(model)) < 1e-4
    assert executor.capacity.device.startswith("torch (")


@pytest.mark.parametrize("case", ["llama-tied", "qwen3", "gemma3"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_types_of_sixteen_bits_differ_by_their_rounding(case: str, dtype: str, tmp_path: Path) -> None:
    model = make_model(case)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                weight *= 0.6  # the usual scale; as they are, these models sharpen every difference
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path)
    exact = expected(model.float())
    error = relative(logits(load(tmp_path, dtype=dtype), PLAN), exact)
    assert 0 < error < (0.03 if dtype == "bfloat16" else 0.004)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunk", [1, 7, 16, 59])
def test_a_prompt_in_chunks_has_the_bits_of_the_whole(dtype: str, chunk: int, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen3-window")
    executor = load(tmp_path, dtype=dtype)
    whole = logits(executor, PLAN)[-1]
    for start in range(0, len(TOKENS), chunk):
        part = TOKENS[start : start + chunk]
        feed = Feed(part, start, [4, 5, 6, 7], rows=[(len(part) - 1, -1, -1)])
        last = logits(executor, make_plan([feed], VOCAB))
    assert np.array_equal(last[0], whole)


def test_company_changes_no_bit(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama-biases")
    executor = load(tmp_path)
    alone = logits(executor, PLAN)[-1]
    rows = [(0, -1, -1)]
    logits(executor, make_plan([Feed(TOKENS[:-1], 0, [0, 1, 2, 3])], VOCAB))
    feeds = [Feed(TOKENS[:50], 0, [8, 9, 10, 11]), Feed(TOKENS[-1:], 59, [0, 1, 2, 3], rows=rows), Feed([5], 0, [12])]
    assert np.array_equal(logits(executor, make_plan(feeds, VOCAB, slots=[2, 0, 3]))[0], alone)


def test_keys_and_values_of_eight_bits(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path, "qwen3")
    small, whole = load(tmp_path, kv_cache_dtype="fp8"), load(tmp_path)
    assert small.capacity.kv_bytes * 4 == whole.capacity.kv_bytes
    assert 1e-3 < relative(logits(small, PLAN), expected(model)) < 0.2


def mixed_plan() -> StepPlan:
    """Rows of every kind: greedy, drawn with each parameter, penalties, biases, masks, given tokens."""
    draw = {"temperature": 0.9, "seed": 2**63 + 5}
    history = {5: 2, 9: 0, 77: 1}
    feeds = [
        Feed(TOKENS[:9], 0, [0], rows=[(i, TOKENS[i + 1], 3) for i in range(8)] + [(8, -1, 5)]),
        Feed(TOKENS[:20], 0, [1, 2], rows=[(19, -1, 0)], **draw),
        Feed(TOKENS[5:9], 0, [3], rows=[(3, -1, -1)], top_k=7, **draw),
        Feed(TOKENS[5:9], 0, [4], rows=[(2, -1, -1), (3, -1, 20)], top_p=0.6, **draw),
        Feed(TOKENS[5:9], 0, [5], rows=[(3, -1, -1)], min_p=0.2, top_k=50, top_p=0.9, **draw),
        Feed(
            TOKENS[5:9], 0, [6], rows=[(3, -1, 2)], history=history, presence=0.5, frequency=0.3, repetition=1.3, **draw
        ),
        Feed(TOKENS[5:9], 0, [7], rows=[(3, -1, -1)], bias=[(3, 50.0), (3, -100.0), (8, 4.0)], temperature=1.5, seed=1),
        Feed(TOKENS[5:9], 0, [8], rows=[(3, -1, -1)], allowed={200, 201, 255}, **draw),
        Feed(TOKENS[5:9], 0, [9], rows=[(3, -1, 1)], allowed=set(), **draw),
    ]
    return make_plan(feeds, VOCAB, slots=[8, 1, 2, 3, 4, 5, 6, 7, 0])


def same(result: StepResult, wanted: StepResult) -> None:
    assert result.tokens.tolist() == wanted.tokens.tolist()
    assert result.ok.tolist() == wanted.ok.tolist()
    assert np.array_equal(result.top_ids, wanted.top_ids)
    np.testing.assert_allclose(result.logprobs, wanted.logprobs, atol=2e-4)
    np.testing.assert_allclose(result.top_logprobs, wanted.top_logprobs, atol=2e-4)


@pytest.mark.parametrize("seed", range(8))
def test_a_step_gives_the_tokens_of_the_reference(seed: int, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama")
    plan = mixed_plan()
    plan = replace(plan, seed=plan.seed + np.uint64(seed))
    executor = load(tmp_path)
    result = executor.launch(plan).wait()
    same(result, reference(tmp_path).run(plan))
    same(result, sampling.sample_rows(logits(executor, plan), plan))
    assert result.ok.tolist() == [1] * (len(result.ok) - 1) + [0]


def test_a_nan_stays_with_its_request(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama")
    executor = load(tmp_path)
    executor.decoder.embed.data[7] = float("nan")
    feeds = [Feed([5, 6], 0, [0], rows=[(1, -1, -1)]), Feed([5, 7], 0, [1], rows=[(1, -1, -1)])]
    assert executor.launch(make_plan(feeds, VOCAB)).wait().ok.tolist() == [1, 0]


def test_a_plan_that_leaves_the_cache_fails_as_a_step(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama")
    executor = load(tmp_path)
    with pytest.raises(EngineError, match="step failed"):
        executor.launch(make_plan([Feed([5], 0, [32])], VOCAB))
    assert executor.launch(PLAN).wait().ok.all()


def test_a_step_that_does_not_fit_runs_in_halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that has no memory for more than 5 tokens gives the same result, and is asked for more only once."""
    write_checkpoint(tmp_path, "llama")
    plan = mixed_plan()
    executor = load(tmp_path)
    whole = executor.launch(plan).wait()
    sizes: list[int] = []
    run = executor._run

    def short(piece: StepPlan) -> object:
        sizes.append(len(piece.tokens))
        if len(piece.tokens) > 5:
            raise torch.OutOfMemoryError("no memory")
        return run(piece)

    monkeypatch.setattr(executor, "_run", short)
    for cache in executor.decoder.caches:
        cache[0].zero_(), cache[1].zero_()
    same(executor.launch(plan).wait(), whole)
    sizes.clear()
    same(executor.launch(plan).wait(), whole)
    assert max(sizes) <= 5
    monkeypatch.setattr(executor, "_run", lambda piece: (_ for _ in ()).throw(torch.OutOfMemoryError("none at all")))
    with pytest.raises(EngineError, match="no memory left"):
        executor.launch(plan)


@pytest.mark.parametrize("case", ["llama", "qwen2-tied", "qwen3"])
def test_gguf_models_equal_transformers(case: str, tmp_path: Path) -> None:
    model = make_model(case)
    write_gguf_checkpoint(tmp_path / "tiny.gguf", model)
    assert relative(logits(load(tmp_path / "tiny.gguf"), PLAN), expected(model)) < 1e-4
