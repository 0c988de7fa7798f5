"""EngineCore: limits, steps, and requests that must not take the engine with them."""

from __future__ import annotations

from typing import Any

import engine_fake as fake
import pytest

from pagoda.engine.core import EngineCore
from pagoda.errors import ConfigError, EngineError, MemoryShort
from pagoda.options.engine_config import EngineConfig
from pagoda.types import Delta, Request, SamplingParams


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Any:
    fake.install(monkeypatch.setattr, **{"raise": 250, "break": 251})
    return lambda **options: EngineCore(EngineConfig(model="fake", **options))


def request(name: str, prompt: list[int], **params: Any) -> Request:
    sampling = SamplingParams(**{"temperature": 0.0, "seed": 1, "max_tokens": 5, **params})
    return Request(request_id=name, prompt_token_ids=prompt, params=sampling)


def run(core: EngineCore) -> dict[str, Delta]:
    """Step until nothing is left; the tokens of each request in one delta, with its end."""
    told: dict[str, Delta] = {}
    for _ in range(1000):
        if not core.has_work:
            return told
        for delta in core.step():
            before = told.get(delta.request_id)
            delta.token_ids = (before.token_ids if before else []) + delta.token_ids
            told[delta.request_id] = delta
    raise AssertionError("the engine does not come to an end")


def test_defaults_are_told(make: Any) -> None:
    info = make().info
    assert (info.max_model_len, info.model_max_len, info.max_num_seqs) == (512, 512, 64)
    assert (info.max_num_batched_tokens, info.num_blocks, info.block_size) == (512, 256, 16)
    assert (info.architecture, info.vocab_size, info.device) == ("fake", fake.VOCAB, "fake")
    assert info.eos_token_ids == (0,) and info.load_s >= 0


def test_step_tokens_grow_with_sequences_and_sequences_shrink_to_step_tokens(make: Any) -> None:
    assert make(max_num_seqs=700).info.max_num_batched_tokens == 700
    assert make(max_num_batched_tokens=8).info.max_num_seqs == 8
    with pytest.raises(ConfigError, match="max-num-seqs 8 or less"):
        make(max_num_seqs=16, max_num_batched_tokens=8)


def test_context_above_the_model_is_refused_with_the_limit(make: Any) -> None:
    with pytest.raises(ConfigError, match="max-model-len 512 or less"):
        make(max_model_len=513)


def test_context_is_reduced_to_what_fits_unless_it_was_asked_for(make: Any) -> None:
    info = make(num_blocks=3).info
    assert (info.max_model_len, info.model_max_len) == (48, 512)
    with pytest.raises(MemoryShort, match="max-model-len 48 or less"):
        make(num_blocks=3, max_model_len=49)
    assert make(num_blocks=3, max_model_len=48).info.max_model_len == 48


def test_requests_run_to_their_end(make: Any) -> None:
    core = make()
    core.add(request("a", [1, 2, 3]))
    core.add(request("b", [9] * 100, temperature=1.0, seed=77))
    told = run(core)
    assert told["a"].token_ids == fake.expected([1, 2, 3], 5)
    assert told["b"].token_ids == fake.expected([9] * 100, 5, 77, 1.0)
    assert {delta.finish_reason for delta in told.values()} == {"length"}
    stats = core.stats()
    assert stats.steps == 5 and stats.scheduler.generation_tokens == 10 and stats.scheduler.blocks_used == 0


@pytest.mark.parametrize(
    ("prompt", "params", "text"),
    [
        ([1] * 513, {}, "513 tokens"),
        ([], {}, "0 tokens"),
        ([1, fake.VOCAB], {}, "outside 0..255"),
        ([-1], {}, "outside 0..255"),
        ([1], {"temperature": float("nan")}, "temperature"),
        ([1], {"logit_bias": {fake.VOCAB: 1.0}}, "logit_bias"),
    ],
)
def test_a_bad_request_ends_with_an_error_and_nothing_is_raised(
    make: Any, prompt: list[int], params: dict[str, Any], text: str
) -> None:
    core = make()
    core.add(request("good", [5]))
    core.add(request("bad", prompt, **params))
    told = run(core)
    assert told["bad"].finish_reason == "error" and text in (told["bad"].error or "")
    assert told["good"].token_ids == fake.expected([5], 5)


