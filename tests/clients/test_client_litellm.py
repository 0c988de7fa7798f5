"""litellm: hosted_vllm and ollama_chat, streams, tools, embeddings, rerank, errors by their phrases."""

from __future__ import annotations

from typing import Any

import litellm
import pytest

HI = [{"role": "user", "content": "Hi"}]
ADD: dict[str, Any] = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def completion(url: str, model: str = "hosted_vllm/smollm2", messages: Any = HI, **more: Any) -> Any:
    return litellm.completion(model, messages=messages, api_base=url, num_retries=0, timeout=120, **more)


def test_chat(chat: str) -> None:
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
    whole = completion(chat + "/v1", **options)
    chunks = list(completion(chat + "/v1", stream=True, stream_options={"include_usage": True}, **options))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert whole.choices[0].message.content == text != ""
    told = [chunk.usage.completion_tokens for chunk in chunks if getattr(chunk, "usage", None)]
    assert told == [whole.usage.completion_tokens]


def test_thinking_and_tools(agent: str) -> None:
    chunks = list(completion(agent + "/v1", "hosted_vllm/fake-model", tools=[ADD], stream=True))
    message = litellm.stream_chunk_builder(chunks, messages=HI).choices[0].message
    assert message.reasoning_content == "Let me see." and message.content == "I add."
    assert [call.function.name for call in message.tool_calls] == ["add", "add"]
    assert message.tool_calls[0].function.arguments.replace(" ", "") == '{"a":1,"b":"ö"}'


def test_embedding_and_rerank(minilm: str) -> None:
    made = litellm.embedding("hosted_vllm/minilm", input=["a cat"], api_base=minilm + "/v1")
    assert len(made.data[0]["embedding"]) == 384
    for base in ("/v1", "/v1/rerank"):
        ranked = litellm.rerank(
            "hosted_vllm/minilm", "What does a cat eat?", ["A tower.", "Cats like milk."], api_base=minilm + base
        )
        assert ranked.results[0]["index"] == 1


def test_ollama(chat: str) -> None:
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
    said = completion(chat, "ollama_chat/smollm2", **options).choices[0].message.content
    assert said == completion(chat + "/v1", **options).choices[0].message.content


def test_errors(chat: str) -> None:
    with pytest.raises(litellm.ContextWindowExceededError):
        completion(chat + "/v1", messages=[{"role": "user", "content": "word " * 3000}])
    with pytest.raises(litellm.NotFoundError):
        completion(chat + "/v1", "hosted_vllm/other")
