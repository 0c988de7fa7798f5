"""LangChain's LLM, chat model and embeddings with the model in this process. Needs the extra `langchain`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import msgspec

try:
    import langchain_core  # noqa: F401
except ImportError as error:
    raise ImportError("LangChain is not installed. Install it: pip install 'pagoda-llm[langchain]'") from error
from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.embeddings import Embeddings
from langchain_core.language_models import BaseChatModel, BaseLLM, LanguageModelInput
from langchain_core.language_models.chat_models import generate_from_stream
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, convert_to_openai_messages
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGenerationChunk, ChatResult, Generation, GenerationChunk, LLMResult
from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langchain_core.utils.function_calling import convert_to_openai_tool
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from pagoda.errors import BadRequest
from pagoda.integrations.llm import LLM
from pagoda.integrations.turn import Piece, Turn
from pagoda.types import PoolingParams, SamplingParams

_OTHER_NAMES = MappingProxyType({"max_new_tokens": "max_tokens"})
_OPEN = ConfigDict(extra="allow", protected_namespaces=())  # LangChain's classes drop what they do not know
_OF_REQUESTS = frozenset({*SamplingParams.__struct_fields__, *_OTHER_NAMES}) - {"seed"}


class _InProcess(BaseModel):
    """A model, loaded when it is made, and how it samples.

    Further keywords are options of `pagoda.LLM` or fields of `SamplingParams`, under vLLM's names; `vllm_kwargs` is
    a table of the same. What is in both is taken from the keywords, so a table may repeat one.
    """

    model: str
    vllm_kwargs: dict[str, Any] = Field(default_factory=dict)
    _llm: LLM = PrivateAttr()
    _sampling: dict[str, Any] = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        super().model_post_init(context)
        given = {**self.vllm_kwargs, **(self.model_extra or {})}
        sampling = {name: given.pop(name) for name in list(given) if name in _OF_REQUESTS}
        self._sampling = {_OTHER_NAMES.get(name, name): value for name, value in sampling.items()}
        self._llm = LLM(self.model, **given)

    @property
    def llm(self) -> LLM:
        """The model behind it."""
        return self._llm

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        return {"model": self.model, **self._sampling}

    def close(self) -> None:
        """Give the memory back."""
        self._llm.close()

    def _params(self, stop: list[str] | None, given: Mapping[str, Any], max_tokens: int | None) -> SamplingParams:
        """For one call: the model's own defaults, what this was made with, what the call says."""
        changes = {_OTHER_NAMES.get(name, name): value for name, value in given.items()}
        unknown = changes.keys() - set(SamplingParams.__struct_fields__)
        if unknown:
            raise BadRequest(f"{', '.join(sorted(unknown))}: no sampling parameter has this name")
        defaults = self._llm.get_default_sampling_params()
        stops = {} if stop is None else {"stop": tuple(stop)}
        chosen = {"max_tokens": max_tokens, **self._sampling, **changes, **stops}
        return msgspec.structs.replace(defaults, **chosen)


class PagodaLLM(_InProcess, BaseLLM):
    """A text model: prompts of one call are computed together. At most 512 tokens, unless `max_tokens` says else."""

    model_config = _OPEN

    @property
    def _llm_type(self) -> str:
        return "pagoda"

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        results = self._llm.generate(prompts, self._params(stop, kwargs, 512))
        written = sum(len(output.token_ids) for result in results for output in result.outputs)
        read = sum(len(result.prompt_token_ids) for result in results)
        return LLMResult(
            generations=[
                [
                    Generation(text=out.text, generation_info={"finish_reason": out.finish_reason})
                    for out in each.outputs
                ]
                for each in results
            ],
            llm_output={"model_name": self.model, "token_usage": _usage(read, written)},
        )

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        for piece in self._llm.stream(prompt, self._params(stop, kwargs, 512)):
            info = None if piece.finish_reason is None else {"finish_reason": piece.finish_reason}
            chunk = GenerationChunk(text=piece.text, generation_info=info)
            if run_manager is not None:
                run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk


