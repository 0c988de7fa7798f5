"""The package `anthropic` against a server on a port; a silent stream is kept open by pings."""

from __future__ import annotations

from collections.abc import Iterator

import anthropic
import httpx
import pytest
from api_fake import TEXT, FakeEngine, make_server, on_port

from pagoda.options.http import HttpOptions

HI = [anthropic.types.UserMessageParam(role="user", content="Hi")]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    engine = FakeEngine()
    with on_port(make_server(engine, api_keys=("right",)), engine) as base:
        yield base


def client_of(url: str, key: str = "right") -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key=key, max_retries=0, timeout=60)


def test_messages_and_tokens(url: str) -> None:
    client = client_of(url)
    message = client.messages.create(model="fake-model", max_tokens=100, messages=HI, system="Be kind.")
    (block,) = message.content
    assert block.type == "text" and block.text == TEXT
    assert (message.stop_reason, message.usage.output_tokens) == ("end_turn", 54)
    count = client.messages.count_tokens(model="fake-model", messages=HI)
    assert count.input_tokens == len("?user: Hi\nassistant: ")
    with_token = anthropic.Anthropic(base_url=url, auth_token="right", max_retries=0, timeout=60)
    assert with_token.messages.create(model="fake-model", max_tokens=3, messages=HI).stop_reason == "max_tokens"


def test_a_stream(url: str) -> None:
    with client_of(url).messages.stream(model="fake-model", max_tokens=100, messages=HI) as stream:
        assert "".join(stream.text_stream) == TEXT
        message = stream.get_final_message()
    assert (message.stop_reason, message.usage.output_tokens, message.usage.cache_read_input_tokens) == (
        "end_turn",
        54,
        4,
    )


def test_errors_by_class(url: str) -> None:
    with pytest.raises(anthropic.AuthenticationError, match="API key"):
        client_of(url, "wrong").messages.create(model="fake-model", max_tokens=3, messages=HI)
    client = client_of(url)
    with pytest.raises(anthropic.NotFoundError, match="not_found_error"):
        client.messages.create(model="claude-sonnet-5", max_tokens=3, messages=HI)
    long = [anthropic.types.UserMessageParam(role="user", content="x" * 600)]
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        client.messages.create(model="fake-model", max_tokens=3, messages=long)


def test_an_error_in_a_stream_is_raised() -> None:
    engine = FakeEngine(fail_after=2)
    with on_port(make_server(engine), engine) as base:
        client = client_of(base)
        stream = client.messages.create(model="fake-model", max_tokens=100, messages=HI, stream=True)
        with pytest.raises(anthropic.APIStatusError, match="out of luck"):
            list(stream)


def test_a_silent_stream_gets_pings() -> None:
    engine = FakeEngine(text="a", delay_s=0.1)
    body = {"model": "fake-model", "max_tokens": 9, "messages": HI, "stream": True}
    with on_port(make_server(engine, options=HttpOptions(sse_keep_alive_interval=0.02)), engine) as base:
        text = httpx.post(base + "/v1/messages", json=body).text
        with client_of(base).messages.stream(model="fake-model", max_tokens=9, messages=HI) as stream:
            assert "".join(stream.text_stream) == "a"
    assert 'event: ping\ndata: {"type":"ping"}\n\n' in text and "keep-alive" not in text
