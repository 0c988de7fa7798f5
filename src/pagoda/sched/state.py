"""What the scheduler knows of one request between steps."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pagoda.arch.vision_spec import Vision
from pagoda.sched.blocks import chain_hashes, root_hash
from pagoda.sched.draft import Drafter
from pagoda.sched.forbidden import ForbiddenRuns
from pagoda.sched.pooled import Pool, PoolKind
from pagoda.sched.sight import Sight, seen_in_blocks
from pagoda.types import BLOCK_SIZE, Float32, Int32, Request, SamplingParams, TokenLogprob

Bias = tuple[Int32, Float32]
Mask = npt.NDArray[np.uint32]


class Grammar(Protocol):
    """What one output must match, and where it is in that; `pagoda.text.matcher.Matcher` is one."""

    @property
    def error(self) -> str:
        """Why nothing can follow any more, "" while all is well."""
        ...

    def masks(self, drafts: Seq[int]) -> list[Mask]:
        """The tokens that may come next, and behind each of the drafts, which are such as it allows."""
        ...

    def forced(self, most: int) -> list[int]:
        """The tokens of the text that must come next, as far as it is certain, and as they are usually cut."""
        ...

    def advance(self, token_ids: Seq[int]) -> bool:
        """Take in what was sampled; True if the output is complete and nothing can follow."""
        ...


class History:
    """Which tokens the penalties apply to, and how often each is in the output; kept up to date, not recounted."""

    def __init__(self, seen: list[int], output: list[int]) -> None:
        ids = list(dict.fromkeys([*seen, *output]))
        self._place = {token: place for place, token in enumerate(ids)}
        self._ids = np.array(ids, np.int32)
        self._counts = np.zeros(len(ids), np.int32)
        for token in output:
            self._counts[self._place[token]] += 1

    def add(self, token: int) -> None:
        place = self._place.get(token)
        if place is None:
            place = self._place[token] = len(self._place)
            if place == len(self._ids):
                self._ids, self._counts = (np.resize(a, 2 * place + 16) for a in (self._ids, self._counts))
            self._ids[place], self._counts[place] = token, 0
        self._counts[place] += 1

    def arrays(self) -> tuple[Int32, Int32]:
        size = len(self._place)
        return self._ids[:size], self._counts[:size]


class Sequence:
    """A request with its known tokens (prompt, then output), how many of them are computed, and what it holds."""

    __slots__ = (
        "_bias",
        "_first_bias",
        "_min_len",
        "alive",
        "begins",
        "blocks",
        "cached_tokens",
        "computed",
        "drafter",
        "end",
        "forbidden",
        "grammar",
        "hashes",
        "history",
        "known",
        "leaves",
        "mask",
        "moves",
        "offered",
        "order",
        "params",
        "place",
        "pool",
        "promised",
        "prompt_len",
        "prompt_scores",
        "request",
        "request_id",
        "shared",
        "sight",
        "slot",
        "started",
        "stop_ids",
    )

    def __init__(
        self,
        request: Request,
        arrival: int,
        max_model_len: int,
        vocab_size: int,
        grammar: Grammar | None = None,
        vision: Vision | None = None,
    ) -> None:
        params = request.params
        self.request = request
        self.request_id = request.request_id
        self.params = params
        self.order = (request.priority, arrival)
        self.known = [*request.prompt_token_ids, *request.output_token_ids]
        self.prompt_len = len(request.prompt_token_ids)
        self.end = (
            max_model_len if params.max_tokens is None else min(max_model_len, self.prompt_len + params.max_tokens)
        )
        self.computed = 0
        self.promised = 0  # of `known`, how many at its end stand for tokens of a step in flight
        self.blocks: list[int] = []
        self.hashes: list[bytes] = []
        # of a recurrent model, see sched.states
        self.begins = -1  # the place of the state that its next turn begins with
        self.leaves: list[int] = []  # positions where it is to leave one
        self.moves = b""  # the hash of the one behind its output
        self.shared = 0  # how many of its tokens the cache has
        self.offered = 0  # how many of its blocks were made findable, or could be
        self.slot = -1
        self.place = -1  # of its adapter
        self.alive = True
        self.cached_tokens = -1  # not looked up yet
        # A resumed request told all of this in its earlier life.
        self.started = bool(request.output_token_ids)
        scored = params.prompt_logprobs is not None and not self.started
        self.prompt_scores: list[TokenLogprob | None] | None = [None] if scored else None
        self.stop_ids = frozenset(params.stop_token_ids + (() if params.ignore_eos else request.eos_token_ids))
        self._min_len = self.prompt_len + params.min_tokens
        self._bias = _bias(params, frozenset())
        self._first_bias = _bias(params, self.stop_ids) if params.min_tokens else None
        self.forbidden = ForbiddenRuns(run for run in params.bad_words_token_ids if len(run) > 1)
        self.mask = _mask(params.allowed_token_ids, vocab_size)
        if self.forbidden and self.mask is None:
            self.mask = _mask(range(vocab_size), vocab_size)
        self.grammar = grammar
        self.history = _history(request)
        self.drafter: Drafter | None = None
        self.pool: Pool | None = None
        self.sight = Sight(request, vision) if vision is not None and request.images else None

    def pool_as(self, kind: PoolKind) -> None:
        """It gives a vector, and ends with its prompt."""
        self.end = self.prompt_len
        self.pool = Pool(kind, self.prompt_len)

    @property
    def bias(self) -> Bias | None:
        return self._first_bias if len(self.known) < self._min_len else self._bias

    @property
    def told_top(self) -> int:
        """How many of the likeliest tokens are told of with each of its own; -1: no log-probability is told."""
        if self.params.logprob_token_ids:
            return 0
        return -1 if self.params.logprobs is None else self.params.logprobs

    @property
    def samples_alike(self) -> bool:
        """True if what sampling does to the logits no longer depends on how many tokens there are, or which.

        A grammar does depend on them: it gives each row a mask of its own.
        """
        return self.history is None and (self._first_bias is None or len(self.known) >= self._min_len)

    @property
    def ends_in_flight(self) -> bool:
        """The token that a step in flight samples will be its last."""
        return self.promised > 0 and len(self.known) >= self.end

    def assume(self, turn: Turn, row: int) -> None:
        """Take a turn in flight as done; the token it samples, at a row of its step, as -1 - row."""
        self.computed += turn.count
        if turn.samples:
            self.known.append(-1 - row)
            self.promised = 1

    def unassume(self, turn: Turn) -> None:
        """Undo `assume`: the turn's result is here."""
        self.computed -= turn.count
        if turn.samples:
            self.known.pop()
            self.promised = 0

    def masks(self, drafts: Seq[int]) -> list[Mask]:
        """The tokens that its next one may be, and those behind each draft; none: all may."""
        if self.grammar is None:
            found = [] if self.mask is None else [self.mask] * (1 + len(drafts))
        else:
            found = self.grammar.masks(drafts)
            found = found if self.mask is None else [each & self.mask for each in found]
        if not self.forbidden:
            return found
        output = self.known[max(self.prompt_len, len(self.known) - self.forbidden.longest) :]
        return [_without(*each) for each in zip(found, self.forbidden.next(output, drafts), strict=True)]

    def reusable_len(self) -> int:
        """How many known tokens may come from the cache: the next logits wanted must still be computed."""
        if self.pool is not None:
            return self.pool.reusable_len()
        if self.prompt_scores is not None and len(self.prompt_scores) < self.prompt_len:
            return len(self.prompt_scores) - 1
        return len(self.known) - 1

    def hash_blocks(self, count: int) -> list[bytes]:
        """The hashes of the first `count` blocks of known tokens."""
        done = len(self.hashes)
        if done < count:
            parent = self.hashes[-1] if done else root_hash(self.request.cache_salt, self.request.adapter)
            seen = seen_in_blocks(self.request.images, done)
            self.hashes += chain_hashes(parent, self.known[done * BLOCK_SIZE : count * BLOCK_SIZE], seen)
        return self.hashes[:count]

    def scoring(self, count: int) -> range:
        """Places of the prompt tokens that the next `count` computed tokens give log-probabilities for."""
        if self.prompt_scores is None:
            return range(0)
        return range(len(self.prompt_scores), min(self.prompt_len, self.computed + count + 1))


