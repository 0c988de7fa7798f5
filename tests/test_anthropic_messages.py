"""Anthropic's /v1/messages in memory: blocks, events, stop reasons, errors in Anthropic's shape."""

from __future__ import annotations

import json
from typing import Any

import pytest
from api_fake import TEXT, Client, FakeEngine, PlainTemplate, make_server

HI = [{"role": "user", "content": "Hi"}]
PROMPT_TOKENS = len("?user: Hi\nassistant: ")
BILLING = "x-anthropic-billing-header: cc_version=2.1; cch=a1b2c;"


def ask(client: Client, **more: Any) -> Any:
    response = client.post("/v1/messages", {"model": "fake-model", "max_tokens": 100, "messages": HI, **more})
    assert response.status_code == 200, response.text
    return response.json()


def refused(client: Client, status: int = 400, **more: Any) -> dict[str, str]:
    response = client.post("/v1/messages", {"model": "fake-model", "max_tokens": 100, "messages": HI, **more})
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"type", "error"} and body["type"] == "error" and set(body["error"]) == {"type", "message"}
    error: dict[str, str] = body["error"]
    return error


def events(client: Client, **more: Any) -> list[tuple[str, dict[str, Any]]]:
    body = {"model": "fake-model", "max_tokens": 100, "messages": HI, "stream": True, **more}
    response = client.post("/v1/messages", body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    out = []
    for block in blocks:
        name, data = block.split("\n")
        parsed = json.loads(data.removeprefix("data: "))
        assert name == "event: " + parsed["type"]
        out.append((parsed["type"], parsed))
    return out


def seen(client: Client) -> dict[str, Any]:
    template = client.server.chat_template
    assert isinstance(template, PlainTemplate)
    return template.seen[-1]


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages?beta=true", "/v1/v1/messages", "/messages"])
def test_a_whole_answer(client: Client, path: str) -> None:
    reply = client.post(path, {"model": "fake-model", "max_tokens": 100, "messages": HI}).json()
    assert reply.pop("id").startswith("msg_")
    assert reply == {
        "type": "message",
        "role": "assistant",
        "model": "fake-model",
        "content": [{"type": "text", "text": TEXT}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": PROMPT_TOKENS - 4,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 4,
            "output_tokens": 54,
        },
    }


def test_events_in_their_order(client: Client) -> None:
    got = events(client)
    names = [name for name, _ in got]
    deltas = names.count("content_block_delta")
    assert names == [
        "message_start", "content_block_start", *["content_block_delta"] * deltas, "content_block_stop",
        "message_delta", "message_stop",
    ]  # fmt: skip
    start = got[0][1]["message"]
    assert (start["type"], start["content"], start["stop_reason"]) == ("message", [], None)
    assert start["usage"]["input_tokens"] == PROMPT_TOKENS and start["usage"]["output_tokens"] == 0
    assert got[1][1] == {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    texts = [data["delta"]["text"] for name, data in got if name == "content_block_delta"]
    assert "".join(texts) == TEXT and len(texts) > 10
    end = got[-2][1]
    assert end["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert end["usage"]["output_tokens"] == 54 and end["usage"]["cache_read_input_tokens"] == 4


def test_why_it_ended(client: Client) -> None:
    reply = ask(client, max_tokens=3)
    assert (reply["stop_reason"], reply["content"][0]["text"]) == ("max_tokens", "Hel")
    reply = ask(client, stop_sequences=["zzz", "wörld"])
    assert (reply["stop_reason"], reply["stop_sequence"]) == ("stop_sequence", "wörld")
    assert reply["content"] == [{"type": "text", "text": "Hello, "}]
    assert ask(client, stop_sequences=["Hello"])["content"] == []
    assert [name for name, _ in events(client, stop_sequences=["Hello"])] == [
        "message_start", "message_delta", "message_stop",
    ]  # fmt: skip


def test_parameters(client: Client, engine: FakeEngine) -> None:
    ask(client, max_tokens=7, temperature=0.2, top_p=0.5, top_k=9, metadata={"user_id": "u"})
    params = engine.requests[-1].params
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k) == (7, 0.2, 0.5, 9)
    ask(client, max_tokens=10_000)
    assert engine.requests[-1].params.max_tokens == 512 - PROMPT_TOKENS
    response = client.post("/v1/messages", {"messages": HI, "service_tier": "auto", "metadata": {}})
    assert response.headers["x-pagoda-ignored"] == "service_tier"


def test_system_in_each_form_and_without_its_billing_line(client: Client) -> None:
    text = {"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}
    billing = {"type": "text", "text": BILLING}
    plain = [{"type": "text", "text": "Be kind."}]
    forms: list[tuple[Any, Any]] = [
        ("Be kind.", "Be kind."),
        (f"{BILLING}\nBe kind.", "Be kind."),
        ([text], plain),
        ([billing, text], plain),
        ([{"type": "text", "text": BILLING + "\n"}, text], plain),
    ]
    for system, expected in forms:
        ask(client, system=system)
        assert seen(client)["messages"][0] == {"role": "system", "content": expected}
    nothing: list[Any] = [None, "", [], BILLING, [billing]]
    for system in nothing:
        ask(client, system=system)
        assert [message["role"] for message in seen(client)["messages"]] == ["user"]


def test_a_system_message_among_the_others(client: Client) -> None:
    ask(client, messages=[*HI, {"role": "system", "content": [{"type": "text", "text": "Now in French."}]}])
    assert seen(client)["messages"] == [*HI, {"role": "system", "content": "Now in French."}]


def test_blocks_of_an_agents_turn(client: Client) -> None:
    tools = [
        {"name": "add", "description": "Adds", "input_schema": {"type": "object"}},
        {"type": "web_search_20250305", "name": "web_search"},
    ]
    call = {"type": "tool_use", "id": "toolu_1", "name": "add", "input": {"a": 1}}
    thought = {"type": "thinking", "thinking": "hm", "signature": "s"}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "3"}]}
    messages = [
        *HI,
        {"role": "assistant", "content": [thought, {"type": "redacted_thinking", "data": "x"}, call]},
        {"role": "user", "content": [result, {"type": "text", "text": "and?"}, {"type": "text", "text": "so?"}]},
    ]
    body = {"messages": messages, "tools": tools, "tool_choice": {"type": "auto"}, "max_tokens": 9}
    response = client.post("/v1/messages", body)
    assert response.status_code == 200 and response.headers["x-pagoda-ignored"].endswith("tools.web_search")
    assert seen(client)["messages"][1:] == [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "toolu_1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}},
            ],
            "reasoning_content": "hm",
        },
        {"role": "tool", "tool_call_id": "toolu_1", "content": "3"},
        {"role": "user", "content": [{"type": "text", "text": "and?"}, {"type": "text", "text": "so?"}]},
    ]
    function = {"name": "add", "description": "Adds", "parameters": {"type": "object"}}
    assert seen(client)["tools"] == [{"type": "function", "function": function}]
    ask(client, tools=tools, tool_choice={"type": "none"})
    assert seen(client)["tools"] is None