class ChatPagoda(_InProcess, BaseChatModel):
    """A chat model with tools and structured output. Several threads (`batch`, `ainvoke`) are computed together."""

    model_config = _OPEN

    @property
    def _llm_type(self) -> str:
        return "pagoda-chat"

    def bind_tools(
        self,
        tools: Sequence[dict[str, Any] | type | Callable[..., Any] | BaseTool],
        *,
        tool_choice: str | dict[str, Any] | bool | None = None,
        **kwargs: Any,
    ) -> Runnable[LanguageModelInput, AIMessage]:
        """`tool_choice`: auto, none, any (or required), or a function's name, which a grammar then enforces."""
        kwargs.pop("ls_structured_output_format", None)
        formatted = [convert_to_openai_tool(tool) for tool in tools]
        choice = {True: "any", False: None}[tool_choice] if isinstance(tool_choice, bool) else tool_choice
        return self.bind(tools=formatted, tool_choice=choice, **kwargs)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return generate_from_stream(self._stream(messages, stop, run_manager, **kwargs))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        *,
        tools: Sequence[dict[str, Any]] = (),
        tool_choice: str | dict[str, Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        params = self._params(stop, kwargs, None)
        turn = Turn(self._llm, _as_dicts(messages), tools, tool_choice, chat_template_kwargs)
        for piece in turn.stream(params):
            chunk = ChatGenerationChunk(message=_chunk(piece, self.model), generation_info=_end(piece))
            if run_manager is not None:
                run_manager.on_llm_new_token(piece.content, chunk=chunk)
            yield chunk


class PagodaEmbeddings(BaseModel, Embeddings):
    """Vectors for texts. The model's own prompts for queries and documents go before them, where it has such.

    Further keywords are options of `pagoda.LLM`; `vllm_kwargs` is a table of the same.
    """

    model: str
    vllm_kwargs: dict[str, Any] = Field(default_factory=dict)
    dimensions: int | None = None
    _llm: LLM = PrivateAttr()

    model_config = _OPEN

    def model_post_init(self, context: Any, /) -> None:
        self._llm = LLM(self.model, vllm_kwargs=self.vllm_kwargs, **{"runner": "pooling", **(self.model_extra or {})})

    @property
    def llm(self) -> LLM:
        """The model behind it."""
        return self._llm

    def close(self) -> None:
        """Give the memory back."""
        self._llm.close()

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return self._embed(texts, "document")

    def embed_query(self, text: str) -> list[float]:
        return self._embed([text], "query")[0]

    def _embed(self, texts: list[str], role: str) -> list[list[float]]:
        params = PoolingParams(dimensions=self.dimensions, truncate_prompt_tokens=-1)
        name = role if role in self._llm.prompt_names else None
        found = self._llm.embed(texts, pooling_params=params, prompt_name=name)
        return [each.outputs.embedding for each in found]


def _as_dicts(messages: list[BaseMessage]) -> list[dict[str, Any]]:
    converted = convert_to_openai_messages(messages)
    return converted if isinstance(converted, list) else [converted]


def _chunk(piece: Piece, model: str) -> AIMessageChunk:
    more = {"reasoning_content": piece.reasoning} if piece.reasoning else {}
    metadata = {"model_name": model, "model_provider": "pagoda"} if piece.finish_reason is not None else {}
    usage = None if piece.usage is None else _usage(*piece.usage)
    return AIMessageChunk(
        content=piece.content,
        additional_kwargs=more,
        response_metadata=metadata,
        tool_call_chunks=[] if piece.call is None else [piece.call],
        usage_metadata=usage,
    )


def _end(piece: Piece) -> dict[str, Any] | None:
    return None if piece.finish_reason is None else {"finish_reason": piece.finish_reason}


def _usage(read: int, written: int) -> UsageMetadata:
    return {"input_tokens": read, "output_tokens": written, "total_tokens": read + written}
