"""An engine whose model is a hash of the tokens in its cache: exact, fast, and able to die on command.

As a program: `engine_fake.py [step_s=0.01] [kill=TOKEN] [hang=TOKEN] [raise=TOKEN] FD` is the engine process.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import zlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

import pagoda.engine.core as core
from pagoda.arch.spec import ModelSpec, Rope
from pagoda.backend.base import Capacity, Due, Limits
from pagoda.engine.process import main
from pagoda.errors import EngineError, MemoryShort
from pagoda.types import BLOCK_SIZE, StepPlan, StepResult

VOCAB = 256
EOS = 0
MAX_POSITION = 512
DEFAULT_BLOCKS = 256


def next_token(tokens: list[int], seed: int, temperature: float) -> int:
    """The token behind these: never EOS, and 250 to 255 are left to prompts, as triggers."""
    drawn = seed if temperature > 0 else 0
    data = np.asarray([*tokens, drawn % 2**32], np.uint32).tobytes()
    return 1 + zlib.crc32(data) % 249


def expected(prompt: list[int], count: int, seed: int = 0, temperature: float = 0.0) -> list[int]:
    known = list(prompt)
    for _ in range(count):
        known.append(next_token(known, seed, temperature))
    return known[len(prompt) :]


class FakeExecutor:
    """Keeps tokens where keys and values would be, and reads them back through the block tables."""

    def __init__(self, limits: Limits, **behaviour: float) -> None:
        blocks = DEFAULT_BLOCKS if limits.num_blocks is None else limits.num_blocks
        self.capacity = Capacity(blocks, weight_bytes=1000, kv_bytes=10, activation_bytes=1, device="fake")
        self._cells = np.zeros((blocks, BLOCK_SIZE), np.int64)
        self._behaviour = behaviour

    def launch(self, plan: StepPlan) -> Due:
        return Due(lambda: self._run(plan))

    def _run(self, plan: StepPlan) -> StepResult:
        time.sleep(self._behaviour.get("step_s", 0.0))
        self._misbehave(plan)
        for r in range(len(plan.slots)):
            fed = plan.tokens[plan.starts[r] : plan.starts[r + 1]]
            places = np.arange(plan.positions[r], plan.positions[r] + len(fed))
            self._cells[plan.block_tables[plan.slots[r], places // BLOCK_SIZE], places % BLOCK_SIZE] = fed
        tokens = np.zeros(len(plan.rows), np.int32)
        for row, (r, at) in enumerate(zip(plan.row_request, plan.rows, strict=True)):
            places = np.arange(plan.positions[r] + at - plan.starts[r] + 1)
            known = self._cells[plan.block_tables[plan.slots[r], places // BLOCK_SIZE], places % BLOCK_SIZE]
            target = int(plan.row_target[row])
            drawn = next_token(known.tolist(), int(plan.seed[r]), float(plan.temperature[r]))
            tokens[row] = drawn if target < 0 else target
        width = max(0, int(plan.row_top.max(initial=0)))
        top_ids = np.tile(tokens[:, None], (1, width)).astype(np.int32)
        logprobs = (-tokens / 7).astype(np.float32)
        top = np.tile(logprobs[:, None], (1, width)).astype(np.float32)
        return StepResult(tokens, logprobs, top_ids, top, np.ones(len(tokens), np.uint8))

    def _misbehave(self, plan: StepPlan) -> None:
        if self._behaviour.get("kill") in plan.tokens:
            os.kill(os.getpid(), signal.SIGKILL)
        if self._behaviour.get("hang") in plan.tokens:
            time.sleep(3600)
        if self._behaviour.get("raise") in plan.tokens:
            raise EngineError("the fake was told to fail")
        if self._behaviour.get("break") in plan.tokens:
            raise ZeroDivisionError("secret text of a library")

    def prepare(self) -> bool:
        return False

    def close(self) -> None:
        pass


def spec() -> ModelSpec:
    rope = Rope(dim=2, inv_freq=(1.0,))
    return ModelSpec("fake", VOCAB, 8, 1e-5, True, MAX_POSITION, rope, (), eos_token_ids=(EOS,))


def install(patch: Callable[[Any, str, Any], None], **behaviour: float) -> None:
    """Put the fake where EngineCore looks for a model and an executor."""
    source = SimpleNamespace(path="fake", metadata={}, config={}, tensors={}, close=lambda: None)

    def load(device: str, spec: Any, source: Any, limits: Limits, progress: Any = None) -> FakeExecutor:
        if device == "short":
            raise MemoryShort("the fake has no memory", remedy="use --fake-memory")
        for share in (0.0, 1.0):
            if progress is not None:
                progress("weights", share)
            time.sleep(behaviour.get("load_s", 0.0) / 2)
        return FakeExecutor(limits, **behaviour)

    patch(core, "open_model", lambda path, load_format, task, mmproj=None: source)
    patch(core, "load_spec", lambda source, task: spec())
    patch(core, "load_executor", load)


def command(**behaviour: float) -> list[str]:
    return [sys.executable, __file__, *(f"{name}={value}" for name, value in behaviour.items())]


if __name__ == "__main__":
    told = dict(word.split("=", 1) for word in sys.argv[1:-1])
    install(setattr, **{name: float(value) for name, value in told.items()})
    sys.exit(main([sys.argv[0], sys.argv[-1]]))
