"""Tool calls through the API: the rules of deltas, tool_choice, and the openai package putting the calls together."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from api_fake import Client, FakeEngine, PlainTemplate, events, make_server, on_port, without_nulls

from pagoda.api.turn.tools import read_tools
from pagoda.errors import BadRequest

TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}
    for name in ("get_weather", "now")
]
HERMES = "{{ tools }}<think></think><tool_call>\n{}</tool_call>"
WEATHER = '{"city": "Zürich", "note": "a \\"b\\" }"}'
TWO = (
    "<think>\nTwo calls.\n</think>\n\nI'll look.\n"
    f'<tool_call>\n{{"name": "get_weather", "arguments": {WEATHER}}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)


def serving(text: str, source: str = HERMES, opening: str = "") -> Client:
    return Client(make_server(FakeEngine(text), chat_template=PlainTemplate(source, opening)))


@pytest.fixture
def client() -> Iterator[Client]:
    with serving(TWO) as made:
        yield made


def prompt_of(client: Client) -> str:
    made = client.server.engine
    assert isinstance(made, FakeEngine)
    return bytes(made.requests[-1].prompt_token_ids[1:]).decode()


def test_whole_reply(client: Client) -> None:
    choice = client.chat(tools=TOOLS).json()["choices"][0]
    message = choice["message"]
    calls = message["tool_calls"]
    assert [(call["type"], call["function"]) for call in calls] == [
        ("function", {"name": "get_weather", "arguments": WEATHER}),
        ("function", {"name": "now", "arguments": "{}"}),
    ]
    assert message["content"] == "I'll look." and message["reasoning"] == "Two calls."
    assert choice["finish_reason"] == "tool_calls"
    ids = [call["id"] for call in calls]
    ids += [call["id"] for call in client.chat(tools=TOOLS).json()["choices"][0]["message"]["tool_calls"]]
    assert len(set(ids)) == 4


def test_content_is_null_only_beside_calls() -> None:
    with serving('<tool_call>{"name": "now"}</tool_call>') as client:
        assert client.chat(tools=TOOLS).json()["choices"][0]["message"]["content"] is None
    with serving("") as client:
        message = client.chat(tools=TOOLS).json()["choices"][0]["message"]
        assert without_nulls(message) == {"role": "assistant", "content": ""}


def test_stream_has_heads_then_arguments_one_call_at_a_time(client: Client) -> None:
    got = events(client.chat(tools=TOOLS, stream=True))
    choices = [chunk["choices"][0] for chunk in got[:-1]]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert choices[-1]["delta"] == {} and choices[-1]["finish_reason"] == "tool_calls"
    assert all(choice["finish_reason"] is None for choice in choices[:-1])
    assert all(len(choice["delta"]) == 1 or "reasoning" in choice["delta"] for choice in choices[1:-1])
    pieces = [choice["delta"]["tool_calls"] for choice in choices if "tool_calls" in choice["delta"]]
    assert all(len(piece) == 1 for piece in pieces)
    arguments: list[str] = []
    for (piece,) in pieces:
        if "id" in piece:
            assert list(piece) == ["index", "id", "type", "function"] and piece["type"] == "function"
            assert piece["index"] == len(arguments) and piece["function"]["arguments"] == ""
            arguments.append("")
        else:
            assert list(piece) == ["index", "function"] and list(piece["function"]) == ["arguments"]
            assert piece["index"] == len(arguments) - 1 and piece["function"]["arguments"]
            arguments[-1] += piece["function"]["arguments"]
    assert arguments == [WEATHER, "{}"]
    assert len(pieces) > 20, "arguments must come as they are written"
    content = "".join(choice["delta"].get("content", "") for choice in choices)
    assert content == "I'll look."


def test_openai_stream_helper_assembles_the_calls() -> None:
    engine = FakeEngine(TWO)
    server = make_server(engine, chat_template=PlainTemplate(HERMES))
    with on_port(server, engine) as url, openai.OpenAI(base_url=url + "/v1", api_key="x", max_retries=0) as api:
        asked: dict[str, Any] = {"model": "fake-model", "messages": [{"role": "user", "content": "?"}], "tools": TOOLS}
        with api.chat.completions.stream(**asked) as stream:
            final = stream.get_final_completion()
        whole = api.chat.completions.create(**asked)
    for choice in (final.choices[0], whole.choices[0]):
        calls = choice.message.tool_calls or []
        assert [(call.function.name, call.function.arguments) for call in calls if call.type == "function"] == [
            ("get_weather", WEATHER),
            ("now", "{}"),
        ]
        assert [call.id.count("call_") for call in calls] == [1, 1]
        assert choice.message.content == "I'll look." and choice.finish_reason == "tool_calls"


def test_without_tools_calls_are_text(client: Client) -> None:
    cases: list[dict[str, Any]] = [{}, {"tools": []}, {"tools": TOOLS, "tool_choice": "none"}]
    for fields in cases:
        choice = client.chat(**fields).json()["choices"][0]
        assert "tool_calls" not in choice["message"] and "<tool_call>" in choice["message"]["content"]
        assert choice["finish_reason"] == "stop"


def test_only_the_first_call_unless_parallel(client: Client) -> None:
    calls = client.chat(tools=TOOLS, parallel_tool_calls=False).json()["choices"][0]["message"]["tool_calls"]
    assert [call["function"]["name"] for call in calls] == ["get_weather"]
    got = events(client.chat(tools=TOOLS, parallel_tool_calls=False, stream=True))
    assert {call["index"] for c in got[:-1] for call in c["choices"][0]["delta"].get("tool_calls", [])} == {0}


def test_cut_off_in_a_call_is_length() -> None:
    with serving('<tool_call>{"name": "now", "arguments": {"a": 1') as client:
        choice = client.chat(tools=TOOLS, max_tokens=47).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"a": 1'


def grammar_of(client: Client) -> str:
    made = client.server.engine
    assert isinstance(made, FakeEngine)
    return made.requests[-1].params.grammar


@pytest.mark.parametrize(
    "choice",
    [{"type": "function", "function": {"name": "now"}}, {"type": "function", "name": "now"}],
)
def test_a_named_function_is_the_only_one_that_may_be_called(choice: dict[str, Any]) -> None:
    text = 'All right.\n</think>\n\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    with serving(text, opening="<think>\n") as client:
        reply = client.chat(tools=TOOLS, tool_choice=choice).json()["choices"][0]
        grammar = grammar_of(client)
        assert client.chat(tools=TOOLS, tool_choice=choice, stream=True).status_code == 200
    assert "now" in grammar and "get_weather" not in grammar and "</think>" in grammar
    assert reply["message"]["tool_calls"][0]["function"] == {"name": "now", "arguments": "{}"}
    assert (reply["finish_reason"], reply["message"]["content"]) == ("tool_calls", None)
    assert reply["message"]["reasoning"] == "All right."


def test_required_calls_any_function_and_thinks_only_where_it_may() -> None:
    with serving('<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>', opening="<think>\n") as client:
        off = {"chat_template_kwargs": {"enable_thinking": False}}
        reply = client.chat(tools=TOOLS, tool_choice="required", **off).json()["choices"][0]
        assert prompt_of(client).endswith("assistant: <think>\n\n</think>\n\n")
        grammar = grammar_of(client)
        assert "now" in grammar and "get_weather" in grammar and "think" not in grammar
        client.chat(tools=TOOLS, tool_choice="required", parallel_tool_calls=False, **off)
        assert "{0,7}" in grammar and "{0,7}" not in grammar_of(client)
    assert reply["message"]["tool_calls"][0]["function"]["name"] == "now"


def test_only_strict_tools_are_watched_when_the_model_decides(client: Client) -> None:
    client.chat(tools=TOOLS)
    assert grammar_of(client) == ""
    strict = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}, TOOLS[1]]
    assert client.chat(tools=strict).status_code == 200
    assert "free" in grammar_of(client)
    assert client.chat(tools=strict, tool_choice="none").status_code == 200
    assert grammar_of(client) == ""


def test_an_answer_of_a_given_form_may_be_a_call_instead(client: Client) -> None:
    client.chat(tools=TOOLS, response_format={"type": "json_object"})
    grammar = grammar_of(client)
    assert "calls | @part0" in grammar and "get_weather" in grammar
    client.chat(tools=TOOLS, tool_choice="none", response_format={"type": "json_object"})
    assert "get_weather" not in grammar_of(client)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice", "must be auto"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "'g'"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "tool_choice", "needs a list of tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "tools": [], "mode": 1}}, "tool_choice", "a mode"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "tools": [1], "mode": "required"}},
            "tool_choice",
            "no tools",
        ),
        ({"tools": TOOLS, "tool_choice": {"type": "custom"}}, "tool_choice", "must be a word or"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools", "tools[0].function.name"),
    ],
)
def test_wrong_tools_are_refused_by_name(client: Client, fields: dict[str, Any], param: str, words: str) -> None:
    response = client.chat(**fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param) and words in error["message"]


def test_an_unknown_family_calls_in_the_plain_format() -> None:
    with serving('<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>', "{{ tools }}") as client:
        (call,) = client.chat(tools=TOOLS, tool_choice="required").json()["choices"][0]["message"]["tool_calls"]
        assert call["function"] == {"name": "now", "arguments": "{}"}
        assert client.chat(tools=TOOLS).json()["choices"][0]["message"]["content"].startswith("<tool_call>")


def test_a_tool_whose_schema_is_wrong_is_refused_when_it_is_forced(client: Client) -> None:
    wrong = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": 1}}}}]
    error = client.chat(tools=wrong, tool_choice="required").json()["error"]
    assert error["param"] == "tools" and error["message"].startswith("tools: ")


def test_tools_that_the_template_has_no_place_for_are_told_of() -> None:
    with serving("x", "{{ messages }}") as client:
        assert client.chat(tools=TOOLS).headers["x-pagoda-ignored"] == "tools"
        assert "x-pagoda-ignored" not in client.chat(tools=[]).headers


def test_tools_of_other_types_are_left_out(client: Client) -> None:
    response = client.chat(tools=[{"type": "web_search"}, *TOOLS])
    assert response.status_code == 200
    template = client.server.chat_template
    assert isinstance(template, PlainTemplate) and template.seen[-1]["tools"] == TOOLS


def test_allowed_tools(client: Client) -> None:
    listed = [{"type": "function", "function": {"name": "now"}}, {"type": "function", "function": {"name": [1]}}]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": listed}}
    assert client.chat(tools=TOOLS, tool_choice=choice).status_code == 200
    assert grammar_of(client) == ""
    template = client.server.chat_template
    assert isinstance(template, PlainTemplate) and template.seen[-1]["tools"] == TOOLS[1:]
    choice["allowed_tools"]["mode"] = "required"  # type: ignore[index]
    client.chat(tools=TOOLS, tool_choice=choice)
    assert "now" in grammar_of(client) and "get_weather" not in grammar_of(client)


def test_mistral_ids_have_nine_letters() -> None:
    with serving('[TOOL_CALLS][{"name": "now", "arguments": {}}]', "{{ tools }}[TOOL_CALLS]") as client:
        (call,) = client.chat(tools=TOOLS).json()["choices"][0]["message"]["tool_calls"]
    assert len(call["id"]) == 9 and call["id"].isalnum()


def test_parser_named_on_the_command_line() -> None:
    template = PlainTemplate("{{ tools }}")
    engine = FakeEngine('{"name": "now", "parameters": {"a": 1}}')
    with Client(make_server(engine, chat_template=template, tool_call_parser="llama3_json")) as client:
        (call,) = client.chat(tools=TOOLS).json()["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"a": 1}


PATCH = '*** Begin\n+ "ö" \\ 🙂'
PATCHER: dict[str, Any] = {"type": "custom", "custom": {"name": "patch", "description": "Changes files."}}
PATCHED = (
    f"<tool_call>\n{json.dumps({'name': 'patch', 'arguments': {'input': PATCH}}, ensure_ascii=False)}\n</tool_call>"
)


def test_a_custom_tool_is_called_with_a_text() -> None:
    both = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n' + PATCHED
    with serving(both) as client:
        choice = client.chat(tools=[*TOOLS, PATCHER]).json()["choices"][0]
        plain, call = choice["message"]["tool_calls"]
        assert list(plain) == ["id", "type", "function"] and list(call) == ["id", "type", "custom"]
        assert (call["type"], call["custom"]) == ("custom", {"name": "patch", "input": PATCH})
        assert choice["finish_reason"] == "tool_calls"
        got = events(client.chat(tools=[*TOOLS, PATCHER], stream=True))
        pieces = [made for c in got[:-1] for made in c["choices"][0]["delta"].get("tool_calls", []) if made["index"]]
        assert list(pieces[0]) == ["index", "id", "type", "custom"] and pieces[0]["type"] == "custom"
        assert pieces[0]["custom"] == {"name": "patch", "input": ""}
        assert all(list(each) == ["index", "custom"] and list(each["custom"]) == ["input"] for each in pieces[1:])
        assert "".join(each["custom"]["input"] for each in pieces) == PATCH and len(pieces) > 10


def test_what_is_no_input_comes_as_it_was_written() -> None:
    said = '{"text": "x"}'
    text = f'<tool_call>{{"name": "patch", "arguments": {said}}}</tool_call>'
    with serving(text + PATCHED) as client:
        first, second = client.chat(tools=[PATCHER]).json()["choices"][0]["message"]["tool_calls"]
        assert (first["custom"]["input"], second["custom"]["input"]) == (said, PATCH)
        got = events(client.chat(tools=[PATCHER], stream=True))
        pieces = [made for c in got[:-1] for made in c["choices"][0]["delta"].get("tool_calls", [])]
        assert "".join(each["custom"]["input"] for each in pieces if each["index"] == 0) == said


def test_the_model_is_told_of_a_custom_tool_as_a_function_and_sees_its_calls_so() -> None:
    called = {"id": "c1", "type": "custom", "custom": {"name": "patch", "input": PATCH}}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "c1", "content": "Done."},
    ]
    grammar = {"syntax": "regex", "definition": "[a-z]+"}
    tool = {"type": "custom", "custom": {**PATCHER["custom"], "format": {"type": "grammar", "grammar": grammar}}}
    with serving("x") as client:
        reply = client.post("/v1/chat/completions", {"messages": messages, "tools": [tool]})
        assert reply.status_code == 200 and "free" in grammar_of(client)
        template = client.server.chat_template
        assert isinstance(template, PlainTemplate)
        function = template.seen[-1]["tools"][0]["function"]
        assert function["parameters"]["properties"] == {"input": {"type": "string", "pattern": "^(?:[a-z]+)$"}}
        assert "regular expression:\n[a-z]+" in function["description"]
        (told,) = template.seen[-1]["messages"][1]["tool_calls"]
        assert told["function"]["name"] == "patch" and json.loads(told["function"]["arguments"]) == {"input": PATCH}
        counted = client.post("/tokenize", {"messages": messages, "tools": [tool]}).json()
        assert counted["count"] == reply.json()["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "custom", "custom": {"name": "patch"}},
        {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "required", "tools": [{"type": "custom", "custom": {"name": "patch"}}]},
        },
    ],
)
def test_a_custom_tool_may_be_the_one_that_is_called(choice: dict[str, Any]) -> None:
    with serving(PATCHED) as client:
        (call,) = client.chat(tools=[*TOOLS, PATCHER], tool_choice=choice).json()["choices"][0]["message"]["tool_calls"]
        assert call["custom"] == {"name": "patch", "input": PATCH}
        assert "patch" in grammar_of(client) and "get_weather" not in grammar_of(client)
        error = client.chat(tools=TOOLS, tool_choice={"type": "custom", "custom": {"name": "patch"}}).json()["error"]
        assert error["param"] == "tool_choice" and "'patch'" in error["message"]


def test_custom_tools_that_are_none_or_cannot_be_enforced() -> None:
    with serving("x") as client:
        for custom in ({}, {"name": 1}, {"name": "p", "format": {"type": "grammar", "grammar": {"syntax": "peg"}}}, 1):
            reply = client.chat(tools=[{"type": "custom", "custom": custom}])
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "tools")
        nested = {"syntax": "lark", "definition": 'start: "(" start ")" | "x"'}
        tool = {"type": "custom", "custom": {"name": "p", "format": {"type": "grammar", "grammar": nested}}}
        told = client.chat(tools=[tool, {"type": "web_search"}]).headers["x-pagoda-ignored"]
        assert told == "tools.p.format, tools.web_search"


def test_a_closing_tag_that_is_cut_off_is_not_told() -> None:
    text = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    with serving(text) as client:
        choice = client.chat(tools=TOOLS, max_tokens=len(text) - 5).json()["choices"][0]
        assert choice["finish_reason"] == "length" and choice["message"]["content"] is None
        assert choice["message"]["tool_calls"][0]["function"] == {"name": "now", "arguments": "{}"}


def test_formats_of_custom_tools_are_limited_together() -> None:
    form = {"type": "grammar", "grammar": {"syntax": "lark", "definition": "start: " + '"a" ' * 15_000}}
    tools = [{"type": "custom", "custom": {"name": f"t{n}", "format": form}} for n in range(100)]
    with pytest.raises(BadRequest, match="more than 256 KiB together"):
        read_tools(tools)
    assert len(read_tools(tools[:4]).custom) == 4
