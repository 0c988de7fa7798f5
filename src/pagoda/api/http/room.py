"""Memory for what all requests bring before they are accepted: over the limit the next one is sent away."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pagoda.errors import Overloaded


class Room:
    """Counts what is really here, not what requests announce: an announcement costs its sender nothing."""

    def __init__(self, most_bytes: int, rejected: Callable[[str], None] = lambda reason: None) -> None:
        self.most_bytes = most_bytes
        self.held_bytes = 0
        self.rejected = rejected

    @contextmanager
    def place(self) -> Iterator[Place]:
        """The place of one request, given back at the end."""
        place = Place(self)
        try:
            yield place
        finally:
            self.held_bytes -= place.held_bytes


class Place:
    """What one request holds."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self.held_bytes = 0

    def take(self, more_bytes: int) -> None:
        """Raises Overloaded where others leave no room; a request that is large by itself is served when alone."""
        room = self._room
        if room.held_bytes > self.held_bytes and room.held_bytes + more_bytes > room.most_bytes:
            room.rejected("memory_full")
            raise Overloaded(
                "the server is busy: the requests that are being read fill its memory", remedy="Try again in a moment"
            )
        room.held_bytes += more_bytes
        self.held_bytes += more_bytes
