"""Prompts beside running streams: cut by time, from what steps cost on this machine as it was measured."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from sched_fake import Harness, harness, request, solo

from pagoda.sched.pace import LinearCost, Load, Pace
from pagoda.types import BLOCK_SIZE

TARGET_S = 0.05


class Machine:
    """A harness with a clock: a step takes what a machine would, with noise, and the scheduler is told."""

    def __init__(
        self, speed: float = 1.0, *, noise: float = 0.1, target_s: float | None = TARGET_S, **config: Any
    ) -> None:
        self.h: Harness = harness(
            num_blocks=1024,
            max_num_seqs=32,
            max_num_batched_tokens=512,
            max_model_len=4096,
            step_time_target_s=target_s,
            **config,
        )
        self.speed, self.noise, self.rng = speed, noise, Random(1)
        self.clock_s = 0.0
        self.steps: list[tuple[dict[str, int], float]] = []

    def step(self, share: float = 1.0) -> bool:
        planned = self.h.plan()
        if planned is None:
            return False
        plan, names = planned
        counts = [int(end - start) for start, end in zip(plan.starts, plan.starts[1:], strict=False)]
        pairs = sum(count * (int(first) + count / 2) for first, count in zip(plan.positions, counts, strict=True))
        # 135M on two cores: 3 ms to stream the weights, 0.65 ms a token, 0.15 ms a row of logits, attention
        seconds = (0.003 + 0.00065 * sum(counts) + 0.00015 * len(plan.rows) + 2.5e-7 * pairs) * self.speed / share
        seconds *= 1 + self.noise * self.rng.random()
        self.h.finish(plan, names)
        self.h.scheduler.observe(plan, seconds)
        self.clock_s += seconds
        self.steps.append((dict(zip(names, counts, strict=True)), seconds))
        return True

    def run_until(self, done: Callable[[], bool]) -> None:
        while not done():
            assert self.step()

    def run(self) -> None:
        while self.step():
            pass

    def finished(self, name: str) -> bool:
        return self.h.told[name].finish_reason is not None

    def pauses_s(self, name: str) -> list[float]:
        return [seconds for counts, seconds in self.steps if name in counts]


def stream_and_long_prompt(
    speed: float, *, prompt: int = 2000, target_s: float | None = TARGET_S
) -> tuple[Machine, list[float]]:
    m = Machine(speed, target_s=target_s)
    m.h.add(request("stream", 20, max_tokens=1000))
    for _ in range(20):
        m.step()
    before = len(m.steps)
    m.h.add(request("long", prompt, first=7, max_tokens=2))
    m.run_until(lambda: m.finished("long"))
    assert all("stream" in counts for counts, _ in m.steps[before:])
    return m, m.pauses_s("stream")[before:]


@pytest.mark.parametrize("speed", [0.3, 1.0, 2.0])
def test_a_stream_keeps_its_pace_while_a_long_prompt_comes_in(speed: float) -> None:
    m, pauses_s = stream_and_long_prompt(speed)
    assert max(pauses_s) < 0.06
    chunks = [counts["long"] for counts, _ in m.steps if counts.get("long", 0) > 1]
    assert all(chunk % BLOCK_SIZE == 0 for chunk in chunks[:-1])
    assert sum(pauses_s) / len(pauses_s) > 0.6 * TARGET_S, "the time that is allowed is used"


def test_without_a_target_a_prompt_takes_the_whole_step() -> None:
    _, pauses_s = stream_and_long_prompt(1.0, target_s=None)
    assert max(pauses_s) > 0.3


def test_answers_do_not_depend_on_timing() -> None:
    for speed in (0.3, 1.0, 5.0):
        m, _ = stream_and_long_prompt(speed, prompt=300)
        m.run()
        for name, wanted in m.h.requests.items():
            assert m.h.told[name].tokens == solo(wanted, m.h.config).tokens


def test_a_machine_too_slow_for_the_target_still_reads_prompts() -> None:
    m, pauses_s = stream_and_long_prompt(40.0, prompt=400)
    chunks = [counts["long"] for counts, _ in m.steps if counts.get("long", 0) > 1]
    assert min(chunks) >= BLOCK_SIZE
    assert max(pauses_s) < 0.8, "one block, or twice the time of the streams alone"


def test_nothing_is_cut_while_nothing_streams() -> None:
    m = Machine()
    m.h.add(request("warm", 20, max_tokens=3))
    m.run_until(lambda: m.finished("warm"))
    m.h.add(request("a", 600, first=3))
    m.h.add(request("b", 600, first=5))
    m.step()
    assert m.steps[-1][0] == {"a": 512}


def test_prompts_beside_a_stream_come_one_after_the_other() -> None:
    m = Machine(noise=0)
    m.h.add(request("stream", 20, max_tokens=500))
    for _ in range(5):
        m.step()
    m.h.add(request("a", 200, first=3, max_tokens=1))
    m.h.add(request("b", 200, first=5, max_tokens=1))
    m.run_until(lambda: m.finished("b"))
    both = [counts for counts, _ in m.steps if "a" in counts and "b" in counts]
    assert len(both) <= 1 and m.h.scheduler.stats().waiting == 0
    assert len([c for c, _ in m.steps if "a" in c]) < 6


def test_a_core_that_is_taken_for_a_while_makes_chunks_small_and_they_grow_again() -> None:
    m = Machine()
    m.h.add(request("stream", 20, max_tokens=2000))
    for name, share in (("calm", 1.0), ("busy", 0.5), ("again", 1.0)):
        m.h.add(request(name, 1500, first=len(name), max_tokens=1, cache_salt=name))
        while not m.finished(name):
            m.step(share)
    usual = {name: [c[name] for c, _ in m.steps if name in c] for name in ("calm", "busy", "again")}
    third = {name: chunks[len(chunks) // 3] for name, chunks in usual.items()}
    assert third["busy"] < 0.75 * third["calm"]
    assert third["again"] > 0.7 * third["calm"]


def finish_all_s(target_s: float | None, requests: int = 16, prompt: int = 128, answer: int = 128) -> float:
    m = Machine(target_s=target_s)
    m.h.add(request("warm", 300, max_tokens=30, cache_salt="warm"))
    m.run_until(lambda: m.finished("warm"))
    started_s = m.clock_s
    for i in range(requests):
        m.h.add(request(f"r{i}", prompt, first=i, seed=i, max_tokens=answer, cache_salt=str(i)))
    m.run()
    return m.clock_s - started_s


@pytest.mark.parametrize("requests", [16, 32])
def test_many_requests_at_once_are_hardly_slower_for_it(requests: int) -> None:
    ratio = finish_all_s(TARGET_S, requests) / finish_all_s(None, requests)
    print(f"{requests} requests of 128 + 128 tokens take {ratio:.3f} of the time without a target")
    assert ratio < 1.05


def test_only_the_last_step_can_be_observed() -> None:
    h = harness()
    h.add(request("a", 20))
    got = h.plan()
    assert got is not None
    with pytest.raises(ValueError, match="not the last step"):
        h.scheduler.observe(got[0], 0.1)
    h.finish(*got)
    h.scheduler.observe(got[0], 0.1)
    with pytest.raises(ValueError, match="not the last step"):
        h.scheduler.observe(got[0], 0.1)


def test_costs_are_found_and_never_negative() -> None:
    fit, rng = LinearCost(3, 0.95), Random(3)
    for _ in range(300):
        tokens, pairs = rng.randint(1, 300), rng.randint(0, 100_000)
        fit.learn((0.01 + 0.001 * tokens) * (1 + rng.uniform(-0.02, 0.02)), 1, tokens, pairs)
        assert min(fit.costs) >= 0
    assert fit.predict(1, 100, 0) == pytest.approx(0.11, rel=0.05)
    assert fit.predict(1, 10, 50_000) == pytest.approx(0.02, rel=0.15)


def test_one_slow_step_does_not_undo_what_is_known() -> None:
    fit = LinearCost(1, 0.9)
    for _ in range(20):
        fit.learn(0.01, 1)
    fit.learn(5.0, 1)
    assert fit.predict(1) < 0.02


def test_nothing_is_limited_before_anything_was_measured() -> None:
    pace, load = Pace(TARGET_S), Load()
    load.add_stream(100)
    assert pace.prompt_tokens(load, 0) > 10**6


def test_a_machine_that_others_use_gets_smaller_chunks_at_once() -> None:
    """Work takes three times as long: prompts are cut accordingly from the first on, but not for one slow step."""
    pace, alone, load = Pace(TARGET_S), Load(), Load()
    alone.add_stream(100)
    load.add_stream(100)
    load.add_prompt(0, 64)
    for _ in range(8):
        pace.observe(load, 0.032, 0.064)  # two threads
        pace.observe(alone, 0.004, 0.008)
    before = pace.prompt_tokens(alone, 0)
    pace.observe(alone, 0.1, 0.008)
    assert pace.prompt_tokens(alone, 0) == before
    for _ in range(3):
        pace.observe(alone, 0.012, 0.008)
    assert before / 4 < pace.prompt_tokens(alone, 0) < before / 2
    for _ in range(3):
        pace.observe(alone, 0.004, 0.008)
    assert pace.prompt_tokens(alone, 0) == before
