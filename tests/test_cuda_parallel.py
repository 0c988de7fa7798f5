"""Two ranks on stand-ins for GPUs: the tokens of one, in graphs, and where one of them has too little memory."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import cuda_rank
import pytest
import torch
from checkpoints import write_checkpoint
from cuda_stand_in import install
from test_cuda_steps import ONE, answers, core_of, replays

from pagoda.backend.torch import parallel


@pytest.mark.slow
@pytest.mark.parametrize("short", [False, True])
def test_two_ranks(short: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second GPU is another one than that of the threads which load. Where it has too little memory, in a prompt
    or behind the replay of a graph, it takes part in what the other one waits for, then in halves."""
    write_checkpoint(tmp_path, "llama", **ONE)
    wanted = answers(core_of(tmp_path, "torch-cpu"), tokens=6)
    monkeypatch.setattr(parallel, "_COMMAND", (sys.executable, cuda_rank.__file__))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    told = tmp_path / "told"
    if short:
        monkeypatch.setenv(cuda_rank.TOLD, str(told))
    with install(monkeypatch, gpus=2) as gpu:
        core = core_of(tmp_path, tensor_parallel_size=2)
        assert answers(core, tokens=6) == wanted
        assert replays(gpu) >= 2 and not gpu.gpus[1].peak
        core.close()
        assert not torch.distributed.is_initialized()
    assert not short or set(told.read_text().split()) == {"forward", "head"}
