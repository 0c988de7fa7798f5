"""Beam search: which beginnings of an answer are kept and which are done, from the likeliest next tokens of each."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pagoda.engine.llm_inputs import Encoded
from pagoda.engine.outputs import Logprob, RequestOutput
from pagoda.errors import BadRequest, EngineError
from pagoda.text.tokenizer import Tokenizer
from pagoda.types import MAX_LOGPROBS, SamplingParams

Nexts = Mapping[int, Logprob]
"""The likeliest tokens at one place."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BeamSearchParams:
    """How to search; names and meaning as in vLLM. `temperature` has no effect: log-probabilities are the model's."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def step(self) -> SamplingParams:
        """What one step asks for each beginning: twice as many candidates as are kept, for some end the answer."""
        most = MAX_LOGPROBS // 2
        if not 1 <= self.beam_width <= most:
            raise BadRequest(f"the beam width must be between 1 and {most}", param="beam_width")
        if self.max_tokens < 1:
            raise BadRequest("max_tokens must be at least 1", param="max_tokens")
        return SamplingParams(temperature=0.0, max_tokens=1, logprobs=2 * self.beam_width)


@dataclass(slots=True)
class BeamSearchSequence:
    """One answer. `tokens` are the prompt's and its own; `text` is made when the search is over."""

    tokens: list[int]
    logprobs: list[Nexts] = field(default_factory=list)
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True, slots=True)
class BeamSearchOutput:
    """The best answers to one prompt, best first."""

    sequences: list[BeamSearchSequence]


class BeamSearch:
    """The search for one prompt, of at most `most` tokens: ask for what comes after each of `live`, and `take` it."""

    def __init__(self, prompt: Sequence[int], params: BeamSearchParams, eos: Sequence[int], most: int) -> None:
        self.live = [BeamSearchSequence(list(prompt))]
        self._params = params
        self._eos = frozenset(() if params.ignore_eos else eos)
        self._left = most
        self._done: list[BeamSearchSequence] = []

    def take(self, nexts: Sequence[Nexts]) -> None:
        """One more token for each beginning; only the likeliest ones stay."""
        candidates: list[tuple[float, int, int]] = []
        for number, (beam, tokens) in enumerate(zip(self.live, nexts, strict=True)):
            for token, entry in tokens.items():
                if token in self._eos:
                    self._done.append(self._ended(beam, token, entry.logprob, tokens))
                else:
                    candidates.append((beam.cum_logprob + entry.logprob, -number, token))
        kept = heapq.nlargest(self._params.beam_width, candidates)
        self.live = [self._longer(self.live[-number], token, total, nexts[-number]) for total, number, token in kept]
        self._left -= 1
        if self._left == 0:
            self._done += self.live
            self.live = []

    def _longer(self, beam: BeamSearchSequence, token: int, total: float, nexts: Nexts) -> BeamSearchSequence:
        reason = "length" if self._left == 1 else None
        return BeamSearchSequence([*beam.tokens, token], [*beam.logprobs, nexts], total, finish_reason=reason)

    def _ended(self, beam: BeamSearchSequence, token: int, logprob: float, nexts: Nexts) -> BeamSearchSequence:
        tokens = [*beam.tokens, token] if self._params.include_stop_str_in_output else beam.tokens
        total = beam.cum_logprob + logprob
        return BeamSearchSequence(list(tokens), [*beam.logprobs, nexts], total, finish_reason="stop", stop_reason=token)

    def best(self) -> list[BeamSearchSequence]:
        """The best of all that ended, by their mean log-probability, as far as the penalty goes."""

        def score(beam: BeamSearchSequence) -> float:
            length = len(beam.tokens) - (beam.tokens[-1] in self._eos)
            return beam.cum_logprob / math.pow(max(1, length), self._params.length_penalty)

        return sorted(self._done, key=score, reverse=True)[: self._params.beam_width]


def _next_tokens(answer: RequestOutput) -> Nexts:
    """What one step told of the next token."""
    (output,) = answer.outputs
    if not output.logprobs:
        raise EngineError(output.error or "the engine could not finish this request")
    return output.logprobs[0]


def search(
    prompts: Sequence[Encoded],
    params: BeamSearchParams,
    step: SamplingParams,
    eos: Sequence[int],
    max_model_len: int,
    run: Callable[[list[Encoded], list[SamplingParams], bool], list[RequestOutput]],
    tokenizer: Tokenizer,
) -> list[BeamSearchOutput]:
    """The best answers to each prompt; `run` does a `step` for the beginnings of all prompts at once."""
    most = [min(params.max_tokens, max_model_len - len(prompt.ids)) for prompt in prompts]
    searches = [BeamSearch(prompt.ids, params, eos, each) for prompt, each in zip(prompts, most, strict=True)]
    both = list(zip(searches, prompts, strict=True))
    while asked := [replace(prompt, text=None, ids=beam.tokens) for one, prompt in both for beam in one.live]:
        told = map(_next_tokens, run(asked, [step] * len(asked), False))
        for one in searches:
            if one.live:
                one.take([next(told) for _ in one.live])
    outputs = [BeamSearchOutput(one.best()) for one in searches]
    for beam in (beam for output in outputs for beam in output.sequences):
        beam.text = tokenizer.decode(beam.tokens, skip_special_tokens=params.skip_special_tokens)
    return outputs
