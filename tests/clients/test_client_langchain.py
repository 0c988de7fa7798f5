"""langchain-openai and langchain-ollama: chat, streams, tools, structured output, embeddings."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from langchain_core.messages import HumanMessage
from langchain_ollama import ChatOllama, OllamaEmbeddings
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field


class GetWeather(BaseModel):
    """The weather in a city."""

    city: str = Field(max_length=20)
    unit: Literal["C", "F"]


def chat_openai(url: str, model: str = "smollm2", **more: Any) -> ChatOpenAI:
    return ChatOpenAI(model=model, base_url=url + "/v1", api_key="EMPTY", max_retries=0, temperature=0, **more)


def test_chat_openai(chat: str) -> None:
    model = chat_openai(chat, max_tokens=12, stream_usage=True)
    whole = model.invoke("Hi")
    pieces = list(model.stream("Hi"))
    assert whole.content and "".join(str(piece.content) for piece in pieces) == whole.content
    assert whole.usage_metadata is not None
    told = [piece.usage_metadata for piece in pieces if piece.usage_metadata]
    assert [each["output_tokens"] for each in told] == [whole.usage_metadata["output_tokens"]]
    assert len(model.batch(["Hi", "Hello", "Good day"])) == 3


def test_tools_and_structured_output(chat: str, agent: str) -> None:
    model = chat_openai(chat)
    (call,) = model.bind_tools([GetWeather], tool_choice="GetWeather").invoke("How warm is Paris?").tool_calls
    assert GetWeather(**call["args"])
    methods: tuple[Any, ...] = ("json_schema", "function_calling")
    for method in methods:
        made = model.with_structured_output(GetWeather, method=method).invoke("How warm is Paris?")
        assert isinstance(made, GetWeather)
    assert isinstance(model.with_structured_output(None, method="json_mode").invoke("An object", max_tokens=30), dict)
    pieces = list(chat_openai(agent, "fake-model").bind_tools([GetWeather]).stream("Hi"))
    whole = pieces[0]
    for piece in pieces[1:]:
        whole = whole + piece
    assert [each["args"] for each in whole.tool_calls] == [{"a": 1, "b": "ö"}, {"a": 2}]


def test_completions(chat: str) -> None:
    """What VLLMOpenAI of langchain-community sends: the same class with a list of prompts."""
    model = OpenAI(model="smollm2", base_url=chat + "/v1", api_key="EMPTY", temperature=0, max_tokens=4, max_retries=0)
    assert model.batch(["The capital of France is", "One, two,"])[0].startswith(" Paris")
    assert "".join(model.stream("The capital of France is")).startswith(" Paris")


def test_openai_embeddings(minilm: str) -> None:
    model = OpenAIEmbeddings(
        model="minilm", base_url=minilm + "/v1", api_key="EMPTY", check_embedding_ctx_length=False, max_retries=0
    )
    assert [len(vector) for vector in model.embed_documents(["a cat", "a dog"])] == [384, 384]


def test_ollama(chat: str, minilm: str) -> None:
    model = ChatOllama(model="smollm2", base_url=chat, validate_model_on_init=True, temperature=0, num_predict=8)
    whole = model.invoke("Hi")
    assert whole.content and "".join(str(piece.content) for piece in model.stream("Hi")) == whole.content
    with pytest.raises(ValueError, match="not found"):
        ChatOllama(model="other", base_url=chat, validate_model_on_init=True)
    vectors = OllamaEmbeddings(model="minilm", base_url=minilm).embed_documents(["a cat", "a dog"])
    assert [len(vector) for vector in vectors] == [384, 384]


def test_a_picture(eyes: str, blue: str) -> None:
    url = f"data:image/png;base64,{blue}"
    content: list[Any] = [
        {"type": "text", "text": "What colour is this?"},
        {"type": "image_url", "image_url": {"url": url}},
    ]
    for model in (
        chat_openai(eyes, "eyes", max_tokens=8),
        ChatOllama(model="eyes", base_url=eyes, temperature=0, num_predict=8),
    ):
        assert str(model.invoke([HumanMessage(content)]).content).strip() == "blue"
