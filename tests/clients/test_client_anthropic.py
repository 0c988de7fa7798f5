"""The package `anthropic`: messages whole and streamed, tools, thinking, counting, models, errors."""

from __future__ import annotations

from typing import Any

import anthropic
import pytest

HI: list[Any] = [{"role": "user", "content": "Hi"}]
ADD: Any = {"name": "add", "description": "adds", "input_schema": {"type": "object", "properties": {}}}


@pytest.mark.parametrize("key", ["api_key", "auth_token"])
def test_messages(chat: str, key: str) -> None:
    options: dict[str, Any] = {key: "x"}
    client = anthropic.Anthropic(base_url=chat, max_retries=0, timeout=120, **options)
    ask: dict[str, Any] = {"model": "smollm2", "max_tokens": 12, "messages": HI, "system": "Be kind."}
    ask["extra_body"] = {"temperature": 0}
    made = client.messages.create(**ask)
    assert made.stop_reason in ("end_turn", "max_tokens") and 0 < made.usage.output_tokens <= 12
    with client.messages.stream(**ask) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert [block.text for block in made.content if block.type == "text"] == [text]
    assert final.usage.output_tokens == made.usage.output_tokens
    count = client.messages.count_tokens(model="smollm2", messages=HI, system="Be kind.").input_tokens
    assert count == final.usage.input_tokens + (final.usage.cache_read_input_tokens or 0)
    assert [model.id for model in client.models.list()] == ["smollm2"]


def test_thinking_and_tools(agent: str) -> None:
    client = anthropic.Anthropic(base_url=agent, api_key="x", max_retries=0, timeout=60)
    with client.messages.stream(model="fake-model", max_tokens=400, messages=HI, tools=[ADD]) as stream:
        final = stream.get_final_message()
    assert [block.type for block in final.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert [block.input for block in final.content if block.type == "tool_use"] == [{"a": 1, "b": "ö"}, {"a": 2}]
    assert final.stop_reason == "tool_use"
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": "3"}
        for block in final.content
        if block.type == "tool_use"
    ]
    history: list[Any] = [*HI, {"role": "assistant", "content": final.content}, {"role": "user", "content": results}]
    again = client.messages.create(model="fake-model", max_tokens=400, messages=history, tools=[ADD])
    assert again.stop_reason == "tool_use"


def test_a_forced_tool(chat: str) -> None:
    client = anthropic.Anthropic(base_url=chat, api_key="x", max_retries=0, timeout=120)
    schema = {"type": "object", "properties": {"unit": {"enum": ["C", "F"]}}, "required": ["unit"]}
    made = client.messages.create(
        model="smollm2",
        max_tokens=100,
        messages=HI,
        tools=[{"name": "weather", "input_schema": schema}],
        tool_choice={"type": "tool", "name": "weather"},
    )
    assert [block.input["unit"] in "CF" for block in made.content if block.type == "tool_use"] == [True]


def test_errors(chat: str) -> None:
    client = anthropic.Anthropic(base_url=chat, api_key="x", max_retries=0, timeout=60)
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="claude-x", max_tokens=3, messages=HI)
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        client.messages.create(model="smollm2", max_tokens=3, messages=[{"role": "user", "content": "word " * 3000}])


def test_a_picture(eyes: str, blue: str) -> None:
    client = anthropic.Anthropic(base_url=eyes, api_key="x", max_retries=0, timeout=120)
    content: list[Any] = [
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": blue}},
        {"type": "text", "text": "What colour is this?"},
    ]
    made = client.messages.create(
        model="eyes", max_tokens=8, messages=[{"role": "user", "content": content}], extra_body={"temperature": 0}
    )
    assert [block.text.strip() for block in made.content if block.type == "text"] == ["blue"]
