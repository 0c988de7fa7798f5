"""Learns what a step costs, and how many prompt tokens fit into one beside running streams."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import sqrt
from operator import mul

from pagoda.types import BLOCK_SIZE

_UNLIMITED = 2**31
_SWEEPS = 40
_SETTLED = 0.003
_TRUSTED_AFTER = 4  # steps
_OUTLIER = 3.0
_ASIDE_S = 0.05  # where no target is set
_STREAM_MEMORY, _PROMPT_MEMORY = 0.98, 0.9
_RECENT = 3  # steps: one alone may have met anything


@dataclass(slots=True)
class Load:
    """What makes a step long: tokens of streams, tokens of prompts, and pairs of a token and one that it attends to."""

    streams: int = 0
    prompts: int = 0
    pairs: float = 0.0

    def add_stream(self, context: int, count: int = 1) -> None:
        self.streams += count
        self.pairs += count * (context + count / 2)

    def add_prompt(self, context: int, count: int) -> None:
        self.prompts += count
        self.pairs += count * (context + count / 2)


class LinearCost:
    """Seconds as a sum of costs that are never negative, fitted to what was measured; old steps fade.

    Least squares of the relative error by coordinate descent from the last solution. What the measurements leave
    open stays as it was, and at first the cost is all put on the first feature that can carry it.
    """

    def __init__(self, features: int, memory: float) -> None:
        self._memory = memory
        self._moments = [[0.0] * features for _ in range(features)]
        self._products = [0.0] * features
        self.costs = [0.0] * features
        self.steps = 0

    def predict(self, *features: float) -> float:
        total: float = sum(map(mul, self.costs, features))
        return total

    def learn(self, seconds: float, *features: float) -> None:
        if self.steps >= _TRUSTED_AFTER:  # another process took the core: it must not shrink chunks for long
            seconds = min(seconds, _OUTLIER * self.predict(*features))
        if seconds <= 0:
            return
        self.steps += 1
        scaled = [value / seconds for value in features]
        for i, (row, x) in enumerate(zip(self._moments, scaled, strict=True)):
            row[:] = [self._memory * moment + x * y for moment, y in zip(row, scaled, strict=True)]
            self._products[i] = self._memory * self._products[i] + x
        for _ in range(_SWEEPS):
            if self._sweep():
                break

    def _sweep(self) -> bool:
        """Put each cost where it fits best beside the others; True when none moved by much."""
        costs, settled = self.costs, True
        for i, row in enumerate(self._moments):
            if row[i] > 0:
                before = costs[i]
                costs[i] = max(0.0, before + (self._products[i] - sum(map(mul, row, costs))) / row[i])
                settled = settled and abs(costs[i] - before) <= _SETTLED * before
        return settled


class Pace:
    """Keeps steps with running streams below `target_s`, or twice what the streams need alone where that is longer.

    Steps of streams alone and steps with prompts are fitted apart: their tokens differ in cost, and a long time of
    one kind must not wash out what is known of the other. The order of features decides what is believed at first:
    that a stream's further token is cheap, and that each prompt token has its full price.

    What is fitted is work, the processor time of a step where that is known: it stays the same when other processes
    take a part of the cores. How much time work takes is known from the last few steps, of whichever kind.
    """

    def __init__(self, target_s: float | None) -> None:
        self._target_s = target_s
        self._of_streams = LinearCost(3, _STREAM_MEMORY)
        self._of_prompts = LinearCost(4, _PROMPT_MEMORY)
        self._paces: deque[float] = deque(maxlen=_RECENT)

    def observe(self, load: Load, seconds: float, work_s: float | None = None) -> None:
        work_s = work_s or seconds
        if work_s > 0:
            self._paces.append(seconds / work_s)
        if load.prompts:
            self._of_prompts.learn(work_s, load.prompts, load.pairs, load.streams, 1)
        else:
            self._of_streams.learn(work_s, 1, load.streams, load.pairs)

    @property
    def _pace(self) -> float:
        """Seconds for a second of work."""
        return sorted(self._paces)[len(self._paces) // 2] if self._paces else 1.0

    def streams_s(self, load: Load) -> float:
        """Predicted time of a step of streams alone; 0 when none was seen yet."""
        return self._pace * self._of_streams.predict(1, load.streams, load.pairs)

    def stream_token_s(self, context: int) -> float:
        """What one token more costs in a step of streams, at position `context` of its request."""
        _, each, per_pair = self._of_streams.costs
        return self._pace * (each + per_pair * context)

    def aside_s(self, load: Load) -> float:
        """How long something else may take between steps that have this load."""
        streams_s = self.streams_s(load)
        return max((self._target_s or _ASIDE_S) - streams_s, streams_s)

    def prompt_tokens(self, load: Load, context: int) -> int:
        """How many tokens of a prompt, the first at position `context`, may join a step that has this load so far.

        Sums of whole blocks, and at least one block for each step: prompts never starve.
        """
        if self._target_s is None or not load.streams or not self._of_prompts.steps:
            return _UNLIMITED
        each, per_pair, _, _ = self._of_prompts.costs
        target_s = max(self._target_s, 2 * self.streams_s(load)) / self._pace
        room_s = max(0.0, target_s - self._of_prompts.predict(load.prompts, load.pairs, load.streams, 1))
        # room_s = n * linear + n * n / 2 * per_pair, solved for n
        linear = each + per_pair * context
        slope = linear + sqrt(linear * linear + 2 * per_pair * room_s)
        most = load.prompts + min(_UNLIMITED, int(2 * room_s / slope) if slope > 0 else _UNLIMITED)
        return max(most - most % BLOCK_SIZE, BLOCK_SIZE) - load.prompts
