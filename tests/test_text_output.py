"""Stop strings, stop tokens and held-back text, over every way an output can be cut into deltas."""

from __future__ import annotations

import random
import time
from itertools import combinations, pairwise, product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_models import byte_tokenizer

from pagoda.text.output import TextOutput
from pagoda.text.stop_strings import StopStrings
from pagoda.types import Delta, FinishReason, Request, SamplingParams, TokenLogprob

TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_token_ids[0]


def output(prompt: str = "", before: str = "", **params: Any) -> TextOutput:
    request = Request(
        request_id="r",
        prompt_token_ids=TOKENIZER.encode(prompt),
        params=SamplingParams(**params),
        eos_token_ids=(EOS,),
        output_token_ids=TOKENIZER.encode(before),
    )
    return TextOutput(TOKENIZER, request)


def delta(ids: list[int], finish: FinishReason | None = None, stop_reason: int | None = None) -> Delta:
    logprobs = [TokenLogprob(i, -1.0, []) for i in ids]
    return Delta(request_id="r", token_ids=ids, logprobs=logprobs, finish_reason=finish, stop_reason=stop_reason)


def stream(ids: list[int], cuts: list[int], finish: FinishReason = "length", **params: Any) -> list[Delta]:
    """Feed ids in pieces cut at the given places, until the end or a stop string."""
    out = output(**params)
    bounds = [0, *sorted(c % (len(ids) + 1) for c in cuts), len(ids)]
    deltas: list[Delta] = []
    for begin, end in pairwise(bounds):
        deltas.append(out.feed(delta(ids[begin:end])))
        if out.finished:
            return deltas
    deltas.append(out.feed(delta([], finish)))
    return deltas


def text_of(deltas: list[Delta]) -> str:
    return "".join(d.text for d in deltas)


