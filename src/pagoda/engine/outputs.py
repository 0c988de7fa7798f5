"""What `LLM` answers: results under vLLM's names, put together from deltas."""

from __future__ import annotations

from dataclasses import dataclass, field

from pagoda.text.output import TextOutput
from pagoda.text.tokenizer import Tokenizer
from pagoda.types import Delta, FinishReason, Request, TokenLogprob


@dataclass(slots=True)
class Logprob:
    """Log-probability of one token; `rank` 1 is the likeliest, None where it was not among those asked for."""

    logprob: float
    rank: int | None
    decoded_token: str


@dataclass(slots=True)
class CompletionOutput:
    """One answer. `finish_reason` "error" comes with the reason in `error`."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """The answers to one prompt, `SamplingParams.n` of them."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0

    @property
    def finished(self) -> bool:
        return all(output.finished() for output in self.outputs)


class Answer:
    """Fills one CompletionOutput, and the prompt's part of its RequestOutput, from the deltas of a request."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        request: Request,
        whole: RequestOutput,
        index: int,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        self.output = whole.outputs[index]
        self._whole = whole
        self._tokenizer = tokenizer
        self._named = bool(request.params.logprob_token_ids)
        self._text = TextOutput(tokenizer, request, shown)
        self._pieces: list[str] = []
        self._told = (0, 0)  # pieces and tokens

    @property
    def done(self) -> bool:
        return self.output.finish_reason is not None

    @property
    def error(self) -> str | None:
        return self.output.error

    def feed(self, raw: Delta) -> bool:
        """Take in what came; True when the answer is complete, which a stop string may make it before the engine."""
        delta = self._text.feed(raw)
        output = self.output
        output.token_ids += delta.token_ids
        self._pieces.append(delta.text)
        if delta.logprobs is not None:
            output.logprobs = (output.logprobs or []) + [
                self._table(one, ranked=not self._named) for one in delta.logprobs
            ]
            output.cumulative_logprob = (output.cumulative_logprob or 0.0) + sum(one.logprob for one in delta.logprobs)
        if delta.prompt_logprobs is not None:
            self._whole.prompt_logprobs = [None if one is None else self._table(one) for one in delta.prompt_logprobs]
        self._whole.num_cached_tokens = max(self._whole.num_cached_tokens, delta.cached_tokens)
        if delta.finish_reason is None:
            return False
        output.text, output.stop_reason, output.error = "".join(self._pieces), delta.stop_reason, delta.error
        output.finish_reason = delta.finish_reason  # last: it says that the others are there
        return True

    def news(self) -> CompletionOutput | None:
        """What came since this was last asked for; None: nothing."""
        output, (pieces, tokens) = self.output, self._told
        reason = output.finish_reason  # first: another thread may be feeding
        self._told = len(self._pieces), len(output.token_ids)
        if self._told == (pieces, tokens) and reason is None:
            return None
        return CompletionOutput(
            output.index,
            "".join(self._pieces[pieces : self._told[0]]),
            output.token_ids[tokens : self._told[1]],
            finish_reason=reason,
            stop_reason=output.stop_reason,
            error=output.error,
        )

    def _table(self, one: TokenLogprob, *, ranked: bool = True) -> dict[int, Logprob]:
        text = self._tokenizer.token_text
        table = {i: Logprob(logprob, rank if ranked else None, text(i)) for rank, (i, logprob) in enumerate(one.top, 1)}
        table.setdefault(one.token_id, Logprob(one.logprob, None, text(one.token_id)))
        return table
