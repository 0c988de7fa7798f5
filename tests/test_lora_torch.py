"""LoRA adapters in the PyTorch executor: logits as of the reference, and rows that no company moves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoints import VOCAB, write_checkpoint
from lora_files import write_adapter
from reference_plans import Feed, make_plan

pytest.importorskip("torch")
from torch_models import LIMITS, TOKENS, load, logits, relative

from pagoda.arch.lora import read_adapter
from pagoda.arch.registry import load_spec
from pagoda.backend.base import Limits
from pagoda.backend.reference import ReferenceExecutor
from pagoda.backend.torch.executor import TorchCpuExecutor
from pagoda.backend.torch.split import part
from pagoda.types import StepPlan
from pagoda.weights.lora import find_adapter
from pagoda.weights.open import open_source

ROWS = [(i, -1, -1) for i in range(len(TOKENS))]


def plan(places: list[int]) -> StepPlan:
    feeds = [Feed(TOKENS, blocks=range(4 * i, 4 * i + 4), rows=ROWS) for i in range(len(places))]
    return replace(make_plan(feeds, VOCAB), adapters=np.array(places, np.int32))


@pytest.mark.parametrize("case", ["qwen2", "gemma2"])
def test_adapters_and_none_in_one_step(case: str, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", case)
    write_adapter(tmp_path / "one", model)
    write_adapter(tmp_path / "two", model, rank=7, targets=("q_proj", "down_proj"), seed=2)
    source = open_source(str(tmp_path / "model"))
    spec = load_spec(source)
    wide = {"max_loras": 2, "max_num_batched_tokens": 256}
    executor = load(tmp_path / "model", **wide)
    exact = ReferenceExecutor.load(spec, source, Limits(**{n: getattr(LIMITS, n) for n in LIMITS.__slots__} | wide))
    for place, name in enumerate(("one", "two")):
        weights = read_adapter(find_adapter(name, str(tmp_path / name)), spec, gguf=False, max_rank=16)
        executor.adapt(place, weights)
        exact.adapt(place, weights)
    found, places = logits(executor, plan([0, -1, 1])), [0, -1, 1]
    assert relative(found, exact.logits(plan(places))) < 1e-4
    apart = found.reshape(3, len(TOKENS), VOCAB)
    assert relative(apart[0], apart[1]) > 0.05 < relative(apart[2], apart[1])
    for place, own in zip(places, apart, strict=True):
        assert np.array_equal(logits(executor, plan([place])), own)
    bare = load(tmp_path / "model")
    assert np.array_equal(logits(bare, replace(plan([-1]), adapters=None)), apart[1])


def test_a_step_that_is_cut_keeps_its_adapters(tmp_path: Path) -> None:
    whole = plan([0, -1, 1])
    first, _ = part(whole, 0, 70)
    second, _ = part(whole, 70, 180)
    assert first.adapters is not None and first.adapters.tolist() == [0, -1]
    assert second.adapters is not None and second.adapters.tolist() == [-1, 1]


def test_an_executor_without_room_takes_none(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen2")
    executor: TorchCpuExecutor = load(tmp_path)
    with pytest.raises(Exception, match="without room"):
        executor.adapt(0, {})
