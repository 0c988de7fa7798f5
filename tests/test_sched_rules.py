"""The scheduler's rules for order, budget, prefix cache and memory, one by one."""

from __future__ import annotations

from typing import Any

import pytest
from sched_fake import Harness, harness, request, solo, zeros

from pagoda.types import BLOCK_SIZE

# order and budget


def test_waiting_requests_start_by_priority_then_arrival() -> None:
    h = harness(max_num_seqs=2)
    for name, priority in [("a", 0), ("b", 1), ("c", -1), ("d", 0)]:
        h.add(request(name, 4, priority=priority, max_tokens=2))
    assert list(h.planned()) == ["c", "a"]
    h.planned()
    assert list(h.planned()) == ["d", "b"]


def test_streams_come_before_prompts_and_a_long_prompt_is_cut_to_the_budget() -> None:
    h = harness(max_num_batched_tokens=32)
    h.add(request("long", 100, first=1))
    assert h.planned() == {"long": 32}
    h.add(request("short", 2, first=2, priority=-1))
    assert h.planned() == {"long": 32}
    assert h.planned() == {"long": 32}
    assert h.planned() == {"long": 4, "short": 2}
    h.add(request("next", 50, first=3))
    assert h.planned() == {"long": 1, "short": 1, "next": 30}
    assert h.planned() == {"long": 1, "short": 1, "next": 20}


def test_a_stream_of_lower_priority_still_comes_before_a_prompt() -> None:
    h = harness(max_num_batched_tokens=20)
    h.add(request("stream", 4, priority=5))
    h.planned()
    h.add(request("prompt", 60, priority=0))
    assert h.planned() == {"stream": 1, "prompt": 19}
    assert list(h.planned().items()) == [("stream", 1), ("prompt", 19)]


def test_no_more_than_max_num_seqs_run() -> None:
    h = harness(max_num_seqs=3)
    for i in range(5):
        h.add(request(f"r{i}", 4, first=i))
    assert len(h.planned()) == 3
    assert (h.scheduler.stats().running, h.scheduler.stats().waiting) == (3, 2)


def test_nothing_to_do() -> None:
    h = harness()
    assert not h.scheduler.has_work and h.scheduler.plan() is None


def test_one_step_at_a_time() -> None:
    h = harness()
    h.add(request("a", 4))
    got = h.plan()
    assert got is not None and h.scheduler.has_work
    with pytest.raises(ValueError, match="no result yet"):
        h.scheduler.plan()
    result = zeros(got[0])
    h.scheduler.apply(got[0], result)
    with pytest.raises(ValueError, match="not the step in flight"):
        h.scheduler.apply(got[0], result)


def test_who_waits_for_a_state_lets_others_go_first_and_keeps_its_place() -> None:
    h = harness(recurrent=True, kept_states=4, max_num_batched_tokens=120, max_num_seqs=3)
    h.add(request("leader", 150))
    h.planned()
    for name, size in [("waits", 150), ("short", 10), ("late", 10)]:
        h.add(request(name, size, first=0 if size == 150 else 3))
    assert h.planned() == {"leader": 30, "short": 10}  # the third place is not for "late"
    assert h.planned() == {"leader": 1, "short": 1, "waits": 22}


# prefix cache


def test_requests_that_arrive_together_share_their_prefix_in_the_first_step() -> None:
    h = harness()
    for name in "abc":
        h.add(request(name, 50, seed=ord(name)))
    assert h.planned() == {"a": 50, "b": 2, "c": 2}
    h.run()
    assert [h.told[name].cached_tokens[0] for name in "abc"] == [0, 48, 48]
    stats = h.scheduler.stats()
    assert (stats.prefix_queries_tokens, stats.prefix_hits_tokens, stats.prompt_tokens) == (150, 96, 150)


def test_at_least_one_token_is_computed() -> None:
    h = harness()
    h.add(request("a", 48))
    h.run()
    h.add(request("b", 48))
    assert h.planned() == {"b": 16}
    assert h.told["b"].cached_tokens == [32]


def test_outputs_are_cached_too() -> None:
    h = harness()
    h.add(request("a", 20, max_tokens=30))
    h.run()
    h.add(request("b", [*h.known("a"), 3]))
    assert h.planned() == {"b": 51 - 48}


def test_salts_and_the_switch_keep_caches_apart() -> None:
    h = harness()
    h.add(request("a", 40))
    h.run()
    h.add(request("b", 40, cache_salt="tenant"))
    assert h.planned() == {"b": 40}
    off = harness(prefix_caching=False)
    off.add(request("a", 40))
    off.add(request("b", 40))
    assert off.planned() == {"a": 40, "b": 40}
    assert off.scheduler.stats().prefix_queries_tokens == 0


def test_prompt_logprobs_need_the_whole_prompt() -> None:
    h = harness()
    h.add(request("a", 40))
    h.run()
    h.add(request("b", 40, prompt_logprobs=2))
    assert h.planned() == {"b": 40}
    assert h.told["b"].prompt_logprobs == solo(h.requests["b"], h.config).prompt_logprobs
    assert h.told["b"].cached_tokens == [0]


# memory


def two_that_outgrow_the_pool(**params: Any) -> Harness:
    h = harness(num_blocks=8)
    h.add(request("old", 30, first=0, max_tokens=60, **params))
    h.add(request("new", 30, first=9, max_tokens=60, **params))
    return h