def test_an_answer_that_was_begun_goes_on(client: Client, engine: FakeEngine) -> None:
    ask(client, messages=[*HI, {"role": "assistant", "content": "Well"}])
    assert bytes(engine.requests[-1].prompt_token_ids[1:]) == b"user: Hi\nassistant: Well"


def test_thinking_is_switched_in_the_template(client: Client) -> None:
    for kind, expected in (("enabled", True), ("adaptive", True), ("disabled", False)):
        ask(client, thinking={"type": kind, "budget_tokens": 1024})
        assert seen(client)["kwargs"]["enable_thinking"] is expected
    ask(client)
    assert seen(client)["kwargs"] == {}


def test_count_tokens(client: Client, engine: FakeEngine) -> None:
    for path in ("/v1/messages/count_tokens", "/v1/messages/count_tokens?beta=true"):
        assert client.post(path, {"model": "fake-model", "messages": HI}).json() == {"input_tokens": PROMPT_TOKENS}
    long = [{"role": "user", "content": "x" * 600}]
    assert client.post("/v1/messages/count_tokens", {"messages": long}).json() == {"input_tokens": PROMPT_TOKENS + 598}
    assert engine.requests == []


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"messages": []}, "messages must not be empty"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content must be"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0] must be an object"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "content[0].text must be a string"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "takes text only"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "tool_use_id must be"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "1"}]}]},
            "input must be an object",
        ),
        ({"system": [{"type": "image"}]}, "system[0] is of type 'image'"),
        ({"tools": [{"name": "x"}]}, "tools[0].input_schema must be an object"),
        ({"tools": [{}]}, "tools[0].name"),
        ({"tools": [{"name": "x", "input_schema": {}}], "tool_choice": {"type": "other"}}, "tool_choice.type"),
        ({"max_tokens": 0}, "max_tokens must be"),
        ({"temperature": -1}, "temperature must be"),
        ({"output_config": {"format": "json"}}, "output_config.format"),
    ],
)
def test_what_cannot_be_honoured(client: Client, body: dict[str, Any], words: str) -> None:
    error = refused(client, **body)
    assert error["type"] == "invalid_request_error" and words in error["message"]


def test_a_prompt_that_does_not_fit_is_not_cut(client: Client, engine: FakeEngine) -> None:
    message = refused(client, messages=[{"role": "user", "content": "x" * 600}])["message"]
    assert message.startswith("prompt is too long: ") and "512 tokens" in message and "619" in message
    assert engine.requests == []


def test_errors_by_kind(client: Client) -> None:
    unknown = refused(client, 404, model="claude-sonnet-5")
    assert unknown["type"] == "not_found_error"
    assert "Served: fake-model" in unknown["message"] and "ANTHROPIC_MODEL" in unknown["message"]
    client.server.draining = True
    assert refused(client, 503)["type"] == "overloaded_error"
    with Client(make_server(FakeEngine(fail_after=2), api_keys=("right",))) as guarded:
        assert refused(guarded, 401)["type"] == "authentication_error"
        for headers in ({"x-api-key": "right"}, {"authorization": "Bearer right"}):
            body = {"messages": HI, "max_tokens": 9}
            response = guarded.post("/v1/messages", body, headers=headers)
            assert (response.status_code, response.json()["error"]["type"]) == (500, "api_error")


def test_an_error_in_the_middle_is_an_event() -> None:
    with Client(make_server(FakeEngine(fail_after=2))) as client:
        got = events(client)
        assert got[-1] == (
            "error",
            {"type": "error", "error": {"type": "api_error", "message": "the model ran out of luck"}},
        )
        assert "message_stop" not in dict(got)
