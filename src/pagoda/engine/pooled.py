"""What `LLM` gives with models that make embeddings or scores: results under vLLM's names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from pagoda.engine.messages import ModelInfo
from pagoda.engine.shared import SharedCore
from pagoda.engine.vectors import check_dimensions, classes, vector
from pagoda.errors import BadRequest, ContextLengthExceeded, EngineError
from pagoda.text.rerank import pair_tokens
from pagoda.text.sentence import SentenceFiles
from pagoda.text.tokenizer import Cut, Tokenizer
from pagoda.types import Delta, Float32, PoolingParams, Request, SamplingParams

T = TypeVar("T")
PoolingTask = Literal["embed", "classify"]
Tokens = tuple[list[int], int | None]
"""A prompt's ids, and the place of the second text of a pair."""


@dataclass(slots=True)
class PoolingOutput:
    data: Float32


@dataclass(slots=True)
class EmbeddingOutput:
    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        return len(self.embedding)


@dataclass(slots=True)
class ClassificationOutput:
    probs: list[float]

    @property
    def num_classes(self) -> int:
        return len(self.probs)


@dataclass(slots=True)
class ScoringOutput:
    score: float


@dataclass(slots=True)
class PoolingRequestOutput(Generic[T]):
    """What one prompt, or one pair of texts, gave."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: T
    finished: bool = True


EmbeddingRequestOutput = PoolingRequestOutput[EmbeddingOutput]
ClassificationRequestOutput = PoolingRequestOutput[ClassificationOutput]
ScoringRequestOutput = PoolingRequestOutput[ScoringOutput]


class Raw:
    """The bytes that one request gives."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.done = False
        self.error: str | None = None
        self._data = b""

    def feed(self, delta: Delta) -> bool:
        self._data = delta.pooled or self._data
        self.error = delta.error
        self.done = delta.finish_reason is not None
        return self.done

    def data(self) -> bytes:
        if not self._data:
            raise EngineError(self.error or "the engine could not finish this request")
        return self._data


