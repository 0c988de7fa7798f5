"""Texts of a file that are decoded when they are asked for: the same as a list of them."""

from __future__ import annotations

import numpy as np
import pytest

from pagoda.weights.texts import Texts

WORDS = [b"a", b"", "\u00fc\u4f60".encode(), b"bc", b"a", b"\xff\xfe", "\ufffd".encode()]
PLAIN = [word.decode("utf-8", "replace") for word in WORDS]


def texts() -> Texts:
    raw = b"--".join(WORDS)
    sizes = np.array([len(word) for word in WORDS], np.int64)
    return Texts(raw, np.concatenate([[0], np.cumsum(sizes + 2)[:-1]]), sizes)


def test_it_reads_like_a_list() -> None:
    found = texts()
    assert list(found) == PLAIN and len(found) == len(PLAIN)
    assert [found[i] for i in range(-len(PLAIN), len(PLAIN))] == PLAIN + PLAIN
    assert found[1:5:2] == PLAIN[1:5:2] and list(reversed(found)) == PLAIN[::-1]
    with pytest.raises(IndexError):
        found[len(PLAIN)]


def test_it_finds_like_a_list() -> None:
    found = texts()
    for word in PLAIN[:5]:
        assert word in found and found.index(word) == PLAIN.index(word)
    assert found.index("a", 1) == 4
    assert "\ufffd" in found and "b" not in found and 7 not in found
    with pytest.raises(ValueError, match="not among"):
        found.index("a", 1, 4)
