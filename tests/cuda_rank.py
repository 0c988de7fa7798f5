"""A rank like pagoda.backend.torch.rank on stand-ins for GPUs; CUDA_RANK_HOLDS bytes of its memory stay free."""

from __future__ import annotations

import os
from typing import Any

import pytest
from cuda_stand_in import install

from pagoda.backend.torch import rank
from pagoda.backend.torch.executor import TorchExecutor

LEFT = "CUDA_RANK_LEFT"
"""A variable of the environment: the bytes that the GPU of a rank behind the first still has once it has loaded."""


def main() -> int:
    patch = pytest.MonkeyPatch()
    with install(patch, gpus=2) as mode:
        own = TorchExecutor.__dict__["load"].__func__

        def load(cls: type[TorchExecutor], *args: Any) -> TorchExecutor:
            executor: TorchExecutor = own(cls, *args)
            if LEFT in os.environ:
                mode.here.held_bytes = mode.here.total_bytes - mode.here.allocated - int(os.environ[LEFT])
            return executor

        patch.setattr(TorchExecutor, "load", classmethod(load))
        return rank.main()


if __name__ == "__main__":
    os._exit(main())