def first_stop(text: str, stops: tuple[str, ...]) -> tuple[str, str] | None:
    """The plain meaning: the stop string that is complete first, the longest of those; the text before it."""
    for end in range(1, len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return None


SMALL = st.text("ab\u4f60\n", max_size=30)
STOPS = st.lists(st.text("ab\u4f60\n", min_size=1, max_size=4), min_size=1, max_size=4).map(tuple)


@settings(max_examples=300, deadline=None)
@given(text=SMALL, stops=STOPS, cuts=st.lists(st.integers(0, 40), max_size=8), single=st.booleans())
def test_stop_strings_in_any_cut(text: str, stops: tuple[str, ...], cuts: list[int], single: bool) -> None:
    ids = [i for char in text for i in TOKENIZER.encode(char)] if single else TOKENIZER.encode(text)
    deltas = stream(ids, cuts, stop=stops)
    expected = first_stop(text, stops)
    if expected is None:
        assert text_of(deltas) == text
        assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("length", None)
        assert [i for d in deltas for i in d.token_ids] == ids
        return
    before, stop = expected
    assert text_of(deltas) == before
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", stop)
    assert text_of(stream(ids, cuts, stop=stops, include_stop_str_in_output=True)) == before + stop
    used = [i for d in deltas for i in d.token_ids]
    assert used == ids[: len(used)]
    assert (before + stop) in TOKENIZER.decode(used)  # enough tokens, and not one more
    assert (before + stop) not in TOKENIZER.decode(used[:-1])
    assert [p.token_id for d in deltas for p in d.logprobs or []] == used


@settings(max_examples=200, deadline=None)
@given(text=SMALL, stops=STOPS)
def test_only_a_possible_stop_string_is_held_back(text: str, stops: tuple[str, ...]) -> None:
    out, shown = output(stop=stops), ""
    fed = ""
    for char in text:
        for i in TOKENIZER.encode(char):
            shown += out.feed(delta([i])).text
        fed += char
        if out.finished:
            return
        held = fed[len(shown) :]
        possible = [n for s in stops for n in range(1, len(s)) if fed.endswith(s[:n])]
        assert len(held) == max(possible, default=0)
        assert shown + held == fed


def test_all_short_texts_and_pairs_of_stop_strings() -> None:
    words = ["".join(letters) for n in (1, 2, 3) for letters in product("ab", repeat=n)]
    texts = ["".join(letters) for letters in product("ab", repeat=7)]
    for stops in [*combinations(words, 2), ("aabab", "abb"), ("abaab", "aaa")]:
        for text in texts:
            match, expected = StopStrings(stops).feed(text), first_stop(text, stops)
            found = None if match is None else (text[: match.end - len(match.string)], match.string)
            assert found == expected, (text, stops)


def test_every_cut_of_one_text() -> None:
    ids = [i for char in "The 你好<END>x" for i in TOKENIZER.encode(char)]
    for mask in range(2**10):
        cuts = [i + 3 for i in range(10) if mask >> i & 1]
        deltas = stream(ids, cuts, stop=("<END>", "好!"))
        assert text_of(deltas) == "The 你好"


def test_held_text_is_flushed_at_every_kind_of_end() -> None:
    ends: list[FinishReason] = ["length", "abort", "error"]
    for finish in ends:
        out = output(stop=("stop!",))
        assert out.feed(delta(TOKENIZER.encode("do sto"))).text == "do "
        last = out.feed(delta(TOKENIZER.encode("p"), finish))
        assert (last.text, last.finish_reason, out.finished) == ("stop", finish, True)
    out = output(stop=("stop!",))
    out.feed(delta(TOKENIZER.encode("do sto")))
    assert out.feed(delta([EOS], "stop")).text == "sto"


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("include", [True, False])
def test_the_token_that_ends_a_request_is_not_shown(skip: bool, include: bool) -> None:
    params: dict[str, Any] = {"skip_special_tokens": skip, "include_stop_str_in_output": include}
    ids = TOKENIZER.encode("Hi fox")
    last = output(**params).feed(delta([*ids, EOS], "stop"))
    assert (last.text, last.token_ids) == ("Hi fox", [*ids, EOS])
    ended = output(stop_token_ids=(ids[-1],), **params).feed(delta(ids, "stop", ids[-1]))
    assert ended.text == ("Hi fox" if include else TOKENIZER.decode(ids[:-1]))
    assert ended.token_ids == ids


def test_an_eos_that_does_not_end_follows_skip_special_tokens() -> None:
    ids = [*TOKENIZER.encode("a"), EOS, *TOKENIZER.encode("b")]
    assert output(ignore_eos=True).feed(delta(ids, "length")).text == "ab"
    assert output(ignore_eos=True, skip_special_tokens=False).feed(delta(ids, "length")).text == "a<|im_end|>b"


def test_an_unfinished_character_at_the_end() -> None:
    ids = TOKENIZER.encode("x𝔘")[:-1]
    assert output().feed(delta(ids, "length")).text == "x\ufffd"
    stopped = output(stop=("\ufffd",)).feed(delta(ids, "length"))
    assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == ("x", "stop", "\ufffd")


def test_min_tokens_come_before_stop_strings() -> None:
    ids = [i for char in "abab ab" for i in TOKENIZER.encode(char)]
    assert text_of(stream(ids, [1, 2, 3], stop=("ab",), min_tokens=2)) == "ab"
    assert text_of(stream(ids, [], stop=("ab",), min_tokens=3)) == "abab "


def test_going_on_behind_earlier_output() -> None:
    ids = TOKENIZER.encode("𝔘!")
    out = output(prompt="Say: ", before="", stop=("!",))
    assert out.feed(delta(ids)).text == "𝔘"
    request = Request(request_id="r", prompt_token_ids=[5], params=SamplingParams(), output_token_ids=ids[:2])
    assert TextOutput(TOKENIZER, request).feed(delta(ids[2:], "length")).text == "𝔘!"


def test_after_the_end_nothing_comes() -> None:
    out = output(stop=("a",))
    first = out.feed(delta(TOKENIZER.encode("ba")))
    assert (first.text, out.finished) == ("b", True)
    late = out.feed(delta(TOKENIZER.encode("more"), "length"))
    assert (late.text, late.token_ids, late.finish_reason) == ("", [], None)


def test_other_fields_pass_through() -> None:
    given_delta = Delta(request_id="r", token_ids=TOKENIZER.encode("a"), prompt_logprobs=[None], cached_tokens=7)
    assert output().feed(given_delta) == Delta(
        request_id="r", token_ids=TOKENIZER.encode("a"), prompt_logprobs=[None], cached_tokens=7, text="a"
    )


def test_matching_takes_linear_time() -> None:
    stops = StopStrings(["a" * 255 + "c", "a" * 200 + "bc", *("ab" * n + "c" for n in range(1, 14))])
    rng = random.Random(3)
    text = "a" * 100_000 + "".join(rng.choices("ab", k=100_000))
    start = time.process_time()
    assert stops.feed(text) is None
    assert time.process_time() - start < 1.0
