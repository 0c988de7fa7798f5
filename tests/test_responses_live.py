"""The openai package against /v1/responses on a port: create, stream, parse, tools over two turns, the store."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from api_fake import TEXT, FakeEngine, make_server, on_port
from openai.types.responses import FunctionToolParam, ResponseFunctionToolCall
from test_ollama_answers import thinker


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url + "/v1", api_key="EMPTY", max_retries=0, timeout=60)


ADD = FunctionToolParam(type="function", name="add", parameters={"type": "object", "properties": {}}, strict=False)


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    engine = FakeEngine()
    with on_port(make_server(engine), engine) as base:
        yield client_of(base)


def test_create_and_the_store(client: openai.OpenAI) -> None:
    first = client.responses.create(model="fake-model", input="Hi", instructions="Be kind.")
    assert first.output_text == TEXT and first.status == "completed"
    second = client.responses.create(model="fake-model", input="And?", previous_response_id=first.id)
    assert client.responses.retrieve(second.id).output_text == TEXT
    items = list(client.responses.input_items.list(second.id, order="asc", limit=1))
    assert [item.type for item in items] == ["message", "message", "message"]
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="fake-model", input="x" * 600)
    assert caught.value.code == "context_length_exceeded"


def test_stream(client: openai.OpenAI) -> None:
    with client.responses.stream(model="fake-model", input="Hi") as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text == TEXT
    kinds = [event.type for event in client.responses.create(model="fake-model", input="Hi", stream=True)]
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"


def test_background(client: openai.OpenAI) -> None:
    reply = client.responses.create(model="fake-model", input="Hi", background=True)
    assert reply.status == "queued"
    while reply.status in ("queued", "in_progress"):
        reply = client.responses.retrieve(reply.id)
    assert reply.output_text == TEXT


def test_tools_over_two_turns() -> None:
    server, engine = thinker()
    with on_port(server, engine) as base:
        client = client_of(base)
        with client.responses.stream(model="fake-model", input="Add.", tools=[ADD]) as stream:
            first = stream.get_final_response()
        calls = [item for item in first.output if isinstance(item, ResponseFunctionToolCall)]
        assert [call.name for call in calls] == ["add", "add"] and first.output[0].type == "reasoning"
        second = client.responses.create(
            model="fake-model",
            previous_response_id=first.id,
            tools=[ADD],
            input=[{"type": "function_call_output", "call_id": call.call_id, "output": "3"} for call in calls],
        )
        assert second.status == "completed"
        by_hand = client.responses.create(
            model="fake-model",
            input=[{"role": "user", "content": "Add."}, *first.output],
            tools=[ADD],  # type: ignore[list-item]
        )
        assert by_hand.status == "completed"


def test_a_failed_stream() -> None:
    engine = FakeEngine(fail_after=2)
    with on_port(make_server(engine), engine) as base:
        told = list(client_of(base).responses.create(model="fake-model", input="Hi", stream=True))
        assert told[-1].type == "response.failed" and told[-1].response.error is not None
        assert "out of luck" in told[-1].response.error.message
        with pytest.raises(openai.InternalServerError):
            client_of(base).responses.create(model="fake-model", input="Hi")
