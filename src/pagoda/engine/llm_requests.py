"""What a call of `LLM` asks of the engine: checked parameters for each prompt, and a request for each answer to it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from pagoda.engine.llm_inputs import Encoded
from pagoda.engine.messages import ModelInfo
from pagoda.errors import BadRequest, ContextLengthExceeded
from pagoda.text.bad_words import with_bad_words
from pagoda.text.structured import structured_grammar
from pagoda.text.tokenizer import Tokenizer
from pagoda.types import Request, SamplingParams

SEED_STEP = 0x9E3779B97F4A7C15  # between the seeds of the n answers to one prompt; the server uses the same
_MASK_64 = 2**64 - 1

GivenParams = SamplingParams | Sequence[SamplingParams] | None


class Requests:
    """`seed` makes seeds repeatable that are drawn where none is given; `defaults` count where no parameters are."""

    def __init__(
        self,
        info: ModelInfo,
        tokenizer: Tokenizer,
        eos_token_ids: tuple[int, ...],
        defaults: Mapping[str, Any],
        max_logprobs: int,
        seed: int | None,
    ) -> None:
        self._info, self._tokenizer, self._eos_token_ids = info, tokenizer, eos_token_ids
        self._defaults, self._max_logprobs = defaults, max_logprobs
        self._seeds = random.Random(seed)

    def default_params(self) -> SamplingParams:
        return SamplingParams(**self._defaults)

    def params_for(self, given: GivenParams, count: int) -> Sequence[SamplingParams]:
        """One for each of so many prompts."""
        if given is None:
            given = self.default_params()
        if isinstance(given, SamplingParams):
            return [self.checked(given)] * count
        if len(given) != count:
            raise BadRequest(f"{count} prompts came with {len(given)} sampling_params", param="sampling_params")
        return [self.checked(one) for one in given]

    def checked(self, params: SamplingParams) -> SamplingParams:
        """The parameters in their types (vLLM takes one stop string, lists, None), and in their ranges."""
        values = msgspec.structs.asdict(params)
        if isinstance(params.stop, str):
            values["stop"] = (params.stop,)
        for name in ("stop", "stop_token_ids", "bad_words", "bad_words_token_ids", "logprob_token_ids"):
            values[name] = values[name] or ()
        try:
            params = msgspec.convert(values, SamplingParams)
        except msgspec.ValidationError as error:
            raise BadRequest(f"sampling_params: {error}", param="sampling_params") from None
        params.check(self._info.vocab_size, self._max_logprobs)
        params = with_bad_words(params, self._tokenizer)
        if (asked := params.structured_outputs) is None:
            return params
        grammar = structured_grammar(msgspec.structs.asdict(asked), self._tokenizer)
        return msgspec.structs.replace(params, grammar=grammar, structured_outputs=None)

    def of(self, name: str, prompt: Encoded, params: SamplingParams) -> list[Request]:
        """One for each answer to a prompt."""
        ids = prompt.ids
        room = self._info.max_model_len - len(ids)
        if not ids:
            raise BadRequest("a prompt is empty: it must hold at least one token", param="prompts")
        if room < 1:
            raise ContextLengthExceeded(
                f"a prompt holds {len(ids)} tokens and leaves no room in a context of {self._info.max_model_len}",
                remedy="Send a shorter prompt, or give a larger max_model_len",
            )
        seed = self._seeds.getrandbits(63) if params.seed is None else params.seed
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        return [
            Request(
                request_id=f"{name}-{i}",
                prompt_token_ids=ids,
                images=prompt.images,
                adapter=prompt.adapter,
                params=msgspec.structs.replace(
                    params,
                    n=1,
                    seed=(seed + i * SEED_STEP) & _MASK_64,
                    max_tokens=max_tokens,
                    min_tokens=min(params.min_tokens, max_tokens),
                ),
                eos_token_ids=self._eos_token_ids,
            )
            for i in range(params.n)
        ]
