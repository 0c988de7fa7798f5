"""Has grammars tried in a process of its own before the engine sees them: a hostile one kills that process only."""

from __future__ import annotations

import asyncio
import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence

import msgspec

from pagoda.engine.messages import Verdict
from pagoda.engine.worker import Worker
from pagoda.errors import BadRequest, Overloaded

COMMAND = (sys.executable, "-P", "-m", "pagoda.engine.grammar_worker")
_WALL_S = 120.0  # the worker's own limit is a second on the processor; this one is for a worker that hangs
_TURN_S = 30.0
_MAX_KEPT_BYTES = 16 << 20
_TOO_MUCH = "it takes too long or too much memory to compile"

Words = tuple[list[bytes], list[int], list[int]]
"""The model's tokens, the special ones among them, and those that end an answer."""


class GrammarCheck:
    """One worker, started with the first grammar; what it said is remembered."""

    def __init__(
        self,
        words: Callable[[], Words],
        *,
        command: Sequence[str] = COMMAND,
        wall_s: float = _WALL_S,
        turn_s: float = _TURN_S,
    ) -> None:
        self._words = words
        self._command = tuple(command)
        self._wall_s = wall_s
        self._turn_s = turn_s
        self._worker: Worker | None = None
        self._turn = asyncio.Lock()
        self._kept: OrderedDict[str, Verdict] = OrderedDict()
        self._kept_bytes = 0

    async def check(self, grammar: str) -> str:
        """The grammar as the engine takes it. Raises BadRequest with the reason where it cannot."""
        verdict = self._kept.get(grammar)  # one that is known need not wait behind those that are slow
        if verdict is None:
            verdict = await self._in_turn(grammar)
        if verdict.error:
            raise BadRequest(verdict.error)
        return verdict.grammar

    async def _in_turn(self, grammar: str) -> Verdict:
        try:
            async with asyncio.timeout(self._turn_s):
                await self._turn.acquire()
        except TimeoutError:
            raise Overloaded("too many grammars wait to be compiled", remedy="Try again in a moment") from None
        try:
            verdict = self._kept.get(grammar)
            if verdict is None:
                verdict = await self._ask(grammar)
                self._keep(grammar, verdict)
            return verdict
        finally:
            self._turn.release()

    async def _ask(self, grammar: str) -> Verdict:
        try:
            async with asyncio.timeout(self._wall_s):
                worker = self._worker
                if worker is None:
                    worker = self._worker = Worker(self._command)
                    words = await asyncio.to_thread(self._words)  # of 50,000 tokens and more: streams go on meanwhile
                    if self._worker is not worker:
                        raise EOFError("closed meanwhile")
                    await worker.tell(words)
                return msgspec.msgpack.decode(await worker.ask(grammar), type=Verdict)
        except (TimeoutError, EOFError, ConnectionError):
            self.close()
            return Verdict(error=_TOO_MUCH)
        except BaseException:  # half an answer would be read as the next one's
            self.close()
            raise

    def _keep(self, grammar: str, verdict: Verdict) -> None:
        self._kept[grammar] = verdict
        self._kept_bytes += 2 * len(grammar)
        while self._kept_bytes > _MAX_KEPT_BYTES:
            self._kept_bytes -= 2 * len(self._kept.popitem(last=False)[0])

    def close(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.end()
