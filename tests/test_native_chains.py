"""Many rows of one step on many threads: each takes rows of its own through the layers, and no bit changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from checkpoints import VOCAB, write_checkpoint
from reference_plans import Feed, make_plan

from pagoda.arch.registry import load_spec
from pagoda.backend.base import Limits
from pagoda.backend.cpu.executor import CpuExecutor
from pagoda.types import StepPlan
from pagoda.weights.open import open_source

pytest.importorskip("torch")
LIMITS = Limits(max_model_len=256, max_num_seqs=80, max_num_batched_tokens=512, num_blocks=800)
RNG = np.random.default_rng(2)
LAST = [(0, -1, -1)]


def ids(count: int) -> list[int]:
    return [int(i) for i in RNG.integers(3, VOCAB, count)]


def logits(path: Path, plans: list[StepPlan], threads: int) -> list[npt.NDArray[np.float32]]:
    source = open_source(str(path))
    limits = replace(LIMITS, threads=threads)
    executor = CpuExecutor.load(load_spec(source), source, limits)
    out = []
    for plan in plans:
        out.append(np.zeros((len(plan.rows), VOCAB), np.float32))
        executor._lib.run(plan, out[-1])
    executor.close()
    return out


def streams(count: int) -> list[StepPlan]:
    """Prompts of different lengths, some of them together, then a token for each, with more rows of logits than fit."""
    prompts = [ids(5 + 7 * i % 60) for i in range(count)]
    blocks = [range(10 * i, 10 * i + 10) for i in range(count)]
    feeds = [Feed(p, blocks=b, rows=[(len(p) - 1, -1, -1)]) for p, b in zip(prompts, blocks, strict=True)]
    steps = [Feed([7], len(p), b, LAST) for p, b in zip(prompts, blocks, strict=True)]
    return [*(make_plan(feeds[i : i + 10], VOCAB) for i in range(0, count, 10)), make_plan(steps, VOCAB)]


def mixed() -> list[StepPlan]:
    """A prompt that lies in several chains, behind streams, and all its logits."""
    prompt, first = ids(150), [Feed(ids(20), blocks=range(i * 4, i * 4 + 4), rows=[(19, -1, -1)]) for i in range(20)]
    later = [Feed([9], 20, feed.blocks, LAST) for feed in first]
    return [
        make_plan(first, VOCAB),
        make_plan([*later, Feed(prompt, blocks=range(200, 212), rows=[(i, -1, -1) for i in range(150)])], VOCAB),
    ]


def shared_prefix(reader_first: bool) -> list[StepPlan]:
    """Requests that read a block of the cache which another one writes in the same step."""
    prefix = ids(32)
    writer = Feed(prefix, blocks=range(2), rows=[(31, -1, -1)])
    readers = [Feed([11 + i], 32, [0, 1, 10 + i], LAST) for i in range(40)]
    return [make_plan([*readers, writer] if reader_first else [writer, *readers], VOCAB)]


@pytest.mark.parametrize("case", ["streams-16", "streams-70", "mixed", "prefix", "prefix-behind"])
def test_threads_change_no_bit(case: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama")
    plans = {
        "streams-16": lambda: streams(16),
        "streams-70": lambda: streams(70),
        "mixed": mixed,
        "prefix": lambda: shared_prefix(False),
        "prefix-behind": lambda: shared_prefix(True),
    }[case]()
    alone = logits(tmp_path, plans, 1)
    assert all(np.isfinite(each).all() and each.any() for each in alone)
    for threads in (2, 3, 4, 9):
        for _ in range(3):
            for one, other in zip(alone, logits(tmp_path, plans, threads), strict=True):
                assert np.array_equal(one, other), threads
