"""On a stand-in for a GPU, what is computed beside graphs: images, encoders, adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vl_tiny
from checkpoints import VOCAB, write_checkpoint
from cuda_stand_in import install
from lora_files import write_adapter
from pooled_models import write_model, write_sentence_files
from reference_plans import Feed, make_plan
from test_cuda_steps import ONE, replays
from test_pooled_engine import check, vectors
from vl_cases import IMAGES, TOKENS

from pagoda.arch.lora import read_adapter
from pagoda.arch.registry import load_spec
from pagoda.backend.base import Limits
from pagoda.backend.torch.executor import TorchCpuExecutor, TorchExecutor
from pagoda.engine.core import EngineCore
from pagoda.options.engine_config import EngineConfig
from pagoda.types import Request, SamplingParams
from pagoda.weights.lora import find_adapter
from pagoda.weights.open import open_source


def seen(path: Path, device: str) -> list[list[int]]:
    """What a prompt with pictures and one without get, together, in chunks."""
    table: dict[str, Any] = {"num_blocks": 24, "max_num_seqs": 2, "max_num_batched_tokens": 24, "max_model_len": 96}
    core = EngineCore(EngineConfig(model=str(path), device=device, dtype="float32", speculation=None, **table))
    params = SamplingParams(max_tokens=4, temperature=0, seed=0, ignore_eos=True)
    last = IMAGES[0].start + IMAGES[0].tokens + 2
    core.add(Request(request_id="0", prompt_token_ids=TOKENS[:last], images=IMAGES[:1], params=params))
    core.add(Request(request_id="1", prompt_token_ids=TOKENS[:3], params=params))
    found: list[list[int]] = [[], []]
    while core.has_work:
        for delta in core.step():
            assert delta.error is None
            found[int(delta.request_id)] += delta.token_ids
    return found


@pytest.mark.slow
def test_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their steps run without graphs, those that generate behind them in graphs, with three positions a token."""
    vl_tiny.write(tmp_path, "qwen2_5_vl")
    wanted = seen(tmp_path, "torch-cpu")
    with install(monkeypatch) as gpu:
        assert seen(tmp_path, "cuda") == wanted
        assert replays(gpu) >= 2


def test_an_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path, "bert")
    write_sentence_files(tmp_path, "mean_tokens")
    texts = [[7, 8, 9], [10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27], [30]]
    wanted = vectors(tmp_path, "torch-cpu", texts)
    with install(monkeypatch):
        check(vectors(tmp_path, "cuda", texts, dtype="float32"), wanted)


def test_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode step with one and without; what is recorded has none."""
    model = write_checkpoint(tmp_path / "model", "qwen3", **ONE)
    write_adapter(tmp_path / "own", model)
    source = open_source(str(tmp_path / "model"))
    spec = load_spec(source)
    limits = Limits(64, 4, 8, num_blocks=8, dtype="float32", max_loras=1)
    weights = read_adapter(find_adapter("own", str(tmp_path / "own")), spec, gguf=False, max_rank=16)

    def tokens(kind: type[TorchExecutor]) -> list[list[int]]:
        executor = kind.load(spec, source, limits)
        executor.adapt(0, weights)
        found = []
        for position, places in ((0, [0, -1]), (1, [-1, -1]), (2, [-1, -1]), (3, [0, -1])):
            feeds = [Feed([5 + position + i], position, [i], rows=[(0, -1, -1)]) for i in range(2)]
            plan = make_plan(feeds, VOCAB)
            plan.adapters = np.array(places, np.int32)
            found.append(executor.launch(plan).wait().tokens.tolist())
        return found

    wanted = tokens(TorchCpuExecutor)
    with install(monkeypatch) as gpu:
        assert tokens(TorchExecutor) == wanted
        assert len(gpu.graphs) == 1 and replays(gpu) == 1
