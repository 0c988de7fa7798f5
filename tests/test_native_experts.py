"""Mixtures of experts in the native executor: against transformers and the reference, in every type, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from checkpoints import EXPERT_CASES, VOCAB, make_model, write_checkpoint, write_gguf_checkpoint
from reference_plans import Feed, make_plan
from test_native_models import LIMITS, TOKENS, expected_logits, native_logits, reference_logits, relative

from pagoda.arch.registry import load_spec
from pagoda.backend.cpu import library
from pagoda.backend.cpu.executor import CpuExecutor
from pagoda.weights.open import open_source

torch = pytest.importorskip("torch")
ISAS = library.isas()


@pytest.mark.parametrize("case", EXPERT_CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    expected = expected_logits(write_checkpoint(tmp_path, case), TOKENS)
    assert relative(native_logits(tmp_path, TOKENS) - expected, expected) < 1e-3
