"""Lets streams try tokens ahead with what a step has left over: who tries, which tokens, and for how many is room.

Nobody loses a block or a token for it.
"""

from __future__ import annotations

from collections.abc import Callable

from pagoda.options.speculation import Speculation
from pagoda.sched.blocks import BlockPool
from pagoda.sched.draft import Drafter, Speculator
from pagoda.sched.pace import Load, Pace
from pagoda.sched.state import Proposer, Sequence, Turn
from pagoda.types import BLOCK_SIZE

MakeRoom = Callable[[Sequence, int], bool]


class Trials:
    """`make_room` gives a request blocks for so many more tokens; `proposer` is a draft model, if there is one."""

    def __init__(
        self, config: Speculation, pace: Pace, pool: BlockPool, make_room: MakeRoom, proposer: Proposer | None
    ) -> None:
        self.speculator = Speculator(config, pace)
        self._pool, self._make_room, self._proposer = pool, make_room, proposer

    def add(self, turns: list[Turn], load: Load, budget: int, running: int) -> None:
        """Put drafts into the turns of a step that has this load, and so many tokens left over."""
        most_streams = self.speculator.most_streams()
        if most_streams is not None and len(turns) > most_streams:
            return
        trying = [turn for turn in turns if turn.samples and turn.seq.samples_alike and not turn.named]
        if self._proposer is not None:  # a draft model knows no grammars
            trying = [turn for turn in trying if turn.seq.grammar is None]
        drafters = [
            turn.seq.drafter or self.speculator.new_drafter(forced=turn.seq.grammar is not None) for turn in trying
        ]
        guesses = self._guesses(trying, drafters, load, budget, running)
        for place, (turn, drafter) in enumerate(zip(trying, drafters, strict=True)):
            seq = turn.seq
            seq.drafter = drafter
            most = self._places_ahead(seq, budget, running)
            if guesses is not None:
                drafts = drafter.take(guesses[place][:most])
            else:
                forced = None if seq.grammar is None else seq.grammar.forced
                drafts = self.speculator.draft(drafter, seq.known, most, load, forced)
            if drafts:
                self.speculator.count(drafts)
                self._make_room(seq, turn.count + len(drafts))
                turn.drafts = drafts
                load.add_stream(len(seq.known), len(drafts))
                budget -= len(drafts)

    def _guesses(
        self, trying: list[Turn], drafters: list[Drafter], load: Load, budget: int, running: int
    ) -> list[list[int]] | None:
        """Those of the draft model, one for each who tries; None: there is no such model."""
        if self._proposer is None or not trying:
            return None
        most = self.speculator.tokens_ahead(drafters, load)
        wanted = [(turn.seq, min(most, self._places_ahead(turn.seq, budget, running))) for turn in trying]
        guesses = self._proposer.propose(wanted)
        self.speculator.observe(self._proposer.rounds)
        return guesses

    def _places_ahead(self, seq: Sequence, budget: int, running: int) -> int:
        """How many tokens a stream may try without taking a block that another will need."""
        spare = max(0, self._pool.free - running)
        places = (len(seq.blocks) + spare) * BLOCK_SIZE - len(seq.known)
        return max(0, min(budget, places, seq.end - len(seq.known) - 1))
