"""Who is to blame when the engine dies: the rules of the roster, without an engine."""

from __future__ import annotations

import random

from pagoda.engine.roster import SET_ASIDE, Roster
from pagoda.engine.stream import Stream, merge
from pagoda.types import Delta, Request, SamplingParams, TokenLogprob


def stream(name: str, priority: int = 0) -> Stream:
    return Stream(Request(request_id=name, prompt_token_ids=[1], params=SamplingParams(seed=1), priority=priority))


def filled(*names: str) -> tuple[Roster, dict[str, Stream]]:
    roster, streams = Roster(), {name: stream(name) for name in names}
    for one in streams.values():
        roster.add(one)
    return roster, streams


def names(requests: list[Request]) -> list[str]:
    return [request.request_id.split(":", 1)[1] for request in requests]


def token(one: Stream) -> Delta:
    return Delta(request_id=one.wire_id or "", token_ids=[5])


def ended(one: Stream) -> str | None:
    """The error that a stream ended with, None if it has not ended."""
    return one._untaken[-1].error if one._untaken else None


def test_two_deaths_without_a_token_make_suspects_that_run_alone_in_turn() -> None:
    roster, streams = filled("a", "b", "c")
    for _ in range(2):
        assert names(roster.due()) == ["a", "b", "c"]
        roster.engine_died(8)
    roster.add(stream("new"))
    assert names(roster.due()) == ["a"] and roster.due() == []
    cancel = streams["a"].wire_id
    assert roster.deliver(token(streams["a"])) == [cancel]  # cleared, and put back until the others are
    assert names(roster.due()) == ["b"]
    roster.engine_died(8)
    assert ended(streams["b"]) == SET_ASIDE
    assert names(roster.due()) == ["c"]
    assert roster.deliver(token(streams["c"])) == []  # the last one stays where it is
    assert names(roster.due()) == ["a", "new"]
    assert len(roster) == 3 and roster.waiting == 0


def test_a_token_between_two_deaths_clears() -> None:
    roster, streams = filled("a", "b")
    for _ in range(5):
        assert names(roster.due()) == ["a", "b"]
        for one in streams.values():
            roster.deliver(token(one))
        roster.engine_died(8)
    assert [one.tokens for one in streams.values()] == [[5] * 5] * 2


def test_alone_at_two_deaths_is_set_aside() -> None:
    roster, streams = filled("a")
    roster.due()
    roster.engine_died(8)
    assert ended(streams["a"]) is None
    roster.due()
    roster.engine_died(8)
    assert ended(streams["a"]) == SET_ASIDE and len(roster) == 0


def test_alone_only_at_its_second_death_gets_one_more_try_as_a_suspect() -> None:
    roster, streams = filled("a", "b")
    roster.due()
    roster.engine_died(8)
    roster.remove(streams["b"])
    for _ in range(2):
        assert ended(streams["a"]) is None
        assert names(roster.due()) == ["a"]
        roster.engine_died(8)
    assert ended(streams["a"]) == SET_ASIDE


def test_who_only_waited_in_the_engine_is_not_to_blame() -> None:
    roster, streams = filled("a", "b", "c")
    urgent = stream("urgent", priority=-1)
    roster.add(urgent)
    for _ in range(2):
        roster.due()
        roster.engine_died(2)
    assert [one.strikes for one in (urgent, *streams.values())] == [2, 2, 0, 0]
    assert names(roster.due()) == ["a"]


def test_late_deltas_of_an_earlier_life_find_nobody() -> None:
    roster, streams = filled("a")
    roster.due()
    late = token(streams["a"])
    roster.engine_died(8)
    roster.due()
    roster.deliver(late)
    assert streams["a"].tokens == []


def test_a_suspect_that_leaves_or_ends_makes_room() -> None:
    roster, streams = filled("a", "b", "c")
    for _ in range(2):
        roster.due()
        roster.engine_died(8)
    roster.due()
    assert roster.remove(streams["a"]) is not None
    assert names(roster.due()) == ["b"]
    roster.deliver(Delta(request_id=streams["b"].wire_id or "", finish_reason="length"))
    assert names(roster.due()) == ["c"]


def test_one_poison_among_many_never_ends_another() -> None:
    """Random histories: who is poison kills whenever it is computed; nobody else may end with an error."""
    rng = random.Random(11)
    for _ in range(300):
        count = rng.randrange(1, 12)
        roster, streams = filled(*(f"{i}" for i in range(count)))
        poison = rng.choice(list(streams.values()))
        deaths = 0
        while ended(poison) is None:
            roster.due()
            sent = [one for one in streams.values() if one.wire_id]
            assert sent, "nothing runs and nothing is decided"
            for one in rng.sample(sent, rng.randrange(len(sent) + 1)):
                if one is not poison:
                    roster.deliver(token(one))
            if poison.wire_id:
                roster.engine_died(rng.choice([count, 64]))
                deaths += 1
            elif len(sent) == 1 and sent[0].wire_id and sent[0] is not poison:
                roster.deliver(token(sent[0]))
        assert deaths <= 3 and ended(poison) == SET_ASIDE
        assert all(ended(one) is None for one in streams.values() if one is not poison)


def test_merged_deltas_say_what_both_said() -> None:
    first = Delta(
        request_id="a",
        token_ids=[1],
        logprobs=[TokenLogprob(1, -1.0, [])],
        prompt_logprobs=[None],
        cached_tokens=16,
        text="x",
    )
    last = Delta(
        request_id="a", token_ids=[2], logprobs=[TokenLogprob(2, -2.0, [])], finish_reason="stop", stop_reason=2
    )
    whole = merge([first, last])
    assert (whole.token_ids, len(whole.logprobs or []), whole.prompt_logprobs) == ([1, 2], 2, [None])
    assert (whole.finish_reason, whole.stop_reason, whole.cached_tokens, whole.text) == ("stop", 2, 16, "x")


def test_resumed_requests_hold_all_tokens_and_keep_their_name() -> None:
    request = Request(request_id="a", prompt_token_ids=[1], params=SamplingParams(seed=3), output_token_ids=[7])
    one = Stream(request)
    one.put(Delta(request_id="1:a", token_ids=[8]))
    assert one.resumed("2:a").output_token_ids == [7, 8] and request.output_token_ids == [7]
    assert one.take().request_id == "a"
