"""Incremental decoding: every split of every id sequence gives the one-shot text, and never too early."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_models import TEXTS, byte_tokenizer, space_tokenizer

from pagoda.text.detokenizer import Detokenizer
from pagoda.text.tokenizer import Tokenizer

TOKENIZERS = {"byte": byte_tokenizer(), "space": space_tokenizer()}
both = pytest.mark.parametrize("kind", TOKENIZERS)


def pieces(tokenizer: Tokenizer, ids: Sequence[int], cuts: Sequence[int], prompt: Sequence[int] = ()) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt, skip_special_tokens=True)
    bounds = [0, *sorted(c % (len(ids) + 1) for c in cuts), len(ids)]
    parts = [detokenizer.add(ids[a:b]) for a, b in pairwise(bounds)]
    return [*parts, detokenizer.finish()]


def ids_of(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Random ids, with many that hold single bytes, and a few past the vocabulary."""
    bytes_only = [i for i in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) == 1]
    return st.lists(st.sampled_from(bytes_only) | st.integers(0, tokenizer.vocab_size + 2), max_size=24)


@both
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_random_ids_in_every_kind_of_split(kind: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(ids_of(tokenizer))
    cuts = data.draw(st.lists(st.integers(0, 30), max_size=6))
    expected = tokenizer.decode(ids)
    assert "".join(pieces(tokenizer, ids, cuts)) == expected
    assert "".join(pieces(tokenizer, ids, range(len(ids)))) == expected
    detokenizer = Detokenizer(tokenizer, (), skip_special_tokens=False)
    text = "".join([detokenizer.add([i]) for i in ids]) + detokenizer.finish()
    assert text == tokenizer.decode(ids, skip_special_tokens=False)


@both
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=20), before=st.text(max_size=8), cut=st.integers(0, 60))
def test_valid_text_never_shows_a_replacement(kind: str, text: str, before: str, cut: int) -> None:
    tokenizer = TOKENIZERS[kind]
    whole = before + text
    ids = tokenizer.encode(whole, add_special_tokens=False, parse_special=False)
    prompt, output = ids[:cut], ids[cut:]
    streamed = pieces(tokenizer, output, range(len(output)), prompt)
    visible = b"".join(map(tokenizer.token_bytes, ids))
    # The prompt may end inside a character: that character belongs to the output, nothing before it does.
    in_prompt = len(b"".join(map(tokenizer.token_bytes, prompt)).decode("utf-8", "ignore").encode())
    if tokenizer.strip_first:
        visible, in_prompt = visible[1:], max(in_prompt - 1, 0)
    assert "".join(streamed).encode() == visible[in_prompt:]


def test_a_character_comes_with_its_last_byte() -> None:
    tokenizer = TOKENIZERS["byte"]
    ids = [i for char in "𝔘" for i in tokenizer.encode(char)]
    assert len(ids) > 1
    assert pieces(tokenizer, ids, range(len(ids))) == [""] * len(ids) + ["𝔘", ""]
    assert pieces(tokenizer, ids[:-1], ()) == ["", "\ufffd"]


def test_wrong_bytes_are_shown_when_they_are_certainly_wrong() -> None:
    tokenizer = TOKENIZERS["space"]
    euro = [5 + byte for byte in "€".encode()]  # ids of the byte tokens
    a = tokenizer.encode("a", add_special_tokens=False)
    assert pieces(tokenizer, [*euro[:2], *a], (1, 2)) == ["", "", "\ufffd a", ""]
    assert pieces(tokenizer, [5 + 0xFF], ()) == ["\ufffd", ""]


@both
def test_nothing_of_the_prompt_leaks(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    single = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size - 1, -1, -1)}
    prompt = [
        *tokenizer.encode("secret 你", add_special_tokens=False),
        *(single[bytes([b])] for b in "好".encode()[:2]),
    ]
    last = single["好".encode()[2:]]
    assert "".join(pieces(tokenizer, [last], (), prompt)) == "好"
    other = tokenizer.encode("xyz", add_special_tokens=False)
    shown = "".join(pieces(tokenizer, other, range(len(other)), prompt))
    assert shown.lstrip("\ufffd").strip() == "xyz"
    assert "".join(pieces(tokenizer, [], (), prompt)) == "\ufffd"


def test_the_leading_space_is_dropped_only_at_the_very_start() -> None:
    tokenizer = TOKENIZERS["space"]
    hello = tokenizer.encode("hello", add_special_tokens=False)
    assert "".join(pieces(tokenizer, hello, (), prompt=[])) == "hello"
    assert "".join(pieces(tokenizer, hello, (), prompt=[1])) == "hello"  # <s> shows nothing
    assert "".join(pieces(tokenizer, hello, (), prompt=hello)) == " hello"
    assert "".join(pieces(tokenizer, [1, *hello], (1,))) == tokenizer.decode([1, *hello]) == "hello"


@both
def test_the_cost_of_a_token_does_not_grow(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(TEXTS[0]) * 2000
    detokenizer = Detokenizer(tokenizer, ids, True)
    start = time.process_time()
    for i in ids:
        detokenizer.add((i,))
    assert (time.process_time() - start) / len(ids) < 50e-6
