"""Thinking and tool calls as Ollama's clients get them: apart from the text, calls whole, arguments as objects."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import ollama
import pytest
from api_fake import Client, FakeEngine, PlainTemplate, make_server, on_port

from pagoda.api.serving.server import Server

SOURCE = (
    "{{ messages }}{{ tools }}<tool_call></tool_call>{% if enable_thinking is false %}<think>\n\n</think>{% endif %}"
)
CALLS = (
    '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "ö"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
)
TEXT = f"<think>\nLet me see.\n</think>\n\nI add.\n{CALLS}"
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
HI = [{"role": "user", "content": "Hi"}]


def thinker(text: str = TEXT) -> tuple[Server, FakeEngine]:
    engine = FakeEngine(text)
    return make_server(engine, chat_template=PlainTemplate(SOURCE)), engine


@pytest.fixture
def client() -> Iterator[Client]:
    with Client(thinker()[0]) as made:
        yield made


def check(message: dict[str, Any]) -> None:
    assert message["thinking"] == "Let me see."
    assert message["content"].strip() == "I add."
    calls = [call["function"] for call in message["tool_calls"]]
    assert calls == [
        {"index": 0, "name": "add", "arguments": {"a": 1, "b": "ö"}},
        {"index": 1, "name": "add", "arguments": {"a": 2}},
    ]
    assert len({call["id"] for call in message["tool_calls"]}) == 2


def test_whole(client: Client) -> None:
    reply = client.post("/api/chat", {"messages": HI, "tools": TOOLS, "stream": False}).json()
    check(reply["message"])
    assert reply["done_reason"] == "stop"


def test_lines(client: Client) -> None:
    response = client.post("/api/chat", {"messages": HI, "tools": TOOLS, "logprobs": True})
    lines = [json.loads(line) for line in response.text.splitlines()]
    joined: dict[str, Any] = {"thinking": "", "content": ""}
    for line in lines:
        message = line["message"]
        assert not (message.get("thinking") and message["content"])
        joined["thinking"] += message.get("thinking", "")
        joined["content"] += message["content"]
        if "tool_calls" in message:
            assert "tool_calls" not in joined
            joined["tool_calls"] = message["tool_calls"]
    check(joined)
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert "tool_calls" not in lines[-1]["message"]
    assert sum(len(line["logprobs"]) for line in lines) == len(TEXT.encode()) + 1


def test_generate_has_thinking_too_but_not_raw(client: Client) -> None:
    reply = client.post("/api/generate", {"prompt": "Hi", "stream": False}).json()
    assert reply["thinking"] == "Let me see." and reply["response"].startswith("I add.\n<tool_call>")
    raw = client.post("/api/generate", {"prompt": "Hi", "stream": False, "raw": True}).json()
    assert raw["response"] == TEXT and "thinking" not in raw


def test_without_tools_nothing_is_a_call(client: Client) -> None:
    message = client.post("/api/chat", {"messages": HI, "stream": False}).json()["message"]
    assert "tool_calls" not in message and CALLS in message["content"]


def test_what_the_model_can_is_told(client: Client) -> None:
    assert set(client.post("/api/show", {}).json()["capabilities"]) == {"completion", "tools", "thinking"}
    with Client(make_server()) as plain:
        assert plain.post("/api/show", {}).json()["capabilities"] == ["completion"]


def test_the_package() -> None:
    server, engine = thinker()
    with on_port(server, engine) as base:
        client = ollama.Client(host=base)
        whole = client.chat("fake-model", HI, tools=TOOLS, think=True)
        for replies in ([whole], list(client.chat("fake-model", HI, tools=TOOLS, think=True, stream=True))):
            calls = [call for reply in replies for call in reply.message.tool_calls or []]
            assert [call.function.arguments for call in calls] == [{"a": 1, "b": "ö"}, {"a": 2}]
            assert "".join(reply.message.thinking or "" for reply in replies) == "Let me see."


def test_a_call_may_be_required_as_the_ai_sdk_asks_for_it() -> None:
    server, engine = thinker()
    with Client(server) as client:
        asked = {"messages": HI, "tools": TOOLS, "stream": False}
        client.post("/api/chat", {**asked, "tool_choice": "required"})
        assert "calls" in engine.requests[-1].params.grammar
        client.post("/api/chat", asked)
        assert engine.requests[-1].params.grammar == ""
