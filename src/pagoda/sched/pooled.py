"""How the hidden states of a request's tokens become its one vector, step by step."""

from __future__ import annotations

from typing import Literal

import numpy as np

from pagoda.types import Float32

PoolKind = Literal["cls", "mean", "last"]


class Pool:
    """What was taken so far of one request with `length` tokens, added up in the order of the tokens."""

    def __init__(self, kind: PoolKind, length: int) -> None:
        self._kind = kind
        self._length = length
        self._total: Float32 | None = None

    def reusable_len(self) -> int:
        """How many tokens need not be computed again if they are in the cache: it holds no hidden states."""
        return self._length - 1 if self._kind == "last" else 0

    def wanted(self, computed: int, count: int) -> range:
        """The positions among the next `count` whose hidden states are needed."""
        if self._kind == "mean":
            return range(computed, computed + count)
        place = 0 if self._kind == "cls" else self._length - 1
        return range(place, place + 1) if computed <= place < computed + count else range(0)

    def take(self, computed: int, hidden: Float32) -> None:
        """The hidden states of the wanted positions behind `computed`; 0 begins anew, as after a preemption."""
        if len(hidden):
            old = self._total if computed else None
            # row by row, so that the sum does not depend on how the prompt was cut
            self._total = (hidden if old is None else np.concatenate([old[None], hidden])).sum(axis=0)

    def vector(self) -> Float32:
        if self._total is None:
            raise ValueError("no hidden state was taken")
        return self._total / np.float32(self._length) if self._kind == "mean" else self._total
