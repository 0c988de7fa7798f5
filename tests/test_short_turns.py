"""Short turns on the processor: asked for by one thread, not passed on to its children."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from pagoda import short_turns


def test_one_thread_takes_them_and_its_children_do_not() -> None:
    def ask() -> tuple[int | None, int | None, int | None]:
        before = short_turns.turn_ns()
        short_turns.take()
        with ThreadPoolExecutor(1) as child:
            return before, short_turns.turn_ns(), child.submit(short_turns.turn_ns).result()

    with ThreadPoolExecutor(1) as pool:
        before, own, child = pool.submit(ask).result()
    if not before:
        pytest.skip("this kernel has no turns of a length of one's own")
    assert own == 100_000
    assert child != own
