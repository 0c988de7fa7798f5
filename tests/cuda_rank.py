"""A rank like pagoda.backend.torch.rank on stand-ins for GPUs, with too little memory for large steps."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cuda_stand_in import install
from cuda_tensors import Gpu

from pagoda.backend.torch import rank
from pagoda.backend.torch.executor import TorchExecutor
from pagoda.backend.torch.model import Decoder

TOLD = "CUDA_RANK_TELLS"
"""A variable of the environment: the file that is told where memory was too little. Without it there is enough."""
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
            with Path(os.environ[TOLD]).open("a") as file:
                file.write(f"{name} ")

    return tried


def main() -> int:
    patch = pytest.MonkeyPatch()
    with install(patch, gpus=2) as mode:
        if TOLD in os.environ:
            gpu, hidden, logits = mode.gpus[1], TorchExecutor.hidden, Decoder.logits
            forward = scarce(gpu, hidden, lambda _, batch: len(batch.tokens), FORWARD, "forward")
            patch.setattr(TorchExecutor, "hidden", forward)
            replayed = lambda _, rows: len(rows) if any(graph.replays for graph in mode.graphs) else 0  # noqa: E731
            patch.setattr(Decoder, "logits", scarce(gpu, logits, replayed, HEAD, "head"))
        return rank.main()


if __name__ == "__main__":
    os._exit(main())
