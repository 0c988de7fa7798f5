"""Compiles the grammars of requests in a thread, so that the steps of others go on meanwhile."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

from pagoda.arch.spec import ModelSpec
from pagoda.errors import BadRequest
from pagoda.types import Request

if TYPE_CHECKING:
    from pagoda.text.matcher import Matcher, Vocabulary

_MAX_KEPT = 32
_FAILED = "the grammar of this request could not be prepared"

_log = logging.getLogger(__name__)


class Grammars:
    """Requests come in with `start` and out of `take`, with a matcher that has read their output so far."""

    def __init__(
        self, model: str, metadata: Callable[[], Mapping[str, Any]], spec: ModelSpec, *, bytes_else: bool = False
    ) -> None:
        self._model = model
        self._metadata = metadata
        self._spec = spec
        self._bytes_else = bytes_else
        self._vocabulary: Vocabulary | None = None
        self._kept: OrderedDict[str, Matcher] = OrderedDict()
        self._thread: ThreadPoolExecutor | None = None
        self._waiting: dict[str, tuple[Request, Future[Matcher]]] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def start(self, request: Request) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "grammars")
        future = self._thread.submit(self._prepare, request.params.grammar, request.output_token_ids)
        self._waiting[request.request_id] = request, future

    def cancel(self, request_id: str) -> None:
        found = self._waiting.pop(request_id, None)
        if found is not None:
            found[1].cancel()

    def take(self, wait_s: float) -> list[tuple[Request, Matcher | str]]:
        """Requests whose matcher is ready, or what is wrong with their grammar; waits so long for the first."""
        if wait_s and self._waiting:
            wait([future for _, future in self._waiting.values()], wait_s, FIRST_COMPLETED)
        done = [request for request, future in self._waiting.values() if future.done()]
        return [(request, _result(self._waiting.pop(request.request_id)[1])) for request in done]

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def _prepare(self, grammar: str, output: list[int]) -> Matcher:
        """Runs in the thread, and nowhere else."""
        if self._vocabulary is None:
            self._vocabulary = _load(self._model, self._metadata(), self._spec, self._bytes_else)
        kept = self._kept.get(grammar)
        if kept is None:
            kept = self._kept[grammar] = self._vocabulary.compile(grammar)
            if len(self._kept) > _MAX_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(grammar)
        matcher = kept.copy()
        matcher.advance(output)
        return matcher


def _load(model: str, metadata: Mapping[str, Any], spec: ModelSpec, bytes_else: bool) -> Vocabulary:
    """Imports late: an engine without grammars needs no tokenizer, and starts a tenth of a second earlier."""
    from pagoda.text.generation import load_generation_defaults
    from pagoda.text.matcher import load_vocabulary
    from pagoda.text.tokenizer import load_tokenizer

    ends = load_generation_defaults(model, metadata).eos_token_ids
    tokenizer = load_tokenizer(model, metadata, bytes_else=bytes_else)
    return load_vocabulary(tokenizer, spec.vocab_size, (*ends, *spec.eos_token_ids))


def _result(future: Future[Matcher]) -> Matcher | str:
    try:
        matcher = future.result()
    except BadRequest as error:
        return error.message
    except Exception:
        _log.exception("a grammar could not be compiled")
        return _FAILED
    return matcher.error or matcher
