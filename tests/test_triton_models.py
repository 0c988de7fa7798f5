"""Whole models through the Triton kernels and the padding of graphs, against the same executor in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import VOCAB, write_checkpoint
from reference_plans import Feed, make_plan
from torch_models import load, logits, relative
from triton_cases import again

from pagoda.backend.torch import ops
from pagoda.backend.torch.graphs import DecodeGraphs

PROMPTS = make_plan(
    [Feed([3, 4, 5, 6, 7], 0, [1, 2], rows=[(4, -1, -1)]), Feed([8, 9], 0, [3], rows=[(1, -1, -1)])], VOCAB
)
MIXED = make_plan([Feed([10], 5, [1, 2], rows=[(0, -1, -1)]), Feed([11, 12, 13], 2, [3], rows=[(2, -1, -1)])], VOCAB)
DECODE = make_plan([Feed([14], 6, [1, 2], rows=[(0, -1, -1)]), Feed([15], 5, [3], rows=[(0, -1, -1)])], VOCAB)


def answers(executor: object, see: Callable[..., np.ndarray]) -> list[np.ndarray]:  # type: ignore[type-arg]
    return [see(executor, plan) for plan in (PROMPTS, MIXED, DECODE)]


@pytest.mark.parametrize(
    "case", ["qwen3", "llama-biases", "qwen3-window", "gpt2", pytest.param("gpt-oss", marks=pytest.mark.slow), "gemma2"]
)
@pytest.mark.parametrize("quantization", [None, "int4"])
def test_a_model(case: str, quantization: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if quantization and case != "qwen3":
        pytest.skip("one model for each kind of weight")
    write_checkpoint(tmp_path, case, num_hidden_layers=2)
    plain = answers(load(tmp_path, quantization=quantization), logits)
    monkeypatch.setattr(ops, "on_gpu", lambda x: True)
    fused = answers(load(tmp_path, quantization=quantization), logits)
    for got, wanted in zip(fused, plain, strict=True):
        assert relative(got, wanted) < 2e-3


@pytest.mark.parametrize("case", ["qwen3", "gpt2"])
def test_a_step_through_the_fixed_buffers(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, case, num_hidden_layers=2)
    plain, executor = load(tmp_path), load(tmp_path)
    for plan in (PROMPTS, MIXED):
        plain.launch(plan).wait()
        executor.launch(plan).wait()
    monkeypatch.setattr(ops, "on_gpu", lambda x: True)
    graphs = DecodeGraphs(executor.decoder.hidden, again, most_requests=4, most_context=256, device=torch.device("cpu"))
    monkeypatch.setattr(executor, "_graphs", graphs)
    for _ in range(2):  # recorded, then replayed
        assert executor.launch(DECODE).wait().tokens.tolist() == plain.launch(DECODE).wait().tokens.tolist()
