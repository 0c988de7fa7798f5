"""The families of decoders that are not quite Llama, in both formats and each executor, against transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import VOCAB
from family_cases import CASES, IN_GGUF, make_family, tokens_of, write_family, write_family_gguf
from reference_plans import Feed, make_plan
from test_gpt2 import KINDS, LAST, LIMITS, TOKENS, expected, load, logits, relative
from test_reference_models import generate

from pagoda.arch.dummy import open_dummy
from pagoda.arch.registry import load_spec
from pagoda.arch.sharding import parallel_sizes, share
from pagoda.backend.cpu.executor import CpuExecutor
from pagoda.backend.torch import ops
from pagoda.config import EngineConfig
from pagoda.engine.core import EngineCore
from pagoda.errors import ModelError
from pagoda.weights.open import open_source

KV_ERROR = 5e-3
"""The native executor keeps keys and values in float16."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Each case as safetensors and, where converters know it, as tiny.gguf; and the model it came from."""
    made = {}
    for case in CASES:
        folder = tmp_path_factory.mktemp(case)
        made[case] = (folder, write_family(folder, case))
        if case in IN_GGUF:
            (folder / "gguf").mkdir()
            write_family_gguf(folder / "gguf" / "tiny.gguf", case, made[case][1])
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, kind: str, folders: dict[str, tuple[Path, Any]]) -> None:
    folder, model = folders[case]
    executor = load(folder, kind)
    assert relative(logits(executor, LAST), expected(model)) < (KV_ERROR if kind == "cpu" else 1e-4)
    executor.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", IN_GGUF)
def test_gguf_logits_equal_transformers(case: str, kind: str, folders: dict[str, tuple[Path, Any]]) -> None:
    folder, model = folders[case]
    executor = load(folder / "gguf" / "tiny.gguf", kind)
    assert relative(logits(executor, LAST), expected(model)) < (KV_ERROR if kind == "cpu" else 1e-4)
    executor.close()
