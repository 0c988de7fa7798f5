"""Runs of tokens that an output must not hold: which token would complete one."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq


class ForbiddenRuns:
    """Runs of two tokens and more, by all but their last: finding out costs the same for one and for hundreds."""

    def __init__(self, runs: Iterable[tuple[int, ...]]) -> None:
        self._lasts: dict[tuple[int, ...], list[int]] = {}
        for run in runs:
            self._lasts.setdefault(run[:-1], []).append(run[-1])
        self._lengths = sorted({len(begun) for begun in self._lasts})
        self.longest = max(self._lengths, default=0)
        """How many tokens of the output's end count."""

    def __bool__(self) -> bool:
        return self.longest > 0

    def next(self, output: Seq[int], drafts: Seq[int]) -> list[list[int]]:
        """The tokens that must not come behind the output, and behind each of the drafts."""
        tail = [*output[-self.longest :], *drafts]
        first = len(tail) - len(drafts)
        return [self._behind(tail[max(0, end - self.longest) : end]) for end in range(first, len(tail) + 1)]

    def _behind(self, tail: list[int]) -> list[int]:
        found: list[int] = []
        for length in self._lengths:
            if length > len(tail):
                break
            found += self._lasts.get(tuple(tail[-length:]), ())
        return found
