"""A rank like pagoda.backend.torch.rank on stand-ins for GPUs, with too little memory where it is told so."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cuda_tensors
import pytest
import torch
from cuda_stand_in import StandIn, install
from cuda_tensors import Gpu

from pagoda.backend.torch import parallel, rank
from pagoda.backend.torch.executor import TorchExecutor
from pagoda.backend.torch.model import Decoder
from pagoda.backend.torch.upload import decoding, upload_batch

TOLD, LACKS = "CUDA_RANK_TELLS", "CUDA_RANK_LACKS"
"""Variables of the environment: the file that is told where something was lacking, and what lacks. `large`: memory for
large steps; `small`: for one that a graph would do; `graph`: for the first graph; `recording`: the GPU cannot record;
`life`: the process ends while it records."""
FORWARD, HEAD = 5, 2
"""The most tokens, and rows of logits, for which there is memory."""


def scarce(gpu: Gpu, work: Callable[..., Any], count: Callable[..., int], most: int, name: str) -> Callable[..., Any]:
    """Work that finds the memory full where it is too much."""

    def tried(*args: Any) -> Any:
        if count(*args) <= most:
            return work(*args)
        gpu.held_bytes = gpu.total_bytes - gpu.allocated
        try:
            return work(*args)
        finally:
            gpu.held_bytes = 0
            tell(name)

    return tried


def tell(name: str) -> None:
    with Path(os.environ[TOLD]).open("a") as file:
        file.write(f"{name} ")


def large(patch: pytest.MonkeyPatch, mode: StandIn) -> None:
    gpu, hidden, logits = mode.gpus[1], TorchExecutor.hidden, Decoder.logits
    patch.setattr(TorchExecutor, "hidden", scarce(gpu, hidden, lambda _, batch: len(batch.tokens), FORWARD, "forward"))
    replayed = lambda _, rows: len(rows) if any(graph.replays for graph in mode.graphs) else 0  # noqa: E731
    patch.setattr(Decoder, "logits", scarce(gpu, logits, replayed, HEAD, "head"))


def small(patch: pytest.MonkeyPatch, mode: StandIn) -> None:
    """Once, behind the first replay."""
    told: list[Any] = []

    def count(fed: Any, *_: Any) -> int:
        return int(decoding(fed) and not told and any(graph.replays for graph in mode.graphs))

    once = scarce(mode.gpus[1], upload_batch, count, 0, "replay")

    def upload(fed: Any, *rest: Any) -> Any:
        short = count(fed)
        try:
            return once(fed, *rest)
        finally:
            told.extend(range(short))

    patch.setattr(parallel, "upload_batch", upload)


def failing(patch: pytest.MonkeyPatch, part: str, times: int, fault: Callable[[], object]) -> None:
    """A part of recordings that fails so many times."""
    own, left = getattr(cuda_tensors.Graph, part), list(range(times))

    def tried(*args: Any, **named: Any) -> None:
        own(*args, **named)
        if left:
            left.pop()
            tell("recording")
            cuda_tensors.current().here.graph = None
            fault()

    patch.setattr(cuda_tensors.Graph, part, tried)


def full() -> None:
    raise torch.OutOfMemoryError("full")


def refused() -> None:
    raise torch.AcceleratorError("operation failed due to a previous error during capture")


def main() -> int:
    patch = pytest.MonkeyPatch()
    with install(patch, gpus=2) as mode:
        match os.environ.get(LACKS):
            case "large":
                large(patch, mode)
            case "small":
                small(patch, mode)
            case "graph":
                failing(patch, "capture_begin", 1, full)
            case "recording":
                failing(patch, "capture_end", 1, refused)
            case "life":
                failing(patch, "capture_end", 1, lambda: os._exit(9))
        return rank.main()


if __name__ == "__main__":
    os._exit(main())
