"""Which adapters the executor has in its places, how many running requests use each, and which to load next."""

from __future__ import annotations

from collections.abc import Iterable

from pagoda.sched.state import Sequence
from pagoda.types import Adapter


class Places:
    """An adapter stays in its place, also without requests, until another one needs it: the longest unused goes."""

    def __init__(self, count: int) -> None:
        self._stamps = [""] * count
        self._users = [0] * count
        self._by_use = list(range(count))  # the place that was used last comes last

    def find(self, adapter: Adapter) -> int:
        """Its place, or -1."""
        return self._stamps.index(adapter.stamp) if adapter.stamp in self._stamps else -1

    def lack(self, seq: Sequence) -> bool:
        """Whether it waits for its adapter."""
        return seq.request.adapter is not None and self.find(seq.request.adapter) < 0

    def wanted(self, waiting: Iterable[Sequence]) -> tuple[int, Adapter] | None:
        """For the first that lacks one, if there is a place that nobody uses, nor one in front of it is to use."""
        kept = set[int]()
        for seq in waiting:
            adapter = seq.request.adapter
            if adapter is None:
                continue
            place = self.find(adapter)
            if place < 0:
                free = (each for each in self._by_use if not self._users[each] and each not in kept)
                empty = next(free, None)
                return None if empty is None else (empty, adapter)
            kept.add(place)
        return None

    def put(self, place: int, adapter: Adapter | None) -> None:
        """An adapter is there now, or none."""
        self._stamps[place] = "" if adapter is None else adapter.stamp

    def take(self, seq: Sequence) -> int:
        """The place of a request that begins to run; -1 for one without an adapter."""
        if seq.request.adapter is None:
            return -1
        place = self.find(seq.request.adapter)
        self._users[place] += 1
        self._by_use.remove(place)
        self._by_use.append(place)
        return place

    def leave(self, seq: Sequence) -> None:
        """A request no longer runs."""
        if seq.place >= 0:
            self._users[seq.place] -= 1
