"""Drafts by prompt lookup change nothing but the number of steps."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from sched_fake import VOCAB, Harness, harness, request, solo
from test_sched_pace import Machine
from test_sched_random import RNG, SETTINGS, Mix, check_disturbed, check_undisturbed, draw_mix

from pagoda.errors import ConfigError
from pagoda.options.config import Options
from pagoda.options.speculation import Speculation, speculation_from
from pagoda.sched.draft import Drafter, Speculator
from pagoda.sched.pace import Load, Pace
from pagoda.types import BLOCK_SIZE

ALWAYS = Speculation(num_tokens=5, lookup_max=3, lookup_min=1, always=True)


def draw_repetitive(rng: Random, *, disturbed: bool) -> Mix:
    """A mix in which most requests choose from so few tokens that drafts are often right, and often wrong."""
    mix = draw_mix(rng, disturbed=disturbed)
    config = replace(mix.config, recurrent=False, kept_states=0)
    config = replace(config, speculation=msgspec.structs.replace(ALWAYS, num_tokens=rng.randint(1, 40)))
    for arrival in mix.arrivals:
        if rng.random() < 0.8 and not arrival.request.output_token_ids:
            few = tuple(rng.sample(range(VOCAB), rng.choice([1, 2, 2, 3])))
            params = msgspec.structs.replace(arrival.request.params, allowed_token_ids=few)
            arrival.request = msgspec.structs.replace(arrival.request, params=params)
    return replace(mix, config=config)


@SETTINGS
@given(RNG)
def test_every_request_gets_what_it_gets_alone(rng: Random) -> None:
    check_undisturbed(draw_repetitive(rng, disturbed=False))


@SETTINGS
@given(RNG)
def test_nothing_leaks_when_requests_are_cancelled_and_steps_fail(rng: Random) -> None:
    check_disturbed(draw_repetitive(rng, disturbed=True))


@pytest.mark.parametrize("mixes", [40, pytest.param(150, marks=pytest.mark.slow)])
def test_hundreds_of_mixes(mixes: int) -> None:
    seen: Counter[str] = Counter()
    for seed in range(mixes):
        seen += check_undisturbed(draw_repetitive(Random(f"calm {seed}"), disturbed=False))
        seen += check_disturbed(draw_repetitive(Random(f"rough {seed}"), disturbed=True))
    print(dict(seen))
    for what in ("preempted", "hits", "stop", "length", "error", "cancelled", "failed", "poisoned", "right", "wrong"):
        assert seen[what] > mixes / 20, f"the mixes do not try {what}"


def one(prompt: int | list[int] = 20, *, config: Speculation | None = ALWAYS, **params: Any) -> Harness:
    h = harness(speculation=config)
    h.add(request("a", prompt, **{"max_tokens": 40, "allowed_token_ids": (7,), **params}))
    h.run()
    told, alone = h.told["a"], solo(h.requests["a"], h.config)
    assert (told.tokens, told.logprobs, told.finish_reason) == (alone.tokens, alone.logprobs, alone.finish_reason)
    return h


def test_a_repetition_takes_a_few_steps() -> None:
    h = one(logprobs=2)
    stats = h.scheduler.stats()
    assert h.steps <= 11 and stats.generation_tokens == 40
    assert stats.spec_decode_num_drafts >= 6
    assert stats.spec_decode_num_accepted_tokens == 40 - h.steps
    assert stats.spec_decode_num_accepted_tokens <= stats.spec_decode_num_draft_tokens


def test_off_means_off() -> None:
    h = one(config=None)
    assert h.steps == 40 and h.scheduler.stats().spec_decode_num_draft_tokens == 0


@pytest.mark.parametrize(
    "params", [{"presence_penalty": 0.1}, {"repetition_penalty": 1.1}, {"min_tokens": 40, "stop_token_ids": (3,)}]
)
def test_where_sampling_depends_on_the_tokens_before_nothing_is_tried(params: dict[str, Any]) -> None:
    h = one(**params)
    assert h.steps == 40 and h.scheduler.stats().spec_decode_num_drafts == 0


def test_after_min_tokens_drafts_are_tried() -> None:
    h = one(min_tokens=20, stop_token_ids=(3,))
    assert 20 < h.steps < 30


def test_a_stop_token_inside_an_accepted_run_ends_the_request_there() -> None:
    tail = [1, 2, 3, 4, 5, 6, 7, 8]
    seen = 0
    for seed in range(60):
        h = one([*tail, *tail, *tail, 1], allowed_token_ids=(2, 3, 4), stop_token_ids=(3,), seed=seed)
        told = h.told["a"]
        assert told.finish_reason == "length" or (told.tokens[-1] == 3 and 3 not in told.tokens[:-1])
        seen += len(told.tokens) > h.steps
    assert seen > 5


def test_max_tokens_is_met_exactly_and_blocks_of_drafts_are_given_back() -> None:
    for count in range(1, 30):
        h = one(max_tokens=count)
        assert len(h.told["a"].tokens) == count
        h.assert_empty()


def test_blocks_filled_by_right_drafts_are_found_again_and_no_block_of_wrong_ones() -> None:
    h = one(max_tokens=60)
    h.add(request("b", h.known("a"), allowed_token_ids=(7,)))
    h.run()
    assert h.told["b"].cached_tokens[0] == (20 + 60 - 1) // BLOCK_SIZE * BLOCK_SIZE
    config = harness(speculation=ALWAYS)
    for seed in range(30):  # wrong drafts often; the harness compares the tokens of all that is read
        config.add(request(f"x{seed}", 20, seed=seed, max_tokens=50, allowed_token_ids=(1, 2)))
        config.run()
        config.add(request(f"y{seed}", config.known(f"x{seed}"), allowed_token_ids=(1, 2)))
        config.run()
        assert config.told[f"y{seed}"].cached_tokens[0] >= 64


def test_no_stream_is_pushed_out_for_a_draft() -> None:
    plain, drafting = harness(num_blocks=12), harness(num_blocks=12, speculation=ALWAYS)
    for h in (plain, drafting):
        for i in range(3):
            h.add(request(f"r{i}", 20, first=i, max_tokens=44, allowed_token_ids=(7,)))
        h.run()
        assert h.scheduler.stats().preemptions == 0
    assert drafting.steps < plain.steps / 2


def test_drafts_wait_while_a_prompt_comes_in() -> None:
    h = harness(speculation=ALWAYS, max_num_batched_tokens=40)
    h.add(request("stream", 20, max_tokens=100, allowed_token_ids=(7,)))
    for _ in range(6):
        h.planned()
    h.add(request("prompt", 70, first=9))
    assert h.planned() == {"stream": 1, "prompt": 39}
    assert h.planned() == {"stream": 1, "prompt": 31}
    assert h.planned()["stream"] == 6


# drafts


def test_the_longest_and_latest_match_is_used_and_repetitions_go_round() -> None:
    drafter = Drafter(Speculation(lookup_max=3, lookup_min=1))
    known = [1, 2, 3, 50, 9, 2, 3, 60, 1, 2, 3]
    assert drafter.guess(known, 3) == [50, 9, 2]
    known += [60, 2, 3]
    assert drafter.guess(known, 2) == [60, 2]
    assert drafter.guess([*known, 99], 4) == []
    assert Drafter(ALWAYS).guess([5, 8, 5, 8, 5], 5) == [8, 5, 8, 5, 8]


def test_a_long_prompt_is_read_over_several_steps() -> None:
    drafter, known = Drafter(ALWAYS), [i % 7 for i in range(2500)]
    assert drafter.guess(known, 2) == [] and drafter.guess(known, 2) == []
    assert drafter.guess(known, 2) == [2500 % 7, 2501 % 7]


def test_the_rate_follows_what_came_true() -> None:
    drafter, known = Drafter(ALWAYS), [1, 2, 3] * 4
    for _ in range(10):
        drafter.guess(known, 3)
        drafter.hear([1])
    assert drafter.rate > 0.9
    for _ in range(10):
        drafter.guess(known, 3)
        drafter.hear([9, 1, 2])
    assert drafter.rate < 0.15


def speculator(one_s: float, each_s: float, kind: Speculation | None = None) -> Speculator:
    pace = Pace(None)
    for count in [1, 1, 9, 1, 5, 1, 1] * 4:
        load = Load()
        load.add_stream(100, count)
        pace.observe(load, one_s + each_s * (count - 1))
    return Speculator(kind or Speculation(), pace)


@pytest.mark.parametrize(
    "rate, each_s, low, high",
    [(0.95, 0.0005, 6, 8), (0.6, 0.0005, 2, 5), (0.1, 0.001, 0, 0), (0.95, 0.0048, 0, 0), (0.5, 0.001, 1, 3)],
)
def test_as_many_drafts_as_pay(rate: float, each_s: float, low: int, high: int) -> None:
    drafter, load = Drafter(Speculation()), Load()
    drafter.rate = rate
    load.add_stream(100)
    assert low <= len(speculator(0.005, each_s).draft(drafter, [4, 5, 6] * 10, 8, load)) <= high


def test_before_anything_was_measured_nothing_is_tried() -> None:
    load = Load()
    load.add_stream(100)
    assert Speculator(Speculation(), Pace(None)).draft(Drafter(ALWAYS), [4, 5, 6] * 10, 8, load) == []


@pytest.mark.parametrize(
    "rate, round_s, low, high", [(0.9, 0.0005, 4, 8), (0.7, 0.0015, 1, 3), (0.9, 0.005, 0, 0), (0.2, 0.0015, 0, 0)]
)
def test_a_draft_model_guesses_as_much_as_pays(rate: float, round_s: float, low: int, high: int) -> None:
    model, load = Speculation(model="/m"), Load()
    drafters = [Drafter(model), Drafter(model)]
    for drafter in drafters:
        drafter.rate = rate
        load.add_stream(100)
    each = speculator(0.005, 0.0005, model)
    assert each.tokens_ahead(drafters, load) == 8, "it is tried before its price is known"
    each.observe([(2, round_s)] * 5)
    assert low <= each.tokens_ahead(drafters, load) <= high


def test_a_text_that_was_hard_to_guess_is_tried_again() -> None:
    drafter = Drafter(Speculation(model="/m"))
    for _ in range(40):
        drafter.take([1, 2])
        drafter.hear([3])
    assert drafter.rate < 0.05
    for _ in range(200):
        drafter.take([])
        drafter.hear([3])
    assert drafter.rate > 0.5


def test_by_itself_it_is_quicker_where_text_repeats_and_never_slower() -> None:
    for allowed, low, high in [((7,), 0.0, 0.6), ((7, 8), 0.0, 1.03), (tuple(range(VOCAB)), 0.97, 1.03)]:
        seconds = {}
        for speculation in (Speculation(), None):
            m = Machine(target_s=None, speculation=speculation)
            for name in "abc":
                m.h.add(request(name, 40, seed=ord(name), max_tokens=300, allowed_token_ids=allowed))
                m.run()
                told = m.h.told[name]
                assert told.tokens == solo(m.h.requests[name], m.h.config).tokens
            seconds[speculation] = m.clock_s
        ratio = seconds[Speculation()] / seconds[None]
        print(f"{len(allowed)} tokens to choose from: {ratio:.3f} of the time without drafts")
        assert low <= ratio <= high


def test_by_itself_it_is_off_with_many_streams() -> None:
    h = harness(speculation=Speculation())
    for i in range(3):
        h.add(request(f"r{i}", 20, first=i, max_tokens=20, allowed_token_ids=(7,)))
    while planned := h.plan():
        h.finish(*planned)
        h.scheduler.observe(planned[0], 0.01)
    assert h.scheduler.stats().spec_decode_num_drafts == 0


# the option


def test_the_option() -> None:
    assert Options().engine_config("m").speculation == Speculation()
    given = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 6, "prompt_lookup_min": 2}
    wanted = Speculation(num_tokens=3, lookup_max=6, lookup_min=2, always=True)
    assert Options(speculative_config=given).engine_config("m").speculation == wanted
    assert speculation_from({"num_speculative_tokens": 0}) is None
    alone = speculation_from({"method": "ngram", "prompt_lookup_max": 3})
    assert alone == Speculation(num_tokens=5, lookup_max=3, lookup_min=3, always=True)
    low = speculation_from({"prompt_lookup_min": 3})
    assert low is not None and (low.lookup_min, low.lookup_max) == (3, 3)


@pytest.mark.parametrize(
    "given, needle",
    [
        ({"method": "eagle3", "model": "x"}, "eagle3"),
        ({"num_speculative_tokens": -1}, "num_speculative_tokens"),
        ({"num_speculative_tokens": "many"}, "many"),
        ({"prompt_lookup_min": 4, "prompt_lookup_max": 2}, "prompt_lookup_min"),
        ({"method": "ngram", "model": "x"}, "model"),
    ],
)
def test_what_cannot_be_done_is_refused_with_its_name(given: dict[str, object], needle: str) -> None:
    with pytest.raises(ConfigError, match=needle) as error:
        speculation_from(given)
    assert "ngram" in str(error.value.remedy)
