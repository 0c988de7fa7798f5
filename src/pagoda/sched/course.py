"""Streams that just go on, by one token each: such a step is the one before again, but for tokens and positions."""

from __future__ import annotations

from pagoda.sched.draft import Speculator
from pagoda.sched.flights import Flight
from pagoda.sched.pace import Load
from pagoda.sched.state import Sequence, Turn
from pagoda.types import BLOCK_SIZE, Delta


class Course:
    """`flight` is the last step of these streams; `news` are the tokens of the one before, not applied yet."""

    def __init__(self, flight: Flight) -> None:
        seqs = [turn.seq for turn in flight.turns]
        self.flight = flight
        self.news: list[int] | None = None
        self._stops = frozenset[int]().union(*(seq.stop_ids for seq in seqs))
        self._left = min(seq.end - len(seq.known) for seq in seqs) - 1  # steps until the first may be full
        self._borders: list[list[Sequence]] = [[] for _ in range(BLOCK_SIZE)]  # who begins a block in so many steps
        for seq in seqs:
            self._borders[-(seq.computed + 1) % BLOCK_SIZE].append(seq)

    def goes_on(self, tokens: list[int]) -> bool:
        """Whether all go on behind these tokens."""
        return self._left > 0 and self._stops.isdisjoint(tokens)

    def lacking(self) -> list[Sequence]:
        """Those that need one block more for the next step."""
        begin = self._borders[0]
        return [seq for seq in begin if seq.computed + 1 >= len(seq.blocks) * BLOCK_SIZE] if begin else begin

    def go_on(self, tokens: list[int]) -> Flight:
        """They do: the next step."""
        last = self.flight
        load = Load(last.load.streams, 0, last.load.pairs + last.load.streams)
        self.flight, self.news, self._left = Flight(last.plan, last.turns, [], load), tokens, self._left - 1
        self._borders.append(self._borders.pop(0))
        return self.flight

    def tell(self) -> list[Delta]:
        """Apply the news, if there are any."""
        if self.news is None:
            return []
        tokens, self.news = self.news, None
        deltas = []
        for turn, token in zip(self.flight.turns, tokens, strict=True):
            seq = turn.seq
            seq.computed += 1
            seq.known.append(token)
            deltas.append(Delta(request_id=seq.request_id, token_ids=[token]))
        return deltas


def course_of(flight: Flight, speculator: Speculator | None) -> Course | None:
    """None where another kind of step may come next, or where more than a token is told of each stream."""
    most_streams = 0 if speculator is None else speculator.most_streams()
    drafts = most_streams is None or len(flight.turns) <= most_streams
    if drafts or flight.plan.rope_positions is not None or not all(_plain(turn) for turn in flight.turns):
        return None
    return Course(flight)


def _plain(turn: Turn) -> bool:
    seq = turn.seq
    return turn.steady and seq.alive and seq.started and seq.told_top < 0 and seq.sight is None