@dataclass(slots=True)
class Turn:
    """A request's part in one step: it computes `count` tokens, scores given ones, and may sample one.

    `pooled` are the positions whose hidden states it needs. `drafts` are fed behind the known tokens; each gives a row
    to sample too, that counts if the draft was right.
    """

    seq: Sequence
    count: int
    scoring: range
    samples: bool
    drafts: Seq[int] = ()
    pooled: range = range(0)
    kept: tuple[int, int, int] | None = None  # see StepPlan.kept

    @property
    def steady(self) -> bool:
        """A stream's next token, sampled as the one before: of the plan only that token and its position are new."""
        seq = self.seq
        plain = seq.bias is None and seq.history is None and seq.mask is None and seq.grammar is None and not self.named
        alone = self.count == 1 and not self.scoring and not self.drafts
        return plain and self.samples and alone and self.kept is None

    @property
    def foreseeable(self) -> bool:
        """What comes of it changes nothing in the request's next turn but the token itself."""
        seq = self.seq
        plain = seq.history is None and seq.grammar is None and not seq.forbidden
        return plain and seq.pool is None and not self.scoring

    @property
    def sampled_rows(self) -> int:
        return 1 + len(self.drafts) if self.samples else 0

    @property
    def named(self) -> Seq[int]:
        """Tokens that are scored in the place of the sampled one."""
        return self.seq.params.logprob_token_ids if self.samples else ()

    @property
    def rows(self) -> int:
        """Its rows in the step's result."""
        return len(self.scoring) + self.sampled_rows + len(self.named) + len(self.pooled)


