"""Which models are loaded: what has to go when another one comes, and what has been idle for too long. Pure logic."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pagoda.errors import BadRequest

DEFAULT_KEEP_ALIVE_S = 300.0
BUSY_GRACE_S = 10.0
_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")
_UNITS_S = (("ns", 1e-9), ("us", 1e-6), ("µs", 1e-6), ("ms", 1e-3), ("s", 1.0), ("m", 60.0), ("h", 3600.0))

State = Literal["stopped", "loading", "ready", "leaving"]
"""`leaving`: it takes no more requests, finishes those it has, and stops."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One model as the policy sees it. `need_bytes` is what it takes of the memory while it is not stopped.

    `waiting_since_s`: when the first of those who wait for it came; infinite where nobody does.
    """

    name: str
    state: State
    need_bytes: int
    busy: int = 0
    idle_since_s: float = 0.0
    keep_alive_s: float = DEFAULT_KEEP_ALIVE_S
    waiting_since_s: float = math.inf

    def idle_first(self) -> tuple[bool, bool, float]:
        return self.busy > 0, math.isinf(self.keep_alive_s), self.idle_since_s


@dataclass(frozen=True, slots=True)
class Step:
    """What to do now for a model that is wanted: start it, or wait, while those in `unload` leave."""

    start: bool
    unload: tuple[str, ...] = ()


def next_step(wanted: Seen, others: Sequence[Seen], budget_bytes: int, waited_s: float) -> Step:
    """Room is made by the least recently used ones: first idle ones, those that were to stay last.

    One that is busy is asked to leave only for somebody who has waited for a while. Nobody takes the room of a model
    that was wanted before: with many requests for one and few for another, the few would wait for ever.
    """
    held = [each for each in others if each.state != "stopped"]
    before = [e for e in others if e.state == "stopped" and e.waiting_since_s < wanted.waiting_since_s]
    staying = [e for e in held if e.state != "leaving"]
    if before and sum(e.need_bytes for e in (*staying, *before, wanted)) > budget_bytes:
        return Step(start=False)
    if sum(each.need_bytes for each in held) + wanted.need_bytes <= budget_bytes:
        return Step(start=True)
    short = sum(e.need_bytes for e in staying) + wanted.need_bytes - budget_bytes
    unload: list[str] = []
    for each in sorted((e for e in held if e.state == "ready"), key=Seen.idle_first):
        if short <= 0 or (each.busy and waited_s < BUSY_GRACE_S):
            break
        unload.append(each.name)
        short -= each.need_bytes
    return Step(start=False, unload=tuple(unload))


def expired(models: Sequence[Seen], now_s: float) -> list[str]:
    """Those that nobody asked for as long as they were to stay."""
    return [
        each.name
        for each in models
        if each.state == "ready" and not each.busy and now_s - each.idle_since_s >= each.keep_alive_s
    ]


def keep_alive_s(given: Any) -> float:
    """Seconds, from Ollama's ways to write them: a number, or `1h30m`; below zero is for ever."""
    if isinstance(given, int | float) and not isinstance(given, bool):
        return math.inf if given < 0 or math.isnan(given) else float(given)
    text = str(given).strip()
    try:
        return keep_alive_s(float(text))
    except ValueError:
        pass
    parts = _PART.findall(text)
    if not parts or text.lstrip("+-") != "".join(number + unit for number, unit in parts):
        raise BadRequest(f"keep_alive {text[:40]!r} is no duration: 5m, 300, 0 or -1", param="keep_alive")
    seconds = sum(float(number) * dict(_UNITS_S)[unit] for number, unit in parts)
    return math.inf if text.startswith("-") else seconds