def test_an_id_that_is_taken_is_refused(make: Any) -> None:
    core = make()
    core.add(request("a", [5]))
    core.add(request("a", [6]))
    assert next(d.finish_reason for d in core.step() if d.request_id == "a") == "error"


@pytest.mark.parametrize(("token", "text"), [(250, "told to fail"), (251, "failed in a step")])
def test_a_failed_step_ends_its_requests_only(make: Any, token: int, text: str) -> None:
    core = make()
    core.add(request("poison", [token]))
    told = run(core)
    assert told["poison"].finish_reason == "error"
    assert text in (told["poison"].error or "") and "secret" not in (told["poison"].error or "")
    core.add(request("after", [7]))
    assert run(core)["after"].token_ids == fake.expected([7], 5)


def test_cancel_frees_at_once(make: Any) -> None:
    core = make()
    core.add(request("a", [1] * 40, max_tokens=100))
    core.add(request("refused", [-1]))
    core.step()
    core.add(request("refused", [-1]))
    assert core.stats().scheduler.blocks_used == 3
    core.cancel("a")
    core.cancel("refused")
    core.cancel("never heard of")
    assert core.stats().scheduler.blocks_used == 0 and not core.has_work and core.step() == []


def serve(core: EngineCore, between: Any = lambda steps: None) -> dict[str, list[Delta]]:
    """As the engine process does: what came of a step is asked for when the next one has begun."""
    told: dict[str, list[Delta]] = {}
    for steps in range(1000):
        between(steps)
        if not core.has_work:
            return told
        for delta in core.begin():
            told.setdefault(delta.request_id, []).append(delta)
        core.wait()
    raise AssertionError("the engine does not come to an end")


def tokens(deltas: list[Delta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def test_streams_that_go_on_are_told_while_the_next_step_runs(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    core = make()
    for name, count in (("a", 30), ("b", 50), ("c", 50), ("gone", 50)):
        core.add(request(name, [ord(name[0])] * 9, max_tokens=count))
    late: list[int] = []
    tell = core._scheduler.tell
    monkeypatch.setattr(core._scheduler, "tell", lambda: late.append(len(deltas := tell())) or deltas)

    def between(steps: int) -> None:
        if steps == 12:  # a step with it is done, and not told yet
            core.cancel("gone")
        if steps == 20:
            core.add(request("new", [7] * 20, max_tokens=9))

    told = serve(core, between)
    for name, count in (("a", 30), ("b", 50), ("c", 50)):
        assert tokens(told[name]) == fake.expected([ord(name)] * 9, count) and told[name][-1].finish_reason == "length"
    assert tokens(told["gone"]) == fake.expected([ord("g")] * 9, 11) and tokens(told["new"]) == fake.expected(
        [7] * 20, 9
    )
    assert late.count(4) > 8 and late.count(3) > 6, "few steps were launched before the one before was told"
    assert core.stats().scheduler.generation_tokens == 30 + 50 + 50 + 11 + 9 and not core.stats().scheduler.blocks_used


class Failing:
    """A step in flight."""

    def wait(self) -> Any:
        raise EngineError("told to fail")


@pytest.mark.parametrize("at_once", [True, False])
def test_a_step_that_goes_on_and_fails_loses_no_token(
    at_once: bool, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = make()
    for name in ("a", "b", "c"):
        core.add(request(name, [5, 6], max_tokens=50))
    launch, launched = core._executor.launch, list[int]()

    def failing(plan: Any) -> Any:
        launched.append(plan.step)
        if len(launched) == 10:
            return Failing().wait() if at_once else Failing()
        return launch(plan)

    monkeypatch.setattr(core._executor, "launch", failing)
    told = serve(core)
    for deltas in told.values():
        assert tokens(deltas) == fake.expected([5, 6], 9) and deltas[-1].error == "told to fail"
    assert len(told) == 3 and core.stats().scheduler.blocks_used == 0
