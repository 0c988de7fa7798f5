"""Random mixes of requests: each gets exactly what it would get alone, whatever happens around it."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sched_fake import VOCAB, Harness, Told, solo

from pagoda.sched.scheduler import SchedulerConfig
from pagoda.types import Request, SamplingParams

SHARED = [[(7 * i + k * 3) % VOCAB for i in range(70)] for k in range(2)]


@dataclass
class Arrival:
    request: Request
    at: int
    cancel_at: int | None
    cancel_in_flight: bool
    resumes_after: int | None


@dataclass
class Mix:
    config: SchedulerConfig
    arrivals: list[Arrival]
    failing: set[int]
    poisoned: dict[int, int]


def one_in(n: int, value: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    """Usually None, so that plain requests stay common and examples small."""
    return st.integers(0, n - 1).flatmap(lambda i: value if i == n - 1 else st.none())


TOKEN = st.integers(0, VOCAB - 1)
PARAMS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**64 - 1),
        "max_tokens": st.integers(0, 60),
        "temperature": st.sampled_from([0.0, 0.7, 1.0]),
        "top_k": st.sampled_from([-1, 0, 5]),
    },
    optional={
        "min_tokens": st.integers(0, 5),
        "stop_token_ids": st.lists(TOKEN, max_size=2).map(tuple),
        "ignore_eos": st.booleans(),
        "logprobs": st.integers(0, 3),
        "prompt_logprobs": st.integers(0, 3),
        "presence_penalty": st.sampled_from([0.0, 0.5]),
        "repetition_penalty": st.sampled_from([1.0, 1.25]),
        "logit_bias": st.dictionaries(TOKEN, st.sampled_from([-1.0, 2.0]), max_size=2),
        "allowed_token_ids": st.lists(TOKEN, min_size=1, max_size=8, unique=True).map(tuple),
    },
)


@st.composite
def arrivals(draw: st.DrawFn) -> Arrival:
    prompt = SHARED[draw(st.integers(0, 1))][: draw(st.integers(0, 70))] + draw(st.lists(TOKEN, max_size=4))
    request = Request(
        request_id="",
        prompt_token_ids=prompt or [1],
        params=SamplingParams(**draw(PARAMS)),
        eos_token_ids=draw(st.sampled_from([(), (2,), (2, 3)])),
        cache_salt=draw(st.sampled_from(["", "", "other"])),
        priority=draw(st.sampled_from([0, 0, 1, -1])),
    )
    cancel_at, resumes_after = draw(one_in(6, st.integers(0, 30))), draw(one_in(6, st.integers(1, 20)))
    return Arrival(request, draw(st.integers(0, 25)), cancel_at, draw(st.booleans()), resumes_after)  # type: ignore[arg-type]


@st.composite
def mixes(draw: st.DrawFn, disturbed: bool) -> Mix:
    config = SchedulerConfig(
        num_blocks=draw(st.integers(1, 24)),
        max_num_seqs=draw(st.integers(1, 6)),
        max_num_batched_tokens=draw(st.one_of(st.integers(1, 16), st.integers(16, 120))),
        max_model_len=draw(st.integers(4, 160)),
        vocab_size=VOCAB,
        prefix_caching=draw(st.integers(0, 4)) > 0,
    )
    mix = Mix(config, draw(st.lists(arrivals(), min_size=1, max_size=10)), set(), {})
    if disturbed:
        mix.failing = draw(st.sets(st.integers(1, 40), max_size=2))
        mix.poisoned = draw(st.dictionaries(st.integers(1, 40), st.integers(0, 9), max_size=3))
    else:
        for arrival in mix.arrivals:
            arrival.cancel_at = None
    return mix


def resumed(request: Request, after: int | None, config: SchedulerConfig) -> Request:
    """The request as it comes back from an engine that died after some of its tokens."""
    if after is None:
        return request
    told = solo(request, config)
    return msgspec.structs.replace(request, output_token_ids=told.tokens[: min(after, len(told.tokens) - 1)])


def play(mix: Mix) -> tuple[Harness, dict[str, Request]]:
    harness = Harness(mix.config)
    requests = {}
    for i, arrival in enumerate(mix.arrivals):
        request = msgspec.structs.replace(arrival.request, request_id=f"r{i}")
        requests[f"r{i}"] = resumed(request, arrival.resumes_after, mix.config)
    for now in range(100_000):
        for i, arrival in enumerate(mix.arrivals):
            if arrival.at == now:
                harness.add(requests[f"r{i}"])
        due = {f"r{i}": arrival for i, arrival in enumerate(mix.arrivals) if arrival.cancel_at == now}
        due = {name: a for name, a in due.items() if a.at <= now and harness.told[name].finish_reason is None}
        for name, arrival in due.items():
            if not arrival.cancel_in_flight:
                harness.cancel(name)
        late = [name for name, arrival in due.items() if arrival.cancel_in_flight]
        worked = harness.step(fails=now in mix.failing, poisoned=f"r{mix.poisoned.get(now)}", cancels=late)
        if not worked:
            for name in late:
                harness.cancel(name)
            if now > 40:
                return harness, requests
    raise AssertionError("the scheduler does not come to an end")


def same(told: Told, alone: Told) -> bool:
    return (told.tokens, told.logprobs, told.prompt_logprobs, told.finish_reason, told.stop_reason) == (
        alone.tokens,
        alone.logprobs,
        alone.prompt_logprobs,
        alone.finish_reason,
        alone.stop_reason,
    )


SETTINGS = settings(max_examples=1200, deadline=None, suppress_health_check=list(HealthCheck))


@SETTINGS
@given(mixes(disturbed=False))
def test_every_request_gets_what_it_gets_alone(mix: Mix) -> None:
    harness, requests = play(mix)
    harness.assert_empty()
    for name, request in requests.items():
        assert same(harness.told[name], solo(request, mix.config)), name
    new = [r for r in requests.values() if not r.output_token_ids and harness.told[r.request_id].tokens]
    stats = harness.scheduler.stats()
    assert stats.generation_tokens == sum(len(told.tokens) for told in harness.told.values())
    assert stats.prompt_tokens >= sum(len(r.prompt_token_ids) for r in new)
    assert stats.prefix_hits_tokens <= stats.prefix_queries_tokens


@SETTINGS
@given(mixes(disturbed=True))
def test_nothing_leaks_when_requests_are_cancelled_and_steps_fail(mix: Mix) -> None:
    harness, requests = play(mix)
    harness.assert_empty()
    for name, request in requests.items():
        told, alone = harness.told[name], solo(request, mix.config)
        disturbed = name in harness.cancelled or told.finish_reason == "error"
        assert (told.finish_reason is None) == (name in harness.cancelled), "each ends once, or is cancelled"
        assert told.tokens == alone.tokens[: len(told.tokens)]
        assert disturbed or same(told, alone), name


@pytest.mark.parametrize("budget", [*range(1, 20), 47, 48, 49, 200])
def test_any_chunk_size_gives_the_same(budget: int) -> None:
    config = SchedulerConfig(64, 4, budget, 200, VOCAB)
    params = SamplingParams(seed=5, max_tokens=20, logprobs=2, prompt_logprobs=1)
    harness = Harness(config)
    request = Request(request_id="a", prompt_token_ids=SHARED[0][:60], params=params)
    harness.add(request)
    harness.run()
    assert same(harness.told["a"], solo(request, config))
