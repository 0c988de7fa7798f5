"""A smaller model that guesses the next tokens of streams: its own executor and cache, run between the steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import msgspec

from pagoda.arch.memory import blocks_for
from pagoda.arch.registry import load_spec
from pagoda.arch.spec import ModelSpec
from pagoda.backend.base import Capacity, Limits
from pagoda.backend.select import load_executor
from pagoda.engine.draft_limits import CATCH_UP_TOKENS, draft_limits
from pagoda.errors import ConfigError
from pagoda.options.speculation import Speculation
from pagoda.sched.batch import Batch
from pagoda.sched.blocks import BlockPool
from pagoda.sched.state import Sequence, Turn
from pagoda.text.tokenizer import load_tokenizer
from pagoda.weights.open import open_source
from pagoda.weights.quantization import check_quantization
from pagoda.weights.source import TensorSource

_REMEDY = "Give a smaller model of the same family, or leave --speculative-config out"

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Follower:
    """The draft model's side of a stream; `agreed` of its known tokens are certainly the stream's."""

    seq: Sequence
    agreed: int = 0


class DraftModel:
    """See sched.scheduler.Proposer. It samples as the stream does, with its seed: so seeded answers are guessed too.

    A stream whose context it cannot hold, or that finds no blocks, is left without guesses. What it computed for
    tokens that were not chosen is computed again.
    """

    def __init__(
        self, speculation: Speculation, device: str, limits: Limits, source: TensorSource, spec: ModelSpec
    ) -> None:
        path = speculation.model or ""
        self._source = open_source(path)
        check_quantization(self._source, speculation.quantization)
        own = load_spec(self._source)
        if own.recurrent:
            raise ConfigError(f"a model of the kind {own.model_type} cannot make drafts", remedy=_REMEDY)
        _check_vocabulary(self._source, own, source, spec)
        limits, _ = draft_limits(speculation, limits, own)
        self._length = limits.max_model_len
        self._executor = load_executor(device, own, self._source, limits)
        self._vocab_size = own.vocab_size
        self._batch = Batch(limits.max_num_seqs, self._length, own.vocab_size)
        self._pool = BlockPool(self.capacity.num_blocks)
        self._followers: dict[Sequence, _Follower] = {}
        self._steps = 0
        self.rounds: list[tuple[int, float]] = []

    @property
    def capacity(self) -> Capacity:
        return self._executor.capacity

    @property
    def unseen_bytes(self) -> int:
        """Memory that is promised and not yet in use, so that the system still counts it as free."""
        return self.capacity.kv_bytes + self.capacity.activation_bytes

    def propose(self, wanted: Seq[tuple[Sequence, int]]) -> list[list[int]]:
        """Up to so many tokens behind what each stream knows; none where the draft model is not that far yet."""
        self._forget_the_gone()
        self.rounds = []
        followers = [self._follow(stream, most) for stream, most in wanted]
        turns: list[Turn] = []
        budget = CATCH_UP_TOKENS
        for follower in followers:
            if follower is not None and budget > 0:
                seq = follower.seq
                lacks = len(seq.known) - seq.computed
                count = min(lacks, budget)
                turns.append(Turn(seq, count, range(0), samples=count == lacks))
                budget -= count
        try:
            self._guess(turns, {f.seq: most for f, (_, most) in zip(followers, wanted, strict=True) if f is not None})
        except Exception:  # whatever it was: the model needs no guesses
            _log.exception("the draft model failed in a step, which goes on without it")
            self._followers.clear()
            self._pool = BlockPool(self.capacity.num_blocks)
            return [[] for _ in wanted]
        return [[] if f is None else f.seq.known[f.agreed :] for f in followers]

    def _guess(self, turns: list[Turn], most: dict[Sequence, int]) -> None:
        """Token after token for all streams together, until each has as many as it may try."""
        while turns:
            self._steps += 1
            started = time.monotonic()
            result = self._executor.launch(self._batch.plan(self._steps, turns, alone=True)).wait()
            if all(turn.samples for turn in turns):  # else it reads what it has not followed
                self.rounds.append((sum(turn.count for turn in turns), time.monotonic() - started))
            rows = zip(result.tokens.tolist(), result.ok.tolist(), strict=True)
            going_on = []
            for turn in turns:
                seq = turn.seq
                seq.computed += turn.count
                if not turn.samples:
                    continue
                token, ok = next(rows)
                if not ok:
                    continue
                seq.known.append(token)
                most[seq] -= 1
                if most[seq] > 0:
                    going_on.append(Turn(seq, 1, range(0), samples=True))
            turns = going_on

    def _follow(self, stream: Sequence, most: int) -> _Follower | None:
        """The follower with the stream's tokens and blocks for `most` more; None where that cannot be."""
        end = len(stream.known) + most
        if most <= 0 or end > self._length:
            return None
        follower = self._followers.get(stream)
        held = 0 if follower is None else len(follower.seq.blocks)
        missing = max(0, blocks_for(end) - held)
        if missing > self._pool.free:
            return None
        if follower is None:
            follower = self._followers[stream] = self._new_follower(stream)
        seq = follower.seq
        same = follower.agreed
        while same < min(seq.computed, len(stream.known)) and seq.known[same] == stream.known[same]:
            same += 1
        seq.known[same:] = stream.known[same:]
        follower.agreed = len(seq.known)
        seq.computed = min(seq.computed, same, len(seq.known) - 1)
        self._batch.add_blocks(seq, self._pool.take(missing))
        return follower

    def _new_follower(self, stream: Sequence) -> _Follower:
        params = msgspec.structs.replace(stream.params, logprobs=None, prompt_logprobs=None)
        request = msgspec.structs.replace(stream.request, params=params, images=[])  # it sees nothing
        seq = Sequence(request, 0, self._length, self._vocab_size)
        seq.slot = stream.slot
        self._batch.seat(seq)
        return _Follower(seq)

    def _forget_the_gone(self) -> None:
        for stream, follower in list(self._followers.items()):
            if not stream.alive or stream.slot != follower.seq.slot:
                self._pool.release(follower.seq.blocks)
                del self._followers[stream]

    def close(self) -> None:
        self._executor.close()
        self._source.close()


def _check_vocabulary(draft: TensorSource, draft_spec: ModelSpec, source: TensorSource, spec: ModelSpec) -> None:
    """ConfigError unless each token means the same to both models."""
    if draft_spec.vocab_size != spec.vocab_size:
        raise ConfigError(
            f"--speculative-config: the draft model knows {draft_spec.vocab_size} tokens, the model {spec.vocab_size}; "
            "they must have the same vocabulary",
            remedy=_REMEDY,
        )
    ours, theirs = (load_tokenizer(one.path, one.metadata) for one in (source, draft))
    for token in range(spec.vocab_size):
        if ours.token_bytes(token) != theirs.token_bytes(token):
            raise ConfigError(
                f"--speculative-config: token {token} is {theirs.token_text(token)!r} to the draft model and "
                f"{ours.token_text(token)!r} to the model; they must have the same vocabulary",
                remedy=_REMEDY,
            )
