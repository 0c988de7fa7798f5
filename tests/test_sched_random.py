"""Random mixes of requests: each gets exactly what it would get alone, whatever happens around it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import product
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sched_fake import VOCAB, Harness, Told, solo

from pagoda.sched.config import SchedulerConfig
from pagoda.types import Request, SamplingParams

SHARED = [[(7 * i + k * 3) % VOCAB for i in range(70)] for k in range(2)]


@dataclass
class Arrival:
    request: Request
    at: int
    cancel_at: int | None = None
    cancel_in_flight: bool = False


@dataclass
class Mix:
    config: SchedulerConfig
    arrivals: list[Arrival]
    ahead: bool
    failing: set[int] = field(default_factory=set)
    poisoned: dict[int, int] = field(default_factory=dict)


def draw_params(rng: Random) -> SamplingParams:
    rare: dict[str, Any] = {
        "min_tokens": rng.randint(0, 5),
        "stop_token_ids": tuple(rng.sample(range(VOCAB), 2)),
        "ignore_eos": True,
        "logprobs": rng.randint(0, 3),
        "prompt_logprobs": rng.randint(0, 3),
        "logprob_token_ids": tuple(rng.sample(range(VOCAB), 3)),
        "presence_penalty": 0.5,
        "repetition_penalty": 1.25,
        "logit_bias": {rng.randrange(VOCAB): -1.0, rng.randrange(VOCAB): 2.0},
        "allowed_token_ids": tuple(rng.sample(range(VOCAB), rng.randint(1, 8))),
        "bad_words_token_ids": (
            (rng.randrange(VOCAB),),
            *((a, b, b ^ 1)[: 2 + b % 2] for a, b in product(range(VOCAB), range(8))),
        ),
    }
    return SamplingParams(
        seed=rng.getrandbits(64),
        max_tokens=rng.choice([0, rng.randint(1, 20), rng.randint(20, 100), rng.randint(20, 100)]),
        temperature=rng.choice([0.0, 0.7, 1.0]),
        top_k=rng.choice([-1, 0, 5]),
        **{name: value for name, value in rare.items() if rng.random() < 0.15},
    )


def draw_request(rng: Random, request_id: str, config: SchedulerConfig) -> Request:
    prompt = SHARED[rng.randint(0, 1)][: rng.choice([rng.randint(0, 20), rng.randint(0, 70)])]
    prompt += [rng.randrange(VOCAB) for _ in range(rng.randint(0, 4))]
    request = Request(
        request_id=request_id,
        prompt_token_ids=prompt or [1],
        params=draw_params(rng),
        eos_token_ids=rng.choice([(), (), (2,), (2, 3)]),
        cache_salt=rng.choice(["", "", "", "other"]),
        priority=rng.choice([0, 0, 1, -1]),
    )
    if rng.random() < 0.15:  # it comes back from an engine that died after some of its tokens
        earlier = solo(request, config).tokens[: rng.randint(1, 20)][:-1]
        request = msgspec.structs.replace(request, output_token_ids=earlier)
    return request


def draw_mix(rng: Random, *, disturbed: bool) -> Mix:
    config = SchedulerConfig(
        num_blocks=rng.choice([rng.randint(1, 4), rng.randint(4, 12), 24]),
        max_num_seqs=rng.randint(1, 8),
        max_num_batched_tokens=rng.choice([rng.randint(1, 16), rng.randint(16, 120), 120]),
        max_model_len=rng.choice([rng.randint(4, 160), 160]),
        vocab_size=VOCAB,
        prefix_caching=rng.random() < 0.85,
    )
    count = rng.randint(1, 10)
    arrivals = [Arrival(draw_request(rng, f"r{i}", config), rng.choice([0, rng.randint(0, 25)])) for i in range(count)]
    mix = Mix(config, arrivals, ahead=rng.random() < 0.5)
    if disturbed:
        for arrival in mix.arrivals:
            if rng.random() < 0.3:
                arrival.cancel_at, arrival.cancel_in_flight = rng.randint(0, 40), rng.random() < 0.5
        mix.failing = {rng.randint(0, 40) for _ in range(rng.randint(0, 2))}
        mix.poisoned = {rng.randint(0, 40): rng.randrange(count) for _ in range(rng.randint(0, 3))}
    if rng.random() < 0.4:
        mix.config = replace(config, recurrent=True, kept_states=rng.choice([0, 1, 2, 6, 20]))
    return mix


def play(mix: Mix) -> Harness:
    """Run a mix to its end. A request may be cancelled before it comes, while it waits or runs, or when it is gone."""
    harness = Harness(mix.config, ahead=mix.ahead, follows=not mix.ahead)
    for now in range(100_000):
        for arrival in mix.arrivals:
            if arrival.at == now:
                harness.add(arrival.request)
        due = [a for a in mix.arrivals if a.cancel_at == now]
        for arrival in due:
            if not arrival.cancel_in_flight:
                harness.cancel(arrival.request.request_id)
        late = [a.request.request_id for a in due if a.cancel_in_flight]
        worked = harness.step(fails=now in mix.failing, poisoned=f"r{mix.poisoned.get(now)}", cancels=late)
        if not worked and now > 40:
            return harness
    raise AssertionError("the scheduler does not come to an end")


def answer(told: Told) -> tuple[object, ...]:
    return told.tokens, told.logprobs, told.prompt_logprobs, told.finish_reason, told.stop_reason


def check_undisturbed(mix: Mix) -> Counter[str]:
    harness = play(mix)
    harness.assert_empty()
    for arrival in mix.arrivals:
        request = arrival.request
        assert answer(harness.told[request.request_id]) == answer(solo(request, mix.config)), request.request_id
    stats = harness.scheduler.stats()
    assert stats.generation_tokens == sum(len(told.tokens) for told in harness.told.values())
    assert stats.prefix_hits_tokens <= stats.prefix_queries_tokens
    counts = Counter(preempted=stats.preemptions, hits=stats.prefix_hits_tokens)
    counts += Counter(ahead=harness.steps_ahead, followed=harness.steps_followed)
    right = counts["right"] = stats.spec_decode_num_accepted_tokens
    counts["wrong"] = stats.spec_decode_num_draft_tokens - right
    counts.update(told.finish_reason for told in harness.told.values() if told.finish_reason)
    return counts


def check_disturbed(mix: Mix) -> Counter[str]:
    harness = play(mix)
    harness.assert_empty()
    counts: Counter[str] = Counter(preempted=harness.scheduler.stats().preemptions)
    counts += Counter(ahead=harness.steps_ahead, followed=harness.steps_followed)
    for arrival in mix.arrivals:
        name = arrival.request.request_id
        told, alone = harness.told[name], solo(arrival.request, mix.config)
        assert told.tokens == alone.tokens[: len(told.tokens)], name
        if name in harness.cancelled:
            counts["cancelled"] += 1
            assert told.finish_reason is None
        elif told.finish_reason == "error" != alone.finish_reason:
            counts["failed" if told.error == "the step failed" else "poisoned"] += 1
        else:
            assert answer(told) == answer(alone) or told.finish_reason == "error", name
    return counts


SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
RNG = st.randoms(use_true_random=False)


@SETTINGS
@given(RNG)
def test_every_request_gets_what_it_gets_alone(rng: Random) -> None:
    check_undisturbed(draw_mix(rng, disturbed=False))


@SETTINGS
@given(RNG)
def test_nothing_leaks_when_requests_are_cancelled_and_steps_fail(rng: Random) -> None:
    check_disturbed(draw_mix(rng, disturbed=True))


@pytest.mark.parametrize("mixes", [100, pytest.param(500, marks=pytest.mark.slow)])
def test_hundreds_of_mixes(mixes: int) -> None:
    seen: Counter[str] = Counter()
    for seed in range(mixes):
        seen += check_undisturbed(draw_mix(Random(f"calm {seed}"), disturbed=False))
        seen += check_disturbed(draw_mix(Random(f"rough {seed}"), disturbed=True))
    print(dict(seen))
    for what in (
        "preempted",
        "hits",
        "stop",
        "length",
        "error",
        "cancelled",
        "failed",
        "poisoned",
        "ahead",
        "followed",
    ):
        assert seen[what] > mixes / 20, f"the mixes do not try {what}"


@pytest.mark.parametrize("ahead", [False, True])
def test_states_of_a_recurrent_model(ahead: bool) -> None:
    """Behind a prompt, behind an output, and where a prefix ends that others share; the longest unused goes."""
    shared, params = [(i * i + 3) % VOCAB for i in range(100)], SamplingParams(seed=1, max_tokens=70, ignore_eos=True)
    harness = Harness(SchedulerConfig(64, 2, 120, 400, VOCAB, recurrent=True, kept_states=4), ahead=ahead)

    def cached(name: str, prompt: list[int]) -> int:
        request = Request(request_id=name, prompt_token_ids=prompt, params=params)
        harness.add(request)
        harness.run()
        assert answer(harness.told[name]) == answer(solo(request, harness.config))
        return harness.told[name].cached_tokens[0]

    assert cached("first", shared + [1] * 30) == 0
    assert cached("again", shared + [1] * 30) == 112  # 122 tokens without the last 8, in blocks of 16
    assert cached("on", shared + [1] * 30 + harness.told["first"].tokens + [2] * 9) == 192  # 200 would be the end
    assert cached("other", shared + [2] * 30) == 0  # no state where they part, yet
    assert cached("another", shared + [3] * 30) == 96
    for i in range(4):
        cached(f"new {i}", [i] * 40)
    assert cached("last", shared + [1] * 30) == 0
    harness.scheduler.check()


@pytest.mark.parametrize("budget", [*range(1, 20), 47, 48, 49, 200])
def test_any_chunk_size_gives_the_same(budget: int) -> None:
    config = SchedulerConfig(64, 4, budget, 200, VOCAB)
    params = SamplingParams(seed=5, max_tokens=20, logprobs=2, prompt_logprobs=1)
    harness = Harness(config)
    request = Request(request_id="a", prompt_token_ids=SHARED[0][:60], params=params)
    harness.add(request)
    harness.run()
    assert harness.plan_sizes[0] == min(budget, 60)
    assert answer(harness.told["a"]) == answer(solo(request, config))
