"""The package `openai`, of two major versions: chat, tools, structured output, responses, embeddings, errors."""

from __future__ import annotations

import asyncio
import base64
import math
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field

HI: list[Any] = [{"role": "user", "content": "Hi"}]
ADD: Any = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


class GetWeather(BaseModel):
    """The weather in a city."""

    city: str = Field(max_length=20)
    unit: Literal["C", "F"]


def client_of(url: str, **more: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=url + "/v1", api_key="EMPTY", max_retries=0, timeout=120, **more)


def test_models(chat: str) -> None:
    (model,) = client_of(chat).models.list()
    assert model.id == "smollm2" and model.model_dump()["max_model_len"] == 2048
    assert client_of(chat).models.retrieve("smollm2").id == "smollm2"


def test_chat_whole_and_streamed(chat: str) -> None:
    client = client_of(chat)
    ask: dict[str, Any] = {"model": "smollm2", "messages": HI, "temperature": 0, "max_tokens": 20}
    whole = client.chat.completions.create(**ask)
    text, usage = whole.choices[0].message.content, whole.usage
    assert text and usage is not None and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == usage.completion_tokens
    assert sum(chunk.usage is not None for chunk in chunks) == 1
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_async_and_n(chat: str) -> None:
    async def ask() -> list[str | None]:
        client = openai.AsyncOpenAI(base_url=chat + "/v1", api_key="EMPTY", max_retries=0, timeout=120)
        async with client:
            stream = await client.chat.completions.create(
                model="smollm2", messages=HI, n=2, seed=1, max_completion_tokens=8, stream=True
            )
            return [choice.finish_reason async for chunk in stream for choice in chunk.choices if choice.finish_reason]

    assert len(asyncio.run(ask())) == 2


def test_completions(chat: str) -> None:
    reply = client_of(chat).completions.create(
        model="smollm2", prompt=["The capital of France is", "One, two,"], max_tokens=4, temperature=0, logprobs=1
    )
    assert reply.choices[0].text.startswith(" Paris") and len(reply.choices) == 2
    assert reply.choices[1].logprobs is not None and len(reply.choices[1].logprobs.tokens or []) == 4


def test_forced_tools_and_structured_output(chat: str) -> None:
    client = client_of(chat)
    tool: Any = openai.pydantic_function_tool(GetWeather)
    ask: list[Any] = [{"role": "user", "content": "How warm is it in Paris?"}]
    made = client.chat.completions.parse(model="smollm2", messages=ask, tools=[tool], tool_choice="required")
    calls = made.choices[0].message.tool_calls or []
    assert made.choices[0].finish_reason == "tool_calls"
    assert all(isinstance(call.function.parsed_arguments, GetWeather) for call in calls) and calls
    parsed = client.chat.completions.parse(model="smollm2", messages=ask, response_format=GetWeather, temperature=0)
    assert isinstance(parsed.choices[0].message.parsed, GetWeather)


def test_allowed_tools(chat: str, agent: str) -> None:
    tools: list[Any] = [openai.pydantic_function_tool(GetWeather), ADD]
    allowed: Any = {"mode": "required", "tools": [{"type": "function", "function": {"name": "GetWeather"}}]}
    choice: Any = {"type": "allowed_tools", "allowed_tools": allowed}
    client = client_of(chat)
    made = client.chat.completions.create(model="smollm2", messages=HI, tools=tools, tool_choice=choice)
    assert {call.function.name for call in made.choices[0].message.tool_calls or []} == {"GetWeather"}


def test_the_stream_helper_gets_one_id_and_one_name_per_call(agent: str) -> None:
    with client_of(agent).chat.completions.stream(model="fake-model", messages=HI, tools=[ADD]) as stream:
        seen = [event.type for event in stream]
        message = stream.get_final_completion().choices[0].message
    assert "tool_calls.function.arguments.done" in seen
    calls = message.tool_calls or []
    assert [call.function.name for call in calls] == ["add", "add"] and len({call.id for call in calls}) == 2
    assert calls[0].function.arguments.replace(" ", "") == '{"a":1,"b":"ö"}'
    assert message.content == "I add." and message.model_dump()["reasoning_content"] == "Let me see."


def test_responses(chat: str, agent: str) -> None:
    made = client_of(chat).responses.create(model="smollm2", input="Hi", max_output_tokens=16, temperature=0)
    assert made.output_text and made.usage is not None and made.usage.output_tokens <= 16
    kinds = [event.type for event in client_of(agent).responses.create(model="fake-model", input="Hi", stream=True)]
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"


def test_embeddings(minilm: str) -> None:
    client = client_of(minilm)
    made = client.embeddings.create(model="minilm", input=["a cat", "a dog"])  # as base64, by itself
    floats = client.embeddings.create(model="minilm", input=["a cat"], encoding_format="float")
    assert len(made.data) == 2 and made.data[0].embedding == pytest.approx(floats.data[0].embedding)
    assert math.isclose(sum(value**2 for value in made.data[1].embedding), 1, rel_tol=1e-4)
    raw = client.embeddings.with_raw_response.create(model="minilm", input="a cat", encoding_format="base64")
    assert len(base64.b64decode(raw.http_response.json()["data"][0]["embedding"])) == 384 * 4


def test_errors_have_their_classes(chat: str) -> None:
    client = client_of(chat)
    with pytest.raises(openai.NotFoundError, match="smollm2") as caught:
        client.chat.completions.create(model="other", messages=HI)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="maximum context length is 2048 tokens"):
        client.chat.completions.create(model="smollm2", messages=[{"role": "user", "content": "word " * 3000}])
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="smollm2", messages=HI, temperature=-1)


def test_a_picture(eyes: str, blue: str) -> None:
    client, url = client_of(eyes), f"data:image/png;base64,{blue}"
    content: list[Any] = [
        {"type": "image_url", "image_url": {"url": url, "detail": "auto"}},
        {"type": "text", "text": "What colour is this?"},
    ]
    made = client.chat.completions.create(
        model="eyes", messages=[{"role": "user", "content": content}], max_tokens=8, temperature=0
    )
    assert (made.choices[0].message.content or "").strip() == "blue"
    parts: list[Any] = [
        {"type": "input_image", "image_url": url, "detail": "auto"},
        {"type": "input_text", "text": "What colour is this?"},
    ]
    response = client.responses.create(model="eyes", input=[{"role": "user", "content": parts}], temperature=0)
    assert response.output_text.strip() == "blue"
    with pytest.raises(openai.BadRequestError, match="not a public one"):
        content[0] = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}
        client.chat.completions.create(model="eyes", messages=[{"role": "user", "content": content}])
