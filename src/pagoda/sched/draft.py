"""Guesses a request's next tokens by looking up where its last ones occurred before, and how far it pays to try them.

Nothing here can change an answer: guesses are fed behind the last token, and only those that equal what the model
samples at their place are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pagoda.options.speculation import Speculation
from pagoda.sched.pace import LinearCost, Load, Pace

_READ_AT_ONCE = 1024  # tokens: a long prompt is read over several steps, none of which waits for it
_FIRST_RATE, _FORCED_RATE, _RATE_WEIGHT = 0.3, 0.9, 0.2
_FIRST_MODEL_RATE, _MODEL_RATE_WEIGHT, _FORGOTTEN = 0.7, 0.08, 0.02
_ROUND_MEMORY = 0.98
_MOST_STREAMS = 2
_LEAST_GAIN = 1.05

Forced = Callable[[int], list[int]]
"""At most so many tokens that a grammar asks for next."""


class Drafter:
    """One request's tokens by what came before them, and how often its guesses came true, fed or not."""

    def __init__(self, config: Speculation) -> None:
        self._sizes = range(config.lookup_max, config.lookup_min - 1, -1)
        self._place_after: dict[tuple[int, ...], int] = {}
        self._read = 0
        self._guess: list[int] = []
        text = config.model is None
        self.rate, self._weight = (_FIRST_RATE, _RATE_WEIGHT) if text else (_FIRST_MODEL_RATE, _MODEL_RATE_WEIGHT)

    def guess(self, known: list[int], count: int) -> list[int]:
        """The `count` tokens that followed the longest end of `known` when it was last seen; [] when it is new."""
        self._read_on(known)
        self._guess = self._look_up(known, count) if self._read == len(known) else []
        return self._guess

    def expect(self, guess: list[int]) -> list[int]:
        """A guess from elsewhere takes the place of the look-up."""
        self._guess = guess
        return guess

    def take(self, guess: list[int]) -> list[int]:
        """A guess that a draft model made."""
        self._guess = guess
        if not guess:  # what was learned of this text gets old
            self.rate += _FORGOTTEN * (_FIRST_MODEL_RATE - self.rate)
        return guess

    def hear(self, tokens: list[int]) -> None:
        """The tokens that came in place of the last guess."""
        for guessed, token in zip(self._guess, tokens, strict=False):
            self.rate += self._weight * ((guessed == token) - self.rate)
            if guessed != token:
                break
        self._guess = []

    def _read_on(self, known: list[int]) -> None:
        end = min(len(known), self._read + _READ_AT_ONCE)
        for place in range(self._read, end):
            for size in self._sizes:
                if size <= place:
                    self._place_after[tuple(known[place - size : place])] = place
        self._read = end

    def _look_up(self, known: list[int], count: int) -> list[int]:
        for size in self._sizes:
            place = self._place_after.get(tuple(known[-size:]))
            if place is not None:
                period = len(known) - place  # what runs into the end goes round: a repetition goes on
                return [known[place + i % period] for i in range(count)]
        return []


class Speculator:
    """Chooses how many guessed tokens a stream tries in a step, and counts them."""

    def __init__(self, config: Speculation, pace: Pace) -> None:
        self._config = config
        self._pace = pace
        self._rounds = LinearCost(2, _ROUND_MEMORY)
        self.drafts = 0
        self.draft_tokens = 0

    def most_streams(self) -> int | None:
        """More streams than this share the cost of a step better than guesses do; None: no such limit."""
        return None if self._config.asked_for else _MOST_STREAMS

    def observe(self, rounds: Sequence[tuple[int, float]]) -> None:
        """Tokens and seconds of rounds in which a draft model guessed one more token for each stream."""
        for tokens, seconds in rounds:
            self._rounds.learn(seconds, 1, tokens)

    def tokens_ahead(self, drafters: Sequence[Drafter], load: Load) -> int:
        """How many tokens a draft model should guess for each of these streams, so that the step yields the most."""
        step_s, streams = self._pace.streams_s(load), len(drafters)
        if self._config.always or step_s <= 0 or not self._rounds.steps:
            return self._config.num_tokens
        each_s = self._pace.stream_token_s(int(load.pairs / load.streams))
        more_s = self._rounds.predict(1, streams) + streams * each_s
        tokens, likely, best, best_count = float(streams), [1.0] * streams, _LEAST_GAIN, 0
        for count in range(1, self._config.num_tokens + 1):
            likely = [each * drafter.rate for each, drafter in zip(likely, drafters, strict=True)]
            tokens += sum(likely)
            gain = tokens / streams / (1 + count * more_s / step_s)
            if gain > best:
                best, best_count = gain, count
        return best_count

    def draft(
        self, drafter: Drafter, known: list[int], most: int, load: Load, forced: Forced | None = None
    ) -> list[int]:
        """At most `most` tokens to try behind `known` in a step that has this load so far.

        `forced` is what a grammar asks for there, in place of a guess.
        """
        count = self._config.num_tokens
        guess = drafter.guess(known, count) if forced is None else drafter.expect(forced(min(most, count)))
        most = min(most, len(guess))
        return guess[: most if self._config.always else self._worth(drafter.rate, len(known), most, load)]

    def count(self, draft: list[int]) -> None:
        """A draft that is tried."""
        self.drafts += 1
        self.draft_tokens += len(draft)

    def new_drafter(self, *, forced: bool = False) -> Drafter:
        """`forced`: of a request with a grammar, whose text is seldom cut in another way than it is usually."""
        drafter = Drafter(self._config)
        drafter.rate = _FORCED_RATE if forced else drafter.rate
        return drafter

    def _worth(self, rate: float, context: int, most: int, load: Load) -> int:
        """How many tokens make the step yield the most in its time."""
        step_s, each_s = self._pace.streams_s(load), self._pace.stream_token_s(context)
        if step_s <= 0:
            return 0
        tokens, likely, best, best_count = 1.0, 1.0, _LEAST_GAIN, 0
        for count in range(1, most + 1):
            likely *= rate
            tokens += likely
            gain = tokens / (1 + count * each_s / step_s)
            if gain > best:
                best, best_count = gain, count
        return best_count