class Pooler:
    """From texts to requests, and from what these gave to results."""

    def __init__(
        self,
        info: ModelInfo,
        tokenizer: Tokenizer,
        sentence: SentenceFiles,
        shared: SharedCore,
    ) -> None:
        self._info, self._tokenizer, self._sentence, self._shared = info, tokenizer, sentence, shared

    def embed(
        self, prompts: Sequence[Any], params: PoolingParams, show: bool, prompt_name: str | None = None
    ) -> list[EmbeddingRequestOutput]:
        return [
            _of(raw, EmbeddingOutput(self._vector(raw, params).tolist()))
            for raw in self._embedded(prompts, params, show, prompt_name)
        ]

    def classify(self, prompts: Sequence[Any], params: PoolingParams, show: bool) -> list[ClassificationRequestOutput]:
        self._check("score", "classify()")
        found = self._ask([self._tokens(prompt, params, "") for prompt in prompts], show)
        return [_of(raw, ClassificationOutput(_classes(raw, params))) for raw in found]

    def encode(
        self, prompts: Sequence[Any], params: PoolingParams, task: PoolingTask | None, show: bool
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """Vectors or labels' probabilities as arrays, as the model makes the one or the other."""
        if task is not None and task not in ("embed", "classify"):
            raise BadRequest(f"pooling_task {task!r} is not supported", remedy="Use embed or classify")
        if task != "classify" and self._info.task == "embed":
            return [_of(raw, PoolingOutput(self._vector(raw, params))) for raw in self._embedded(prompts, params, show)]
        self._check("embed" if task == "embed" else "score", "encode()")
        found = self._ask([self._tokens(prompt, params, "") for prompt in prompts], show)
        return [_of(raw, PoolingOutput(np.asarray(_classes(raw, params), np.float32))) for raw in found]

    def score(
        self, first: Sequence[str], second: Sequence[str], params: PoolingParams, instruction: str | None, show: bool
    ) -> list[ScoringRequestOutput]:
        """How well each two texts go together; one first text is compared with every second one."""
        firsts = list(first) * len(second) if len(first) == 1 else first
        if not firsts or len(firsts) != len(second):
            raise BadRequest(
                f"{len(first)} and {len(second)} texts cannot be compared",
                remedy="Give one and several, or as many of both",
            )
        if self._info.task == "embed":
            return self._cosines(firsts, second, params, show)
        self._check("score", "score()")
        if self._info.width != 1:
            raise BadRequest(
                f"this model sorts texts into {self._info.width} classes, and gives no single score",
                remedy="Call classify()",
            )
        cut = self._cut(params)
        pairs = [
            pair_tokens(self._tokenizer, self._info.architecture, a, b, cut, instruction)
            for a, b in zip(firsts, second, strict=True)
        ]
        return [_of(raw, ScoringOutput(_classes(raw, params)[0])) for raw in self._ask(pairs, show)]

    def _cosines(
        self, first: Sequence[str], second: Sequence[str], params: PoolingParams, show: bool
    ) -> list[ScoringRequestOutput]:
        places = {text: place for place, text in enumerate(dict.fromkeys([*first, *second]))}
        found = self._embedded(list(places), params, show)
        vectors = [vector(raw.data(), True, params.dimensions) for raw in found]
        results = []
        for a, b in zip(first, second, strict=True):
            one, other = places[a], places[b]
            ids = [*found[one].request.prompt_token_ids, *found[other].request.prompt_token_ids]
            score = float(vectors[one] @ vectors[other])
            results.append(PoolingRequestOutput(found[one].request.request_id, ids, ScoringOutput(score)))
        return results

    def _embedded(
        self, prompts: Sequence[Any], params: PoolingParams, show: bool, prompt_name: str | None = None
    ) -> list[Raw]:
        self._check("embed", "embed()")
        before = self._sentence.prompt(prompt_name)
        check_dimensions(params.dimensions, self._info.width, self._sentence.dimensions)
        return self._ask([self._tokens(prompt, params, before) for prompt in prompts], show)

    def _vector(self, raw: Raw, params: PoolingParams) -> Float32:
        normalize = self._sentence.normalize if params.use_activation is None else params.use_activation
        return vector(raw.data(), normalize, params.dimensions)

    def _check(self, task: str, call: str) -> None:
        if self._info.task != task:
            does = {"generate": "generates text", "embed": "makes embeddings", "score": "gives scores"}
            raise BadRequest(
                f"{call} is not for this model: it {does[self._info.task]}",
                remedy="An embedding model can be made of any with runner='pooling', or task='embed'"
                if task == "embed"
                else "Load a model that has a classifier, or one for reranking with task='score'",
            )

    def _cut(self, params: PoolingParams) -> Cut | None:
        given, limit = params.truncate_prompt_tokens, self._info.max_model_len
        return None if given is None else Cut(limit if given == -1 else min(given, limit))

    def _tokens(self, prompt: Any, params: PoolingParams, before: str) -> Tokens:
        if isinstance(prompt, Mapping):
            prompt = prompt.get("prompt") if prompt.get("prompt_token_ids") is None else prompt["prompt_token_ids"]
        cut = self._cut(params)
        if isinstance(prompt, str):
            ids = self._tokenizer.encode(before + prompt, add_special_tokens=False)
            return self._tokenizer.framed(ids, cut), None
        ids, size = list(prompt), self._info.vocab_size
        if not all(isinstance(i, int) and 0 <= i < size for i in ids):
            raise BadRequest(f"a prompt is a text, or token ids from 0 to {size - 1}", param="prompts")
        return ids if cut is None else cut.kept(ids), None

    def _ask(self, prompts: Sequence[Tokens], show: bool) -> list[Raw]:
        limit = self._info.max_model_len
        for ids, _ in prompts:
            if not ids:
                raise BadRequest("a prompt is empty: it must hold at least one token", param="prompts")
            if len(ids) > limit:
                raise ContextLengthExceeded(
                    f"a prompt holds {len(ids)} tokens, this model takes {limit}",
                    remedy="Give PoolingParams(truncate_prompt_tokens=-1), which cuts it at its end",
                )
        requests = [
            Request(request_id=name, prompt_token_ids=ids, second_text=second, params=SamplingParams(seed=0))
            for name, (ids, second) in zip(self._shared.names(len(prompts)), prompts, strict=True)
        ]
        found = {request.request_id: Raw(request) for request in requests}
        self._shared.begin(requests, found)
        self._shared.finish(found, show)
        return list(found.values())


def _classes(raw: Raw, params: PoolingParams) -> list[float]:
    return classes(raw.data(), params.use_activation)


def _of(raw: Raw, outputs: T) -> PoolingRequestOutput[T]:
    return PoolingRequestOutput(raw.request.request_id, raw.request.prompt_token_ids, outputs)
