"""Loads models into the PyTorch executor on the CPU, and reads the logits of a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import VOCAB
from reference_plans import Feed, make_plan

from pagoda.arch.registry import load_spec
from pagoda.backend.base import Limits
from pagoda.backend.reference import ReferenceExecutor
from pagoda.backend.torch.executor import TorchCpuExecutor
from pagoda.backend.torch.upload import upload
from pagoda.types import Float32, StepPlan
from pagoda.weights.open import open_source

LIMITS = Limits(max_model_len=256, max_num_seqs=4, max_num_batched_tokens=128, num_blocks=32)
TOKENS: list[int] = np.random.default_rng(0).integers(3, VOCAB, 60).tolist()
PLAN = make_plan([Feed(tokens=TOKENS, blocks=[9, 2, 5, 3], rows=[(i, -1, -1) for i in range(len(TOKENS))])], VOCAB)


def load(path: Path, **limits: Any) -> TorchCpuExecutor:
    source = open_source(str(path))
    chosen = Limits(**{**{name: getattr(LIMITS, name) for name in LIMITS.__slots__}, **limits})
    return TorchCpuExecutor.load(load_spec(source), source, chosen)


def logits(executor: TorchCpuExecutor, plan: StepPlan) -> Float32:
    with torch.inference_mode():
        batch, _ = upload(plan, torch.device("cpu"), executor.capacity.num_blocks)
        return executor.decoder.logits(executor.decoder.hidden(batch)).float().numpy()


def reference(path: Path) -> ReferenceExecutor:
    source = open_source(str(path))
    return ReferenceExecutor.load(load_spec(source), source, LIMITS)


def expected(model: Any) -> Float32:
    """What transformers computes after each of TOKENS."""
    with torch.no_grad():
        return np.asarray(model(torch.tensor([TOKENS])).logits[0].float().numpy(), np.float32)


def relative(values: Float32, exact: Float32) -> float:
    """Root mean square of the error in terms of that of the exact logits."""
    return float(np.sqrt(((values - exact) ** 2).mean() / (exact**2).mean()))
