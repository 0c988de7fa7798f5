"""A call that is answered by beam search: rendered like any other, its sequences being the best beams."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

import msgspec

from pagoda.api.serving.engine import Deltas
from pagoda.api.serving.generation import Generation, Render
from pagoda.engine.beams import BeamSearch, BeamSearchParams, BeamSearchSequence, Nexts
from pagoda.engine.outputs import Logprob
from pagoda.errors import EngineError
from pagoda.types import Delta, Request, TokenLogprob


class Beams(Generation):
    """Each sequence comes whole, when the search for its prompt is over: one delta, best first."""

    def __init__(self, *args: Any, beams: BeamSearchParams) -> None:
        super().__init__(*args)
        self._beams = beams

    def deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        return self._found()

    async def rendered(self, render: Render) -> AsyncGenerator[bytes, None]:
        async for index, delta in self._found():
            for data in render(index, delta):
                yield data

    async def _found(self) -> AsyncGenerator[tuple[int, Delta], None]:
        for first in range(0, len(self.requests), self._n):
            request = self.requests[first]
            most = request.params.max_tokens or 1
            search = BeamSearch(request.prompt_token_ids, self._beams, request.eos_token_ids, most)
            step = 0
            while search.live:
                search.take(await self._step(request, f"{request.request_id}-{step}", search.live))
                step += 1
            for index, beam in enumerate(search.best(), first):
                delta = self._delta(request, beam)
                self._account(index, delta)
                yield index, delta

    async def _step(self, request: Request, name: str, live: Sequence[BeamSearchSequence]) -> list[Nexts]:
        params = msgspec.structs.replace(self._beams.step(), seed=0)
        streams: list[Deltas] = []
        try:
            for number, beam in enumerate(live):
                changes = {"request_id": f"{name}-{number}", "prompt_token_ids": beam.tokens, "params": params}
                streams.append(self._owner.engine.generate(msgspec.structs.replace(request, **changes)))
            return [await self._nexts(stream) for stream in streams]
        finally:
            for stream in streams:
                await stream.aclose()

    async def _nexts(self, stream: Deltas) -> Nexts:
        """The likeliest tokens, from a request for one token."""
        async for delta in stream:
            if delta.logprobs:
                (entry,) = delta.logprobs
                return {token: Logprob(logprob, rank, "") for rank, (token, logprob) in enumerate(entry.top, 1)}
            if delta.finish_reason is not None:
                raise EngineError(delta.error or "the engine could not finish this request")
        raise EngineError("the engine ended this request without a reason")

    def _delta(self, request: Request, beam: BeamSearchSequence) -> Delta:
        params = request.params
        tokens = beam.tokens[len(request.prompt_token_ids) :]
        wanted = params.logprobs
        entries = [_told(token, nexts, wanted or 0) for token, nexts in zip(tokens, beam.logprobs, strict=False)]
        return Delta(
            request_id=request.request_id,
            token_ids=tokens,
            logprobs=None if wanted is None else entries,
            text=self._owner.tokenizer.decode(tokens, skip_special_tokens=params.skip_special_tokens),
            finish_reason="stop" if beam.finish_reason == "stop" else "length",
            stop_reason=beam.stop_reason,
        )


def _told(token: int, nexts: Nexts, most: int) -> TokenLogprob:
    top = [(each, entry.logprob) for each, entry in nexts.items()][:most]
    return TokenLogprob(token, nexts[token].logprob, top)
