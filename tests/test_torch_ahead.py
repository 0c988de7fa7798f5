"""Steps launched before the one in flight has its result: the same answers, on the PyTorch executor on the CPU."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import engine_tiny
import pytest
import torch

from pagoda.backend.base import Pending
from pagoda.backend.torch import executor as torch_executor
from pagoda.engine.core import EngineCore
from pagoda.errors import EngineError
from pagoda.options.engine_config import EngineConfig
from pagoda.types import Request, SamplingParams, StepPlan, StepResult

CASES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "drawn": {"top_k": 40, "top_p": 0.9},
    "scored": {"logprobs": 2, "prompt_logprobs": 1},
    "penalties": {"repetition_penalty": 1.3, "temperature": 0.0},
    "stops": {"stop_token_ids": (5, 9, 40, 77, 100, 130, 200), "min_tokens": 3},
    "short": {"max_tokens": 1},
    "bad words": {"temperature": 0.0, "bad_words_token_ids": ((9,), (40,))},
}


@pytest.fixture
def model(tmp_path: Path) -> str:
    return engine_tiny.write(tmp_path)


def core_of(model: str, **changes: Any) -> EngineCore:
    table = {"num_blocks": 40, "max_num_seqs": 4, "max_num_batched_tokens": 24, **changes}
    return EngineCore(EngineConfig(model=model, device="torch-cpu", **table))


def answers(core: EngineCore, cases: dict[str, dict[str, Any]], served: bool = False) -> dict[str, list[Any]]:
    """`served`: as the engine's process works, whose reader stands still now and then."""
    found: dict[str, list[Any]] = {name: [] for name in cases}
    for name, params in cases.items():
        i = list(CASES).index(name)
        prompt = [(11 * i + 7 * j) % 250 + 2 for j in range(10 + 9 * i)]
        sampling = SamplingParams(**{"seed": 7 + i, "max_tokens": 30, **params})
        core.add(Request(request_id=name, prompt_token_ids=prompt, params=sampling))
    for turn in count():
        if not core.has_work:
            return found
        for delta in core.step() if not served else core.begin() if turn % 5 else []:
            found[delta.request_id] += [delta.token_ids, delta.logprobs, delta.prompt_logprobs, delta.finish_reason]
        if served:
            core.wait()
    raise AssertionError("count ends")


class Watched:
    """An executor that notes which plans have tokens of the step before."""

    def __init__(self, core: EngineCore) -> None:
        self.own, self.ahead, self.failing = core._executor, 0, False
        self.capacity = self.own.capacity
        core._executor = self

    def launch(self, plan: StepPlan) -> Pending:
        self.ahead += bool((plan.tokens < 0).any())
        pending = self.own.launch(plan)
        return Failed() if self.failing and self.ahead > 3 else pending

    def prepare(self) -> bool:
        return self.own.prepare()

    def close(self) -> None:
        self.own.close()


class Failed:
    def wait(self) -> StepResult:
        raise EngineError("the step failed")


def test_answers_are_those_of_one_step_after_the_other(model: str) -> None:
    one = core_of(model)
    one._ahead = False
    expected = answers(one, CASES)
    for names in (["greedy", "drawn", "stops", "short"], list(CASES)):
        core = core_of(model)
        watched = Watched(core)
        assert answers(core, {name: CASES[name] for name in names}) == {name: expected[name] for name in names}
        assert watched.ahead > 10
        assert core.stats().scheduler.blocks_used == 0


@pytest.mark.parametrize("blocks", [40, 5, 4])
def test_streams_that_go_on_where_blocks_run_out(model: str, blocks: int) -> None:
    """The step behind one in flight is not planned then, and what came before it is applied first."""
    cases = {name: {**CASES[name], "ignore_eos": True} for name in ("greedy", "drawn")}
    one = core_of(model)
    one._ahead = False
    expected = answers(one, cases)
    core = core_of(model, num_blocks=blocks)
    assert answers(core, cases, served=True) == expected
    assert core.stats().scheduler.blocks_used == 0


def test_a_run_of_tokens_that_must_not_come_is_seen_across_steps(model: str) -> None:
    """The step behind one in flight would not know what the last token was: it waits."""
    plain = answers(core_of(model), {"greedy": {"temperature": 0.0, "ignore_eos": True}})["greedy"]
    tokens = [token for piece in plain[::4] for token in piece]
    run = tuple(tokens[9:12])
    cut = {"temperature": 0.0, "ignore_eos": True, "bad_words_token_ids": (run,)}
    core = core_of(model)
    made = [token for piece in answers(core, {"greedy": cut})["greedy"][::4] for token in piece]
    assert made[:11] == tokens[:11] and made[11] != tokens[11] and len(made) == 30
    assert run not in zip(made, made[1:], made[2:], strict=False)


def test_a_failed_step_takes_the_one_behind_it_along(model: str) -> None:
    core = core_of(model)
    watched = Watched(core)
    watched.failing = True
    ends = list(answers(core, {"greedy": {}, "drawn": {}}).values())
    assert [entry[-1] for entry in ends] == ["error", "error"]
    watched.failing = False
    assert answers(core, {"greedy": {}})["greedy"][-1] in ("stop", "length")


def test_a_step_cut_in_halves_tells_its_tokens_to_the_next(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = answers(core_of(model), CASES)
    core = core_of(model)
    own = torch_executor.TorchExecutor._computed

    def short_of_memory(self: Any, plan: StepPlan, *rest: Any) -> Pending:
        if len(plan.tokens) > 2:
            raise torch.OutOfMemoryError
        return own(self, plan, *rest)

    monkeypatch.setattr(torch_executor.TorchExecutor, "_computed", short_of_memory)
    assert answers(core, CASES) == expected
