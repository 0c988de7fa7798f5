"""`LLM`: a model in this process, called as vLLM's is."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from pagoda.engine.adapters import with_adapters
from pagoda.engine.beams import BeamSearchOutput, BeamSearchParams, search
from pagoda.engine.core import EngineCore
from pagoda.engine.llm_adapters import LoraRequests, adapters_of
from pagoda.engine.llm_inputs import Encoded, Prompt, as_list, options_from
from pagoda.engine.llm_requests import GivenParams, Requests
from pagoda.engine.llm_tokenizer import LLMTokenizer
from pagoda.engine.messages import ModelInfo
from pagoda.engine.outputs import Answer, CompletionOutput, RequestOutput
from pagoda.engine.pooled import (
    ClassificationRequestOutput,
    EmbeddingRequestOutput,
    Pooler,
    PoolingOutput,
    PoolingRequestOutput,
    PoolingTask,
    ScoringRequestOutput,
)
from pagoda.engine.seeing import find_seeing
from pagoda.engine.shared import SharedCore
from pagoda.errors import BadRequest, ModelError
from pagoda.text.chat import load_chat_template
from pagoda.text.generation import load_generation_defaults
from pagoda.text.sentence import sentence_files
from pagoda.text.tokenizer import load_tokenizer
from pagoda.types import Image, PoolingParams, Request, SamplingParams

if TYPE_CHECKING:
    from pagoda.engine.local_pictures import LocalPictures

Message = Mapping[str, Any]

_log = logging.getLogger("pagoda")


class LLM:
    """Loads a model (a folder or a .gguf file), which generates, embeds or scores. Calls of several threads are
    computed together.

    Options are the server's, under vLLM's names: `dtype`, `max_model_len`, `gpu_memory_utilization`, `max_num_seqs`,
    ... Those of vLLM that mean nothing here are accepted, each with one line in the log. `seed` makes the seeds of
    requests that give none repeatable. `vllm_kwargs` is a further table; an option in both counts as given by keyword.
    """

    def __init__(
        self, model: str, *, seed: int | None = None, vllm_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        table = {**(vllm_kwargs or {}), **options}
        table.pop("model", None)
        own_seed = table.pop("seed", None)
        self._options = options_from(table)
        path = self._path = os.path.expanduser(model)
        self._core = EngineCore(with_adapters(self._options.engine_config(path), self._options))
        metadata = self._metadata = self._core.metadata
        self.tokenizer = load_tokenizer(path, metadata, bytes_else=self._options.load_format == "dummy")
        self.chat_template = load_chat_template(path, metadata, self._options.chat_template)
        defaults = load_generation_defaults(path, metadata)
        named = (*defaults.eos_token_ids, *self.tokenizer.eos_token_ids, *self.info.eos_token_ids)
        self._eos_token_ids = tuple(dict.fromkeys(named))
        params = {} if self._options.generation_config == "vllm" else defaults.params
        self._requests = Requests(
            self.info,
            self.tokenizer,
            self._eos_token_ids,
            {**params, **self._options.override_generation_config},
            self._options.max_logprobs,
            own_seed if seed is None else seed,
        )
        self._shared = SharedCore(self._core)
        self._sentence = sentence_files(path)
        seeing = find_seeing(self._options, path, self._core.spec.vision)
        self._pictures: LocalPictures | None = None
        if seeing is not None:  # imported only now: it needs Pillow
            self._pictures = importlib.import_module("pagoda.engine.local_pictures").LocalPictures(seeing)
        self._pooler = Pooler(self.info, self.tokenizer, self._sentence, self._shared)

    @property
    def info(self) -> ModelInfo:
        """What was loaded, and what fits."""
        return self._core.info

    @property
    def prompt_names(self) -> list[str]:
        """The prompts that an embedding model brings, for `embed`."""
        return list(self._sentence.prompts)

    def get_tokenizer(self) -> LLMTokenizer:
        return LLMTokenizer(self.tokenizer, self.chat_template, self._eos_token_ids)

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's files recommend; used where no parameters are given."""
        return self._requests.default_params()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: GivenParams = None,
        *,
        use_tqdm: bool = False,
        lora_request: LoraRequests = None,
    ) -> list[RequestOutput]:
        """Answer prompts, in their order: texts, lists of token ids, or {"prompt": ...}, {"prompt_token_ids": ...}.

        A table may hold pictures: {"multi_modal_data": {"image": ...}}, one for each placeholder of the prompt.
        One SamplingParams holds for all prompts, a list has one for each, and so with the adapters of `lora_request`.
        `use_tqdm` shows how many are done.
        """
        encoded = adapters_of([self._encode(prompt) for prompt in as_list(prompts)], lora_request)
        return self._run(encoded, self._requests.params_for(sampling_params, len(encoded)), use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: GivenParams = None,
        use_tqdm: bool = False,
        lora_request: LoraRequests = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several. The form of contents is read from the template, whatever is said."""
        conversations: Sequence[Any] = [messages] if messages and isinstance(messages[0], Mapping) else messages
        prompts = [
            self.chat_prompt(
                conversation,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                chat_template=chat_template,
                chat_template_kwargs=chat_template_kwargs,
                mm_processor_kwargs=mm_processor_kwargs,
            )
            for conversation in conversations
        ]
        prompts = adapters_of(prompts, lora_request)
        return self._run(prompts, self._requests.params_for(sampling_params, len(prompts)), use_tqdm)

    def chat_prompt(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> Encoded:
        """The prompt of one conversation, through the model's template; `generate` and `stream` take it."""
        template = self.chat_template
        if chat_template is not None:
            template = load_chat_template(self._path, self._metadata, chat_template)
        if template is None:
            raise ModelError(
                "this model has no chat template", remedy="Give one with chat_template=, or use generate()"
            )
        images: list[Image] = []
        if self._pictures is not None:
            messages, images = self._pictures.of_messages(messages, mm_processor_kwargs or {})
        ids = template.encode(
            self.tokenizer,
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs={**self._options.default_chat_template_kwargs, **(chat_template_kwargs or {})},
        )
        return self._placed(self.tokenizer.decode(ids, skip_special_tokens=False), ids, images)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, shown: frozenset[int] = frozenset()
    ) -> Iterator[CompletionOutput]:
        """Answer one prompt in pieces: each holds the text and tokens since the last, the last one how it ended.

        Whoever stops before the end cancels the answer. The special tokens in `shown` are part of the text.
        """
        (params,) = self._requests.params_for(sampling_params, 1)
        if params.n != 1:
            raise BadRequest("a stream has one answer: n must be 1", param="n")
        _, answers = self._begin([self._encode(prompt)], [params], shown)
        (answer,) = answers.values()
        finished = False
        try:
            while not finished:
                self._shared.advance(answers)
                if (news := answer.news()) is not None:
                    finished = news.finished()
                    yield news
        finally:
            self._shared.end(answers)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        lora_request: LoraRequests = None,
        use_tqdm: bool = False,
    ) -> list[BeamSearchOutput]:
        """The likeliest answers to each prompt, best first, each with its prompt. `use_tqdm` has no effect."""
        step = self._requests.checked(params.step())
        given = adapters_of([self._encode(prompt) for prompt in as_list(prompts)], lora_request)
        return search(given, params, step, self._eos_token_ids, self.info.max_model_len, self._run, self.tokenizer)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling_params: PoolingParams | None = None,
        prompt_name: str | None = None,
        use_tqdm: bool = False,
    ) -> list[EmbeddingRequestOutput]:
        """A vector for each prompt, in their order: `.outputs.embedding`.

        `prompt_name`: which of the model's own prompts goes before each text, such as "query".
        """
        return self._pooler.embed(as_list(prompts), pooling_params or PoolingParams(), use_tqdm, prompt_name)

    def classify(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling_params: PoolingParams | None = None,
        use_tqdm: bool = False,
    ) -> list[ClassificationRequestOutput]:
        """A probability for each label of the model: `.outputs.probs`."""
        return self._pooler.classify(as_list(prompts), pooling_params or PoolingParams(), use_tqdm)

    def encode(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | None = None,
        *,
        pooling_task: PoolingTask | None = None,
        use_tqdm: bool = False,
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """What `embed` or `classify` gives, as arrays: `.outputs.data`."""
        return self._pooler.encode(as_list(prompts), pooling_params or PoolingParams(), pooling_task, use_tqdm)

    def score(
        self,
        data_1: str | Sequence[str],
        data_2: str | Sequence[str],
        *,
        pooling_params: PoolingParams | None = None,
        instruction: str | None = None,
        use_tqdm: bool = False,
    ) -> list[ScoringRequestOutput]:
        """How well texts go together, one with several or each with its own: `.outputs.score`, 0 to 1.

        An embedding model gives the cosine, -1 to 1. `instruction` is for rerankers made of a chat model.
        """
        texts = [[data] if isinstance(data, str) else list(data) for data in (data_1, data_2)]
        return self._pooler.score(texts[0], texts[1], pooling_params or PoolingParams(), instruction, use_tqdm)

    def close(self) -> None:
        """Give the memory back."""
        self._core.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _placed(self, text: str | None, ids: list[int], images: list[Image]) -> Encoded:
        if self._pictures is None or not images:
            return Encoded(text, ids)
        ids, images = self._pictures.place(ids, images, self.info.max_model_len, self._encode_plain)
        return Encoded(text, ids, images)

    def _encode_plain(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _encode(self, prompt: Prompt) -> Encoded:
        if isinstance(prompt, Encoded):
            return prompt
        if isinstance(prompt, Mapping):
            text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        else:
            text, ids = (prompt, None) if isinstance(prompt, str) else (None, prompt)
        if ids is None:
            if not isinstance(text, str):
                raise BadRequest("a prompt given as a table needs `prompt` or `prompt_token_ids`", param="prompts")
            ids = self.tokenizer.encode(text)
        size = self.info.vocab_size
        if not all(isinstance(i, int) and 0 <= i < size for i in ids):
            raise BadRequest(f"token ids of a prompt must be whole numbers, 0 to {size - 1}", param="prompts")
        data = prompt.get("multi_modal_data") if isinstance(prompt, Mapping) else None
        if not data:
            return Encoded(text, list(ids))
        if self._pictures is None:
            raise BadRequest("multi_modal_data: this model does not see pictures", param="prompts")
        asked = prompt.get("mm_processor_kwargs") or {}  # type: ignore[union-attr]
        images = self._pictures.of_data(data, asked, ids, self._encode_plain)
        return self._placed(text, list(ids), images)

    def _run(self, prompts: Sequence[Encoded], params: Sequence[SamplingParams], show: bool) -> list[RequestOutput]:
        results, answers = self._begin(prompts, params)
        self._shared.finish(answers, show)
        return results

    def _begin(
        self,
        prompts: Sequence[Encoded],
        params: Sequence[SamplingParams],
        shown: frozenset[int] = frozenset(),
    ) -> tuple[list[RequestOutput], dict[str, Answer]]:
        """Hand the prompts to the engine; whoever calls this must end what it answers."""
        if self.info.task != "generate":
            raise BadRequest(
                "this model generates no text: it makes embeddings or scores",
                remedy="Call embed(), score() or classify()",
                param="prompts",
            )
        results: list[RequestOutput] = []
        answers: dict[str, Answer] = {}
        requests: list[Request] = []
        for name, prompt, one in zip(self._shared.names(len(prompts)), prompts, params, strict=True):
            whole = RequestOutput(name, prompt.text, prompt.ids, [CompletionOutput(i) for i in range(one.n)])
            results.append(whole)
            for i, request in enumerate(self._requests.of(name, prompt, one)):
                requests.append(request)
                answers[request.request_id] = Answer(self.tokenizer, request, whole, i, shown)
        self._shared.begin(requests, answers)
        return results, answers