def turn_of(seq: Sequence, count: int) -> Turn:
    """The part of a request that computes `count` of its known tokens."""
    samples = seq.computed + count == len(seq.known) < seq.end
    pooled = range(0) if seq.pool is None else seq.pool.wanted(seq.computed, count)
    return Turn(seq, count, seq.scoring(count), samples, pooled=pooled)


def _bias(params: SamplingParams, forbidden: frozenset[int]) -> Bias | None:
    bad = [run[0] for run in params.bad_words_token_ids if len(run) == 1]
    values = {**(params.logit_bias or {}), **dict.fromkeys([*bad, *forbidden], -np.inf)}
    if not values:
        return None
    return np.array(list(values), np.int32), np.array(list(values.values()), np.float32)


def _mask(allowed: Seq[int] | None, vocab_size: int) -> Mask | None:
    if allowed is None:
        return None
    bits = np.zeros(mask_words(vocab_size) * 32, np.uint8)
    bits[list(allowed)] = 1
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32, copy=False)


def _without(mask: Mask, forbidden: list[int]) -> Mask:
    if not forbidden:
        return mask
    mask = mask.copy()
    for token in forbidden:
        mask[token >> 5] &= ~np.uint32(1 << (token & 31))
    return mask


def mask_words(vocab_size: int) -> int:
    return (vocab_size + 31) // 32


def _history(request: Request) -> History | None:
    params = request.params
    if params.repetition_penalty != 1:
        return History(request.prompt_token_ids, request.output_token_ids)
    if params.presence_penalty or params.frequency_penalty:
        return History([], request.output_token_ids)
    return None


class Proposer(Protocol):
    """Guesses tokens by other means than the text so far.

    `rounds`: tokens and seconds of each time that it guessed one token more for all streams, in the last call.
    """

    rounds: list[tuple[int, float]]

    def propose(self, wanted: list[tuple[Sequence, int]]) -> list[list[int]]:
        """For each stream at most so many tokens that may follow what it knows."""
        ...
