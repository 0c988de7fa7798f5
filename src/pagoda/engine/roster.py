"""Which live requests the engine has, which wait for it, and which are suspected of killing it: pure bookkeeping."""

from __future__ import annotations

import logging

from pagoda.engine.stream import Stream
from pagoda.types import Delta, Request

SET_ASIDE = "this request stopped the engine twice; it was set aside"
_SUSPECT_STRIKES = 2

_log = logging.getLogger(__name__)


class Roster:
    """Suspects (two deaths in flight and no token between) run one at a time while all others are held.

    A suspect that gets a token is cleared; one that dies alone is set aside. So one poisonous request does not take
    the others with it, and two kills from outside end nobody.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, Stream] = {}  # by arrival
        self._sent: dict[str, Stream] = {}  # by wire id: a new one each time, so that late deltas find nobody
        self._suspects: set[int] = set()
        self._arrivals = 0
        self._submissions = 0

    def __len__(self) -> int:
        return len(self._waiting) + len(self._sent)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def sent(self) -> int:
        return len(self._sent)

    def is_sent(self, wire_id: str) -> bool:
        return wire_id in self._sent

    def add(self, stream: Stream) -> None:
        stream.arrival = self._arrivals
        self._arrivals += 1
        self._waiting[stream.arrival] = stream

    def remove(self, stream: Stream) -> str | None:
        """Forget a request; the id to cancel in the engine, if it is there."""
        self._waiting.pop(stream.arrival, None)
        self._suspects.discard(stream.arrival)
        wire_id, stream.wire_id = stream.wire_id, None
        if wire_id is not None:
            self._sent.pop(wire_id, None)
        return wire_id

    def take_waiting(self) -> list[Stream]:
        """Forget the requests that wait, but for those that are suspected: they are tried here, alone."""
        streams = [stream for stream in self._waiting.values() if stream.arrival not in self._suspects]
        for stream in streams:
            del self._waiting[stream.arrival]
        return streams

    def due(self) -> list[Request]:
        """The requests to send to the engine now; they count as sent."""
        if not self._suspects:
            streams = list(self._waiting.values())
        elif self._sent:
            streams = []
        else:
            streams = [self._waiting[min(self._suspects)]]
        return [self._send(stream) for stream in streams]

    def _send(self, stream: Stream) -> Request:
        del self._waiting[stream.arrival]
        self._submissions += 1
        stream.moved = False
        wire_id = stream.wire_id = f"{self._submissions}:{stream.request.request_id}"
        self._sent[wire_id] = stream
        return stream.resumed(wire_id)

    def deliver(self, delta: Delta, *, alone: bool = False) -> list[str]:
        """Hand a delta to its request. Gives ids to cancel in the engine: a cleared suspect makes room for the next."""
        stream = self._sent.get(delta.request_id)
        if stream is None:
            return []
        stream.put(delta, alone=alone)
        if delta.finish_reason is not None:
            self.remove(stream)
        elif stream.arrival in self._suspects and delta.token_ids:
            self._suspects.discard(stream.arrival)
            if self._suspects:
                wire_id = self.remove(stream)
                self._waiting[stream.arrival] = stream
                return [wire_id] if wire_id is not None else []
        return []

    def engine_died(self, parallel: int) -> None:
        """Take back what the engine had (it computed `parallel` of it at most), and end the one that killed it."""
        computed = self._computed(parallel)
        for stream in computed:
            suspected = stream.arrival in self._suspects
            alone = len(computed) == 1
            stream.strikes += 1
            stream.lone_strikes += alone
            if alone and (suspected or stream.lone_strikes >= _SUSPECT_STRIKES):
                _log.error("request %s is set aside: the engine stopped twice on it", stream.request.request_id)
                self.end(stream, SET_ASIDE)
            elif stream.strikes >= _SUSPECT_STRIKES:
                self._suspects.add(stream.arrival)
        for stream in self._sent.values():
            stream.wire_id = None
            self._waiting[stream.arrival] = stream
        self._sent = {}
        self._waiting = dict(sorted(self._waiting.items()))

    def _computed(self, parallel: int) -> list[Stream]:
        """The requests that can have been in the last step: the engine starts them in this order, and a few at a time.

        Those that only waited there are not to blame.
        """
        order = sorted(self._sent.values(), key=lambda stream: (stream.request.priority, stream.arrival))
        return [stream for place, stream in enumerate(order) if place < parallel or stream.moved]

    def end(self, stream: Stream, error: str) -> str | None:
        """End a request with an error; the id to cancel in the engine, if it is there."""
        wire_id = self.remove(stream)
        stream.put(Delta(request_id=stream.request.request_id, finish_reason="error", error=error))
        return wire_id

    def end_all(self, error: str) -> list[str]:
        streams = [*self._waiting.values(), *self._sent.values()]
        ids = [self.end(stream, error) for stream in streams]
        return [wire_id for wire_id in ids if wire_id is not None]
