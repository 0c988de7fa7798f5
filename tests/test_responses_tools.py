"""Tools of /v1/responses that take a text, tools in groups, and reasoning told as its summary."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest
from api_fake import Client, FakeEngine, PlainTemplate, make_server, on_port
from test_ollama_answers import SOURCE, thinker
from test_responses import ADD, ask, events, messages_of, refused, seen
from test_structured_live import url
from test_text_lark import PATCH

from pagoda.api.turn.custom import CustomInput

__all__ = ["url"]
PATCHER = {"type": "custom", "name": "apply_patch", "description": "Changes files."}
LARK = {"type": "grammar", "syntax": "lark", "definition": PATCH}
INPUT = '*** Begin Patch\n+ "ö" \\ 🙂\n'


@contextmanager
def calling(name: str, arguments: str) -> Iterator[Client]:
    said = f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'
    with Client(make_server(FakeEngine(said, max_model_len=4096), chat_template=PlainTemplate(SOURCE))) as client:
        yield client


@pytest.mark.parametrize(
    "arguments", [json.dumps({"input": INPUT}, ensure_ascii=False), json.dumps({"input": INPUT}), '{"patch": "x"}']
)
def test_a_custom_tool_is_called_with_a_text(arguments: str) -> None:
    with calling("apply_patch", arguments) as client:
        expected = INPUT if "input" in arguments else arguments
        (call,) = ask(client, tools=[PATCHER])["output"]
        assert call["id"].startswith("ctc_") and call["call_id"]
        kept = {name: call[name] for name in ("type", "name", "input", "status")}
        assert kept == {"type": "custom_tool_call", "name": "apply_patch", "input": expected, "status": "completed"}
        told = events(client, tools=[PATCHER])
        deltas = [each["delta"] for each in told if each["type"] == "response.custom_tool_call_input.delta"]
        assert "".join(deltas) == expected and (len(deltas) > 10 or expected != INPUT)
        (done,) = [each for each in told if each["type"] == "response.custom_tool_call_input.done"]
        assert done["input"] == expected and not any("function_call_arguments" in each["type"] for each in told)
        assert [each["item"]["input"] for each in told if "item" in each] == ["", expected]


def test_the_model_sees_a_function_and_its_history() -> None:
    call = {"type": "custom_tool_call", "call_id": "c1", "name": "apply_patch", "input": INPUT}
    made = messages_of([call, {"type": "custom_tool_call_output", "call_id": "c1", "output": "Done."}])
    (told,) = made[0]["tool_calls"]
    assert told == {"id": "c1", "type": "custom", "custom": {"name": "apply_patch", "input": INPUT}}
    assert made[1] == {"role": "tool", "tool_call_id": "c1", "content": "Done."}
    with calling("apply_patch", "{}") as client:
        ask(client, tools=[{**PATCHER, "format": LARK}])
        (tool,) = seen(client)["tools"]
        assert "Lark grammar:\nstart: begin_patch" in tool["function"]["description"]
        first = ask(client, "One", tools=[PATCHER])
        ask(
            client,
            [{"type": "custom_tool_call_output", "call_id": "x", "output": "Ok"}],
            previous_response_id=first["id"],
        )
        assert [message["role"] for message in seen(client)["messages"]] == ["user", "assistant", "tool"]


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_the_text_is_certain_as_early_as_it_can_be(size: int) -> None:
    arguments = '{ "input" :"a\\n\\ud83d\\ude42\\u00f6\\"\\\\\ttab"}'
    reader = CustomInput()
    parts = [reader.feed(arguments[at : at + size]) for at in range(0, len(arguments), size)]
    assert "".join(parts) == 'a\n🙂ö"\\\ttab' and reader.finish() == ""


@pytest.mark.parametrize("size", [1, 5, 1000])
@pytest.mark.parametrize(
    ("written", "text"),
    [(r"a\ud800b", "a�b"), (r"\udc00", "�"), (r"\ud800\u0041", "�A"), (r"\ud800\n", "�\n"), (r"\udBff", "�")],
)
def test_half_a_pair_of_surrogates_is_no_text_and_stops_nothing(written: str, text: str, size: int) -> None:
    reader, arguments = CustomInput(), f'{{"input":"{written}"}}'
    parts = [reader.feed(arguments[at : at + size]) for at in range(0, len(arguments), size)]
    assert "".join(parts) == text


def test_tools_in_groups() -> None:
    group = {
        "type": "namespace",
        "name": "mcp__files__",
        "description": "Files.",
        "tools": [ADD, PATCHER, {"type": "x"}],
    }
    with calling("mcp__files__add", "{}") as client:
        reply = client.post("/v1/responses", {"model": "fake-model", "input": "Hi", "tools": [group, ADD]})
        assert (
            "tools.x" in reply.headers["x-pagoda-ignored"]
            and "tools.namespace" not in reply.headers["x-pagoda-ignored"]
        )
        (call,) = reply.json()["output"]
        assert (call["type"], call["name"], call["namespace"]) == ("function_call", "add", "mcp__files__")
        names = [tool["function"]["name"] for tool in seen(client)["tools"]]
        assert names == ["mcp__files__add", "mcp__files__apply_patch", "add"]
        (told,) = messages_of([call])[0]["tool_calls"]
        assert told["function"]["name"] == "mcp__files__add"


@pytest.mark.parametrize(
    ("choice", "left"),
    [
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "custom", "name": "apply_patch"}]},
            ["apply_patch"],
        ),
        ({"type": "custom", "name": "apply_patch"}, ["add", "apply_patch"]),
    ],
)
def test_which_one_may_be_called(choice: dict[str, Any], left: list[str]) -> None:
    with calling("apply_patch", "{}") as client:
        ask(client, tools=[ADD, PATCHER], tool_choice=choice)
        assert [tool["function"]["name"] for tool in seen(client)["tools"]] == left
        assert refused(client, tools=[ADD], tool_choice={"type": "custom", "name": "x"})["param"] == "tool_choice"


@pytest.mark.parametrize(
    "tool",
    [
        {"type": "custom"},
        {**PATCHER, "format": {"type": "grammar", "syntax": "peg", "definition": "x"}},
        {**PATCHER, "format": {"type": "grammar", "syntax": "regex"}},
        {**PATCHER, "format": {"type": "grammar", "syntax": "regex", "definition": "("}},
        {**PATCHER, "format": "text"},
    ],
)
def test_a_format_that_is_none(tool: dict[str, Any]) -> None:
    with calling("apply_patch", "{}") as client:
        assert refused(client, tools=[tool])["param"] == "tools"


def test_a_grammar_that_is_not_enforced_is_named() -> None:
    form = {"type": "grammar", "syntax": "lark", "definition": 'start: "(" start ")" | "x"'}
    with calling("apply_patch", "{}") as client:
        reply = client.post("/v1/responses", {"input": "Hi", "tools": [{**PATCHER, "format": form}]})
        assert "tools.apply_patch.format" in reply.headers["x-pagoda-ignored"]


def test_reasoning_as_its_summary() -> None:
    with Client(thinker()[0]) as client:
        thought = ask(client, reasoning={"summary": "auto"})["output"][0]
        assert thought["summary"] == [{"type": "summary_text", "text": "Let me see."}] and thought["content"] == []
        told = events(client, reasoning={"summary": "auto"})
        of_it = [each for each in told if each.get("output_index") == 0]
        kinds = [each["type"].removeprefix("response.") for each in of_it]
        assert list(dict.fromkeys(kinds)) == [
            "output_item.added", "reasoning_summary_part.added", "reasoning_summary_text.delta",
            "reasoning_summary_text.done", "reasoning_summary_part.done", "output_item.done",
        ]  # fmt: skip
        assert "".join(each["delta"] for each in of_it if "delta" in each) == "Let me see."
        again = messages_of([thought, {"type": "message", "role": "assistant", "content": "Hi"}])
        assert again[0]["reasoning_content"] == "Let me see."


def test_the_openai_package_reads_them() -> None:
    server, engine = thinker(
        '<think>Hm.</think><tool_call>\n{"name": "p", "arguments": {"input": "a b"}}\n</tool_call>'
    )
    with on_port(server, engine) as base, openai.OpenAI(base_url=base + "/v1", api_key="x") as client:
        given: dict[str, Any] = {"model": "fake-model", "input": "Hi", "tools": [{"type": "custom", "name": "p"}]}
        reply = client.responses.create(**given)
        assert reply.output[1].type == "custom_tool_call" and reply.output[1].input == "a b"
        with client.responses.stream(**given, reasoning={"summary": "auto"}) as stream:
            kinds = {event.type for event in stream}
            final = stream.get_final_response()
        assert {"response.custom_tool_call_input.delta", "response.reasoning_summary_text.delta"} <= kinds
        assert final.output[0].type == "reasoning" and final.output[0].summary[0].text == "Hm."


@pytest.mark.parametrize(
    ("syntax", "definition", "right"),
    [
        ("regex", r"[A-Z]{3}-[0-9]{4}", r"[A-Z]{3}-[0-9]{4}"),
        ("lark", 'start: "SELECT " /[a-z]{2,8}/ "\\n" "FROM \\"t\\""', 'SELECT [a-z]{2,8}\nFROM "t"'),
    ],
)
def test_a_small_model_is_held_to_the_grammar(url: str, syntax: str, definition: str, right: str) -> None:
    grammar = {"syntax": syntax, "definition": definition}
    form = {"type": "grammar", **grammar}
    tool = {"type": "custom", "name": "run", "description": "Runs it.", "format": form}
    with openai.OpenAI(base_url=url + "/v1", api_key="x", timeout=120) as client:
        for choice in ("required", {"type": "custom", "name": "run"}):
            reply = client.responses.create(
                model="smollm2",
                input="Run something.",
                tools=[tool],
                tool_choice=choice,
                parallel_tool_calls=False,
                temperature=1.0,
                max_output_tokens=120,
            )  # type: ignore[call-overload]
            (call,) = reply.output
            assert call.type == "custom_tool_call" and re.fullmatch(right, call.input), call.input
        said = client.chat.completions.create(
            model="smollm2",
            messages=[{"role": "user", "content": "Run something."}],
            tools=[
                {"type": "custom", "custom": {"name": "run", "format": {"type": "grammar", "grammar": grammar}}},
            ],
            tool_choice={"type": "custom", "custom": {"name": "run"}},
            max_tokens=120,
        )  # type: ignore[call-overload]
        (made,) = said.choices[0].message.tool_calls
        assert made.type == "custom" and re.fullmatch(right, made.custom.input), made.custom.input
