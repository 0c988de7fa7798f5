"""A limit for reasoning: its end is written in the model's place, and the answer goes on behind it."""

from __future__ import annotations

from typing import Any

import pytest
from api_fake import Client, FakeEngine, PlainTemplate, events, make_server

THINKS = "{{ messages }}{% if enable_thinking is false %}<think>\n\n</think>{% endif %}"
# What the fake engine says at a place does not depend on what was forced before it.
TEXT = "<think>\nI wonder about many things for long.</think>\n\nFour."


def thinker(text: str = TEXT, opening: str = "", **more: Any) -> Client:
    return Client(make_server(FakeEngine(text, **more), chat_template=PlainTemplate(THINKS, opening)))


def requests(client: Client) -> list[Any]:
    engine = client.server.engine
    assert isinstance(engine, FakeEngine)
    return engine.requests


def ask(client: Client, **more: Any) -> Any:
    response = client.chat(**more)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize(
    "body",
    [
        {"thinking_token_budget": 17},
        {"thinking_budget": 17},
        {"thinking": {"type": "enabled", "budget_tokens": 17}},
        {"reasoning": {"max_tokens": 17}},
    ],
)
def test_reasoning_ends_at_the_limit(body: dict[str, Any]) -> None:
    with thinker() as client:
        reply = ask(client, logprobs=True, **body)
        first, second = requests(client)
        closing = list(b"\n</think>\n\n")
        assert first.params.max_tokens == 17 and second.params.max_tokens > 400
        assert second.output_token_ids == [*TEXT.encode()[:17], *closing]
        message = reply["choices"][0]["message"]
        assert message["reasoning_content"] == "I wonder"
        assert message["content"] == TEXT[17 + len(closing) :].strip()
        tokens = reply["choices"][0]["logprobs"]["content"]
        assert len(tokens) == reply["usage"]["completion_tokens"] == len(TEXT) + 1
        assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == 4 and not client.server.busy


def test_as_a_stream_and_several_at_once() -> None:
    with thinker() as client:
        whole = ask(client, thinking_token_budget=17)["choices"][0]["message"]
        got = [e for e in events(client.chat(thinking_token_budget=17, n=2, stream=True)) if e != "[DONE]"]
        for index in range(2):
            deltas = [c["delta"] for e in got for c in e["choices"] if c["index"] == index]
            assert "".join(d.get("reasoning", "") for d in deltas) == whole["reasoning"]
            assert "".join(d.get("content", "") for d in deltas) == whole["content"]


def test_what_ends_in_time_is_left_alone() -> None:
    with thinker() as client:
        plain = ask(client)["choices"][0]
        long = TEXT.index("Four")
        for budget in (-1, long, 400, 100_000):
            assert ask(client, thinking_token_budget=budget)["choices"][0] == plain
        # Cut behind the end of the reasoning: it goes on with nothing forced.
        assert requests(client)[-3].output_token_ids == list(TEXT.encode()[:long])
    with thinker("No thoughts at all.") as client:
        assert ask(client, thinking_token_budget=5)["choices"][0]["message"]["content"] == "No thoughts at all."


def test_a_prompt_that_opened_the_reasoning() -> None:
    with thinker("I wonder and wonder and wonder.</think>\n\nFour.", opening="<think>\n") as client:
        message = ask(client, thinking_token_budget=8)["choices"][0]["message"]
        assert message["reasoning_content"] == "I wonder"


def test_limits_of_the_whole_come_first() -> None:
    with thinker() as client:
        reply = ask(client, thinking_token_budget=17, max_tokens=20)
        assert reply["choices"][0]["finish_reason"] == "length" and reply["usage"]["completion_tokens"] == 20
        assert ask(client, thinking_token_budget=17, max_tokens=10)["usage"]["completion_tokens"] == 10
        stopped = ask(client, thinking_token_budget=17, stop=["won"])["choices"][0]
        assert stopped["stop_reason"] == "won" and len(requests(client)) == 3
    with thinker(fail_after=20) as client:
        assert client.chat(thinking_token_budget=5).status_code == 500 and not client.server.busy


def test_zero_means_no_reasoning_and_nonsense_is_refused() -> None:
    with thinker() as client:
        ask(client, thinking_token_budget=0)
        template = client.server.chat_template
        assert isinstance(template, PlainTemplate) and template.seen[-1]["kwargs"]["enable_thinking"] is False
        for bad in ({"thinking_token_budget": -2}, {"thinking": {"budget_tokens": "many"}}):
            assert client.chat(**bad).status_code == 400
    with Client(make_server()) as client:  # a model that does not think has nothing to limit
        assert ask(client, thinking_token_budget=5)["choices"][0]["message"]["content"]
