"""Thinking and tool calls as Anthropic's clients get them: blocks of their own, one after the other."""

from __future__ import annotations

from collections.abc import Iterator

import anthropic
import pytest
from api_fake import EOS, on_port
from test_ollama_answers import CALLS, TEXT, thinker

from pagoda.api.turn.message import arguments_object

TOOLS = [anthropic.types.ToolParam(name="add", input_schema={"type": "object", "properties": {}})]
HI = [anthropic.types.UserMessageParam(role="user", content="Hi")]


@pytest.fixture(scope="module")
def client() -> Iterator[anthropic.Anthropic]:
    server, engine = thinker()
    with on_port(server, engine) as base:
        yield anthropic.Anthropic(base_url=base, api_key="x", max_retries=0, timeout=60)


def check(message: anthropic.types.Message) -> None:
    thought, text, first, second = message.content
    assert thought.type == "thinking" and thought.thinking == "Let me see."
    assert text.type == "text" and text.text.strip() == "I add."
    assert first.type == second.type == "tool_use"
    assert (first.name, first.input, second.input) == ("add", {"a": 1, "b": "ö"}, {"a": 2})
    assert first.id != second.id and message.stop_reason == "tool_use"
    assert message.usage.output_tokens == len(TEXT.encode()) + 1


def test_whole(client: anthropic.Anthropic) -> None:
    check(client.messages.create(model="fake-model", max_tokens=500, messages=HI, tools=TOOLS))


def test_a_stream(client: anthropic.Anthropic) -> None:
    with client.messages.stream(model="fake-model", max_tokens=500, messages=HI, tools=TOOLS) as stream:
        events = list(stream)
        check(stream.get_final_message())
    indexes = [event.index for event in events if event.type == "content_block_start"]
    assert indexes == [0, 1, 2, 3]
    assert [event.index for event in events if event.type == "content_block_stop"] == indexes


def test_without_tools_nothing_is_a_call(client: anthropic.Anthropic) -> None:
    message = client.messages.create(model="fake-model", max_tokens=500, messages=HI)
    thought, text = message.content
    assert thought.type == "thinking" and text.type == "text" and CALLS in text.text
    assert message.stop_reason == "end_turn"


def test_a_turn_with_results_goes_on(client: anthropic.Anthropic) -> None:
    first = client.messages.create(model="fake-model", max_tokens=500, messages=HI, tools=TOOLS)
    results = [
        anthropic.types.ToolResultBlockParam(type="tool_result", tool_use_id=block.id, content="3")
        for block in first.content
        if block.type == "tool_use"
    ]
    assert len(results) == 2
    turn: list[anthropic.types.MessageParam] = [
        *HI,
        anthropic.types.AssistantMessageParam(role="assistant", content=first.content),
        anthropic.types.UserMessageParam(role="user", content=results),
    ]
    check(client.messages.create(model="fake-model", max_tokens=500, messages=turn, tools=TOOLS))


@pytest.mark.parametrize(
    "choice",
    [anthropic.types.ToolChoiceAnyParam(type="any"), anthropic.types.ToolChoiceToolParam(type="tool", name="add")],
)
def test_a_call_can_be_required(choice: anthropic.types.ToolChoiceParam) -> None:
    server, engine = thinker()
    call_text = '<tool_call>\n{"name": "add", "arguments": {"a": 3}}\n</tool_call>'
    engine.tokens = [*call_text.encode(), EOS]
    with on_port(server, engine) as base:
        client = anthropic.Anthropic(base_url=base, api_key="x", max_retries=0, timeout=60)
        message = client.messages.create(
            model="fake-model", max_tokens=99, messages=HI, tools=TOOLS, tool_choice=choice
        )
    (call,) = message.content
    assert call.type == "tool_use" and (call.name, call.input) == ("add", {"a": 3})


@pytest.mark.parametrize("text", ['{"a": ', "[1]", "nonsense"])
def test_arguments_that_are_no_object_are_shown(text: str) -> None:
    assert arguments_object(text) == {"INVALID_JSON": text}
    assert arguments_object("") == {}
