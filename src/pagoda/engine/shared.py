"""One engine core for several threads: whoever waits for an answer computes the next step for all of them."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Protocol

from pagoda.engine.core import EngineCore
from pagoda.types import Delta, Request

_log = logging.getLogger("pagoda")


class Answering(Protocol):
    """What becomes of the deltas of one request."""

    @property
    def done(self) -> bool: ...

    @property
    def error(self) -> str | None: ...

    def feed(self, delta: Delta) -> bool:
        """True when the answer is complete, which a stop string may make it before the engine."""
        ...


class SharedCore:
    """Every `begin` needs its `end`: what is not complete by then is cancelled."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._calls = 0
        self._open: dict[str, Answering] = {}
        self._inbox: list[Request | str] = []  # to add, or (by name) to cancel, between two steps
        self._stepping = False
        self._turn = threading.Condition()  # guards all of the above

    def names(self, count: int) -> list[str]:
        """So many names that no request has had."""
        with self._turn:
            self._calls += count
            return [str(i) for i in range(self._calls - count, self._calls)]

    def begin(self, requests: Sequence[Request], answers: Mapping[str, Answering]) -> None:
        with self._turn:
            self._open.update(answers)
            self._tell(requests)

    def advance(self, answers: Mapping[str, Answering]) -> None:
        """Until the next step is over, whichever thread computes it; nothing where these are complete."""
        with self._turn:
            if all(answer.done for answer in answers.values()):
                return
            if self._stepping:
                self._turn.wait()
                return
            self._stepping = True
        ended: list[str] = []
        try:
            for delta in self._core.step():
                answer = self._open.get(delta.request_id)
                if answer is None or not answer.feed(delta):
                    continue
                del self._open[delta.request_id]
                if delta.finish_reason is None:  # a stop string ended it, of which the engine knows nothing
                    ended.append(delta.request_id)
                if answer.error is not None:
                    _log.warning("request %s failed: %s", delta.request_id, answer.error)
        finally:
            with self._turn:
                self._stepping = False
                self._tell(ended)
                self._turn.notify_all()

    def finish(self, answers: Mapping[str, Answering], show: bool = False) -> None:
        """Until these are complete; `show` says on stderr how many are."""
        try:
            shown = -1
            while shown < len(answers):
                done = sum(answer.done for answer in answers.values())
                if show and done > shown:
                    end = "\n" if done == len(answers) else ""
                    print(f"\r{done}/{len(answers)} answers", end=end, file=sys.stderr, flush=True)
                shown = done
                self.advance(answers)
        finally:
            self.end(answers)

    def end(self, answers: Mapping[str, Answering]) -> None:
        """What is left after an interrupt is cancelled."""
        with self._turn:
            self._tell([name for name in answers if self._open.pop(name, None) is not None])

    def _tell(self, what: Sequence[Request | str]) -> None:
        """Add requests, or cancel those named, as soon as no step is being computed. With the lock held."""
        self._inbox += what
        if self._stepping:
            return
        for one in self._inbox:
            if isinstance(one, str):
                self._core.cancel(one)
            else:
                self._core.add(one)
        self._inbox.clear()
