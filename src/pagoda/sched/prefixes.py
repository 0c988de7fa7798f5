"""Which blocks of a request are in the cache already, and which of its own others may find there."""

from __future__ import annotations

from collections.abc import Iterable

from pagoda.sched.blocks import BlockPool
from pagoda.sched.state import Sequence, Turn
from pagoda.sched.states import States
from pagoda.types import BLOCK_SIZE


class Prefixes:
    def __init__(self, enabled: bool, pool: BlockPool, states: States) -> None:
        self._enabled, self._pool, self._states = enabled, pool, states

    def cached(self, seq: Sequence) -> list[int]:
        """The blocks that its known tokens begin with."""
        if not self._enabled:
            return []
        return self._states.prefix(seq, self._pool.match(seq.hash_blocks(seq.reusable_len() // BLOCK_SIZE)))

    def publish(self, seq: Sequence, count: int) -> list[int]:
        """Make the blocks findable that `count` more tokens fill: a request behind in the same step may read them."""
        first, end = seq.offered, min(seq.computed + count, len(seq.known) - seq.promised) // BLOCK_SIZE
        if first >= end or not self._enabled:
            return []
        seq.offered = end
        hashes = seq.hash_blocks(end)
        return [seq.blocks[i] for i in range(first, end) if self._pool.publish(seq.blocks[i], hashes[i])]

    def publish_filled(self, turns: Iterable[Turn]) -> list[int]:
        """Those that the turns of a step fill."""
        filling = [turn for turn in turns if turn.seq.offered < (turn.seq.computed + turn.count) // BLOCK_SIZE]
        return [block for turn in filling for block in self.publish(turn.seq, turn.count)]
