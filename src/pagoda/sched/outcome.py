"""Reads a step's result: appends tokens, finds out which requests end and why, makes their deltas."""

from __future__ import annotations

from collections.abc import Iterator

from pagoda.sched.draft import Drafter
from pagoda.sched.state import Sequence, Turn
from pagoda.types import Delta, FinishReason, StepResult, TokenLogprob

_NOTHING_LEFT = "it, allowed_token_ids and bad_words leave no token"
GRAMMAR_ENDED = "the grammar of this request cannot be followed any further"
NO_LOGITS = "the model produced no usable logits for this request"


class _Rows:
    """The result's rows as Python values: the arrays are converted once, log-probabilities only where asked for."""

    def __init__(self, result: StepResult) -> None:
        self._result = result
        self.tokens: list[int] = result.tokens.tolist()
        self.ok: list[int] = result.ok.tolist()
        self.hidden = result.hidden

    def logprob(self, row: int, top: int) -> TokenLogprob:
        ids = self._result.top_ids[row, :top].tolist()
        values = self._result.top_logprobs[row, :top].tolist()
        return TokenLogprob(self.tokens[row], float(self._result.logprobs[row]), list(zip(ids, values, strict=True)))

    def named(self, row: int, count: int) -> TokenLogprob:
        """With the tokens that were scored in the same place."""
        values = self._result.logprobs[row : row + 1 + count].tolist()
        top = list(zip(self.tokens[row + 1 : row + 1 + count], values[1:], strict=True))
        return TokenLogprob(self.tokens[row], values[0], top)


class Outcome:
    """Applies results to sequences, and counts the tokens that went in and out."""

    def __init__(self, pool_tokens: int) -> None:
        self._pool_tokens = pool_tokens
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.accepted_drafts = 0

    def read(self, turns: list[Turn], result: StepResult) -> Iterator[tuple[Sequence, Delta | None]]:
        """Each request of the step with its delta, None where it gained nothing that is told."""
        rows = _Rows(result)
        start = 0
        for turn in turns:
            if turn.seq.alive:
                yield turn.seq, self._advance(turn, rows, start)
            else:
                yield turn.seq, None
            start += turn.rows

    def _advance(self, turn: Turn, rows: _Rows, start: int) -> Delta | None:
        seq = turn.seq
        seq.computed += turn.count
        if seq.pool is not None:
            return self._pool(turn, rows, start)
        sampled = start + len(turn.scoring)
        if not all(rows.ok[start : sampled + turn.samples]):
            why = "" if seq.grammar is None else seq.grammar.error or (seq.mask is not None and _NOTHING_LEFT)
            error = f"{GRAMMAR_ENDED}: {why}" if why else NO_LOGITS
            return Delta(request_id=seq.request_id, finish_reason="error", error=error)
        if seq.prompt_scores is not None:
            top = seq.params.prompt_logprobs or 0
            seq.prompt_scores += (rows.logprob(row, top) for row in range(start, sampled))
        if seq.computed < len(seq.known):
            return None
        delta = Delta(request_id=seq.request_id)
        if turn.samples:
            self._append(seq, rows, sampled, delta)
            if seq.drafter is not None:
                self._accept(turn, rows, sampled, delta, seq.drafter)
        else:
            delta.finish_reason = "length"
        if not seq.started:
            self._start(seq, delta)
        return delta

    def _pool(self, turn: Turn, rows: _Rows, start: int) -> Delta | None:
        seq, end = turn.seq, start + turn.rows
        if seq.pool is None or rows.hidden is None or not all(rows.ok[start:end]):
            return Delta(request_id=seq.request_id, finish_reason="error", error=NO_LOGITS)
        seq.pool.take(seq.computed - turn.count, rows.hidden[start:end])
        if seq.computed < len(seq.known):
            return None
        delta = Delta(request_id=seq.request_id, finish_reason="stop", pooled=seq.pool.vector().tobytes())
        self._start(seq, delta)
        return delta

    def _accept(self, turn: Turn, rows: _Rows, row: int, delta: Delta, drafter: Drafter) -> None:
        """Go on while a draft is the token that was sampled in its place: the row behind it is as if it had been fed.

        A row without usable logits is left to the next step, that computes it as the last token.
        """
        seq = turn.seq
        for draft in turn.drafts:
            if delta.finish_reason is not None or rows.tokens[row] != draft or not rows.ok[row + 1]:
                break
            row += 1
            seq.computed += 1
            self.accepted_drafts += 1
            self._append(seq, rows, row, delta)
        drafter.hear(delta.token_ids)

    def _append(self, seq: Sequence, rows: _Rows, row: int, delta: Delta) -> None:
        token = rows.tokens[row]
        seq.known.append(token)
        if seq.history is not None:
            seq.history.add(token)
        self.generation_tokens += 1
        delta.token_ids.append(token)
        if seq.told_top >= 0:
            named = len(seq.params.logprob_token_ids)
            entry = rows.named(row, named) if named else rows.logprob(row, seq.told_top)
            delta.logprobs = [*(delta.logprobs or ()), entry]
        delta.finish_reason = self._finish_reason(seq, token)
        if delta.finish_reason == "stop" and token in seq.params.stop_token_ids and not _is_eos(seq, token):
            delta.stop_reason = token
        elif delta.finish_reason == "error":
            delta.error = f"the request grew past the {self._pool_tokens} tokens that the engine's memory holds"

    def _finish_reason(self, seq: Sequence, token: int) -> FinishReason | None:
        if token in seq.stop_ids or (seq.grammar is not None and seq.grammar.advance((token,))):
            return "stop"
        if len(seq.known) >= seq.end:
            return "length"
        return "error" if len(seq.known) > self._pool_tokens else None

    def _start(self, seq: Sequence, delta: Delta) -> None:
        """What a request tells once, with its first token."""
        seq.started = True
        delta.prompt_logprobs = seq.prompt_scores
        delta.cached_tokens = seq.cached_tokens
        self.prompt_tokens += seq.prompt_len


def _is_eos(seq: Sequence, token: int) -> bool:
    return not seq.params.ignore_eos and token in seq.request.eos_token_ids