def test_the_newest_request_makes_room_and_goes_on_later() -> None:
    h = two_that_outgrow_the_pool(repetition_penalty=1.2, presence_penalty=0.5)
    while h.scheduler.stats().preemptions == 0:
        assert h.step()
    assert [seq.request_id for seq in h.scheduler._running] == ["old"]
    assert h.told["old"].finish_reason is None
    h.run()
    assert h.scheduler.stats().preemptions < 4
    for name in ("old", "new"):
        assert h.told[name].tokens == solo(h.requests[name], h.config).tokens
        assert sum(h.told[name].cached_tokens) == 0, "a request's own blocks are no cache hit to tell"


def test_a_request_of_lower_priority_makes_room_though_it_came_first() -> None:
    h = harness(num_blocks=8)
    h.add(request("low", 30, max_tokens=60, priority=1))
    h.add(request("high", 30, first=9, max_tokens=60))
    while h.scheduler.stats().preemptions == 0:
        assert h.step()
    assert [seq.request_id for seq in h.scheduler._running] == ["high"]
    h.run()
    assert h.told["low"].tokens == solo(h.requests["low"], h.config).tokens


def test_a_prompt_takes_the_room_of_a_stream_that_was_planned_already() -> None:
    h = harness(num_blocks=8, max_num_batched_tokens=3)
    h.add(request("stream", 3, max_tokens=80, priority=1))
    h.planned()
    h.add(request("prompt", 96, first=9))
    while h.scheduler.stats().preemptions == 0:
        assert h.step()
    assert not h.told["prompt"].tokens
    h.run()
    for name in ("stream", "prompt"):
        assert h.told[name].tokens == solo(h.requests[name], h.config).tokens


@pytest.mark.parametrize("prompt_logprobs", [None, 1])
def test_a_prompt_preempted_half_way_goes_on_from_its_own_blocks(prompt_logprobs: int | None) -> None:
    h = harness(num_blocks=8, max_num_batched_tokens=3)
    h.add(request("stream", 3, max_tokens=60))
    h.planned()
    h.add(request("prompt", 96, first=9, prompt_logprobs=prompt_logprobs))
    while h.scheduler.stats().preemptions == 0:
        assert h.step()
    assert [seq.request_id for seq in h.scheduler._waiting] == ["prompt"]
    computed, stream_left = sum(h.plan_sizes), 60 - len(h.told["stream"].tokens)
    h.run()
    alone, told = solo(h.requests["prompt"], h.config), h.told["prompt"]
    assert (told.tokens, told.prompt_logprobs) == (alone.tokens, alone.prompt_logprobs)
    assert told.cached_tokens[0] == 0, "only the first admission counts"
    from_nothing = stream_left + 96 + len(alone.tokens) - 1
    assert sum(h.plan_sizes) - computed <= from_nothing - 4 * BLOCK_SIZE


def test_a_preempted_request_is_the_first_to_come_back() -> None:
    h = two_that_outgrow_the_pool()
    while h.scheduler.stats().preemptions == 0:
        assert h.step()
    h.add(request("later", 4, first=20))
    assert [seq.request_id for seq in h.scheduler._waiting] == ["new", "later"]


@pytest.mark.parametrize("budget", [16, 256])
def test_a_prompt_waits_until_all_of_it_has_room(budget: int) -> None:
    h = harness(num_blocks=8, max_num_batched_tokens=budget)
    h.add(request("a", 60, max_tokens=8))
    h.add(request("b", 60, first=5, max_tokens=8))
    h.run()
    assert h.scheduler.stats().preemptions == 0
    assert h.told["b"].tokens == solo(h.requests["b"], h.config).tokens


def test_a_request_that_never_fits_ends_at_once() -> None:
    h = harness(num_blocks=2)
    h.add(request("a", 2 * BLOCK_SIZE + 1))
    assert h.told["a"].finish_reason == "error" and "33 tokens" in str(h.told["a"].error)
    assert "1 to 32" in str(h.told["a"].error)
    h.assert_empty()
    h.add(request("empty", 0))
    assert h.told["empty"].finish_reason == "error"
    h.assert_empty()


def test_a_request_that_outgrows_the_pool_alone_ends_with_what_it_has() -> None:
    h = harness(num_blocks=2)
    h.add(request("a", 20, max_tokens=100))
    h.run()
    assert h.told["a"].finish_reason == "error" and "32 tokens" in str(h.told["a"].error)
    assert len(h.told["a"].tokens) == 13
    h.assert_empty()


def test_steady_streams_keep_the_arrays_of_the_step_before() -> None:
    """Only tokens and positions are new; a stream that ends, or samples by its history, makes a whole new plan."""
    h = harness()
    h.add(request("a", 3, max_tokens=9, ignore_eos=True))
    h.add(request("b", 5, max_tokens=6, ignore_eos=True))
    plans, told = [], []
    while (got := h.plan()) is not None:
        plans.append(got[0])
        told.append((got[0].step, got[0].positions.tolist()))
        h.finish(*got)
    assert plans[1] is plans[2] is plans[4]
    assert told[1:4] == [(2, [3, 5]), (3, [4, 6]), (4, [5, 7])]
    assert len(plans[-1].slots) == 1, "b has ended"
    h.add(request("c", 3, max_tokens=9, repetition_penalty=2.0))
    h.run()
    h.assert_empty()
