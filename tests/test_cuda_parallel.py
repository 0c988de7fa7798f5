"""Two ranks on stand-ins for GPUs: the tokens of one, in graphs that both record, whatever one of them lacks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cuda_rank
import pytest
import torch
from checkpoints import write_checkpoint
from cuda_stand_in import StandIn, install
from test_cuda_steps import ONE, answers, core_of, replays

from pagoda.backend.torch import parallel
from pagoda.engine.core import EngineCore


@contextmanager
def two(path: Path, patch: pytest.MonkeyPatch, lacks: str = "") -> Iterator[tuple[StandIn, EngineCore]]:
    """An engine on two GPUs, of which the second one lacks something."""
    patch.setattr(parallel, "_COMMAND", (sys.executable, cuda_rank.__file__))
    patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    patch.setenv(cuda_rank.TOLD, str(path / "told"))
    patch.setenv(cuda_rank.LACKS, lacks)
    with install(patch, gpus=2) as gpu:
        yield gpu, core_of(path, tensor_parallel_size=2)


def told(path: Path) -> set[str]:
    """Where something was lacking."""
    return set((path / "told").read_text().split())


@pytest.fixture
def model(tmp_path: Path) -> tuple[Path, list[list[Any]]]:
    """Its files, and what its requests get."""
    write_checkpoint(tmp_path, "llama", **ONE)
    return tmp_path, answers(core_of(tmp_path, "torch-cpu"), tokens=6)


def test_graphs_are_recorded_together_ahead(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second GPU is another one than that of the threads which load."""
    path, wanted = model
    with two(path, monkeypatch) as (gpu, core):
        while core.prepare():
            pass
        assert len(gpu.graphs) == 3 and not replays(gpu)
        assert answers(core, tokens=6) == wanted
        assert len(gpu.graphs) == 3 and replays(gpu) >= 5 and not gpu.gpus[1].peak
        core.close()
        assert not torch.distributed.is_initialized()


@pytest.mark.slow
@pytest.mark.parametrize("lacks", ["large", "small"])
def test_a_rank_without_memory_for_a_step(lacks: str, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a prompt, before the replay of a graph or behind it: it takes part in what the other one waits for, in a graph
    where that one does, then in halves."""
    path, wanted = model
    with two(path, monkeypatch, lacks) as (gpu, core):
        assert answers(core, tokens=6) == wanted
        assert replays(gpu) >= 2
        core.close()
    assert told(path) == ({"forward", "head"} if lacks == "large" else {"replay"})


@pytest.mark.slow
@pytest.mark.parametrize("lacks", ["graph", "recording"])
def test_a_rank_that_cannot_record(lacks: str, model: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Without memory for the largest graph both go on with the others; where recording fails, without any."""
    path, wanted = model
    with two(path, monkeypatch, lacks) as (gpu, core):
        while core.prepare():
            pass
        assert "4 requests was not recorded on another GPU" in caplog.text
        assert len(gpu.graphs) == (3 if lacks == "graph" else 1)
        assert answers(core, tokens=6) == wanted
        assert (replays(gpu) > 0) == (lacks == "graph") and not gpu.graphs[0].replays
        core.close()
    assert told(path) == {"recording"}


@pytest.mark.slow
def test_a_rank_that_dies_while_it_records(model: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    path, _ = model
    ends: list[str] = []
    monkeypatch.setattr(parallel, "engine_ends", ends.append)
    with two(path, monkeypatch, "life") as (_, core):
        with pytest.raises(SystemExit):
            core.prepare()
        core.close()
    assert ends == ["the process of GPU 1 ended (code 9)"] and "the engine ends" in caplog.text
    torch.distributed.destroy_process_group()
