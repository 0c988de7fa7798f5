"""/v1/responses in memory: items in and out, the order of events, stored responses, what is refused."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from api_fake import TEXT, Client, FakeEngine, PlainTemplate, make_server
from test_ollama_answers import thinker

from pagoda.api.responses.input import chat_body, given_items
from pagoda.api.responses.protocol import ResponsesBody
from pagoda.api.responses.store import ResponseStore
from pagoda.api.responses.tools import read_tools

PATH = "/v1/responses"
ADD = {"type": "function", "name": "add", "parameters": {"type": "object", "properties": {}}, "strict": None}


def ask(client: Client, given: Any = "Hi", **more: Any) -> Any:
    response = client.post(PATH, {"model": "fake-model", "input": given, **more})
    assert response.status_code == 200, response.text
    return response.json()


def refused(client: Client, status: int = 400, **more: Any) -> dict[str, Any]:
    response = client.post(PATH, {"model": "fake-model", "input": "Hi", **more})
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


def events(client: Client, **more: Any) -> list[dict[str, Any]]:
    response = client.post(PATH, {"model": "fake-model", "input": "Hi", "stream": True, **more})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    out = []
    for block in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        parsed = json.loads(data.removeprefix("data: "))
        assert name == "event: " + parsed["type"]
        out.append(parsed)
    assert [each["sequence_number"] for each in out] == list(range(len(out)))
    return out


def seen(client: Client) -> dict[str, Any]:
    template = client.server.chat_template
    assert isinstance(template, PlainTemplate)
    return template.seen[-1]


def messages_of(items: list[dict[str, Any]], **more: Any) -> list[dict[str, Any]]:
    body = ResponsesBody(input=items, **more)
    return chat_body(body, given_items(body), read_tools(body)).messages


def test_a_text_gives_a_message(client: Client) -> None:
    reply = ask(client, instructions="Be kind.", metadata={"a": "b"})
    assert (reply["object"], reply["status"], reply["error"], reply["metadata"]) == (
        "response", "completed", None, {"a": "b"},
    )  # fmt: skip
    (item,) = reply["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert item["content"] == [{"type": "output_text", "text": TEXT, "annotations": []}]
    assert reply["usage"]["output_tokens"] == 54 and reply["usage"]["input_tokens_details"] == {"cached_tokens": 4}
    assert reply["usage"]["total_tokens"] == reply["usage"]["input_tokens"] + 54
    assert [(m["role"], m["content"]) for m in seen(client)["messages"]] == [("system", "Be kind."), ("user", "Hi")]


def test_a_limit_makes_it_incomplete(client: Client) -> None:
    reply = ask(client, max_output_tokens=3)
    assert reply["status"] == "incomplete" and reply["incomplete_details"] == {"reason": "max_output_tokens"}
    assert reply["output"][0]["status"] == "incomplete" and reply["output"][0]["content"][0]["text"] == TEXT[:3]
    last = events(client, max_output_tokens=3)[-1]
    assert last["type"] == "response.incomplete" and last["response"]["usage"]["output_tokens"] == 3


def test_the_order_of_events_of_a_text(client: Client) -> None:
    told = events(client)
    kinds = [each["type"].removeprefix("response.") for each in told]
    deltas = kinds.count("output_text.delta")
    assert kinds == [
        "created", "in_progress", "output_item.added", "content_part.added", *["output_text.delta"] * deltas,
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    assert told[0]["response"]["status"] == "in_progress" and told[0]["response"]["output"] == []
    assert told[2]["item"]["content"] == [] and told[3]["part"]["text"] == ""
    assert "".join(each["delta"] for each in told if "delta" in each) == told[-4]["text"] == TEXT
    assert told[-1]["response"]["output"] == [told[-2]["item"]] and told[-1]["response"]["status"] == "completed"


def test_reasoning_and_calls_are_items_of_their_own() -> None:
    with Client(thinker()[0]) as client:
        reply = ask(client, tools=[ADD])
        told = events(client, tools=[ADD])
    for output in (reply["output"], told[-1]["response"]["output"]):
        thought, said, first, second = output
        assert thought["type"] == "reasoning" and thought["content"] == [
            {"type": "reasoning_text", "text": "Let me see."}
        ]
        assert said["content"][0]["text"].strip() == "I add."
        assert (first["type"], first["name"], json.loads(first["arguments"])) == (
            "function_call", "add", {"a": 1, "b": "ö"},
        )  # fmt: skip
        assert first["call_id"] != second["call_id"] and json.loads(second["arguments"]) == {"a": 2}
    assert reply["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    by_item = [(each["type"], each["output_index"]) for each in told if "output_index" in each]
    assert [index for _, index in by_item] == sorted(index for _, index in by_item)
    for index in range(4):
        kinds = [kind for kind, at in by_item if at == index]
        assert kinds[0] == "response.output_item.added" and kinds[-1] == "response.output_item.done"
    arguments = [each for each in told if each["type"] == "response.function_call_arguments.done"]
    assert [each["arguments"] for each in arguments] == [first["arguments"], second["arguments"]]
    assert all(each["item"]["id"] == output[each["output_index"]]["id"] for each in told if "item" in each)


def test_logprobs_of_the_text(client: Client) -> None:
    part = ask(client, max_output_tokens=2, top_logprobs=1)["output"][0]["content"][0]
    assert [each["token"] for each in part["logprobs"]] == ["H", "e"] and len(part["logprobs"][0]["top_logprobs"]) == 1
    told = events(client, max_output_tokens=2, include=["message.output_text.logprobs"])
    assert [p["token"] for each in told if "delta" in each for p in each["logprobs"]] == ["H", "e"]


def test_items_become_messages() -> None:
    call = {"type": "function_call", "call_id": "c1", "name": "add", "arguments": "{}"}
    items = [
        {"role": "developer", "content": "Rules."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Add."}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Yes."}]},
        call,
        {**call, "call_id": "c2"},
        {"type": "function_call_output", "call_id": "c1", "output": "3"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "4"}]},
        {"type": "web_search_call", "id": "ws_1"},
    ]
    made = messages_of(items, instructions="Top.")
    assert [message["role"] for message in made] == [
        "system", "developer", "user", "assistant", "tool", "tool",
    ]  # fmt: skip
    answer = made[3]
    assert answer["reasoning_content"] == "Hm." and answer["content"][0]["text"] == "Yes."
    assert [each["id"] for each in answer["tool_calls"]] == ["c1", "c2"]
    assert made[4] == {"role": "tool", "tool_call_id": "c1", "content": "3"}


@pytest.mark.parametrize("odd", [-1, 1.5, True, "x", {"a": 1}, [None, {"text": 1}]])
def test_reasoning_of_any_shape(odd: Any) -> None:
    item = {"type": "reasoning", "id": "rs_1", "summary": odd, "content": [{"type": "reasoning_text", "text": "Hm."}]}
    (made, *_) = messages_of([item, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Hi"}])
    assert made["reasoning_content"] == "Hm." and made["content"] == "Yes."


def test_a_request_as_codex_sends_it(client: Client) -> None:
    body = {
        "instructions": "You are a coding agent.",
        "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]}],
        "tools": [ADD, {"type": "local_shell"}, {"type": "custom", "name": "apply_patch"}, {"type": "web_search"}],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "low", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "abc",
        "text": {"verbosity": "low"},
    }
    response = client.post(PATH, {"model": "fake-model", **body})
    assert response.status_code == 200 and "event: response.completed\n" in response.text
    ignored = response.headers["x-pagoda-ignored"]
    assert all(name in ignored for name in ("tools.local_shell", "tools.web_search", "text.verbosity"))
    assert [tool["function"]["name"] for tool in seen(client)["tools"]] == ["add", "apply_patch"]
    response_id = json.loads(response.text.split("data: ")[1].split("\n")[0])["response"]["id"]
    assert client.get(f"{PATH}/{response_id}").status_code == 404  # store: false
    assert ask(client, [], max_output_tokens=1)["status"] == "incomplete"  # its probe


def test_tool_choice(client: Client) -> None:
    other = {**ADD, "name": "other"}
    allowed = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "other"}]}
    ask(client, tools=[ADD, other], tool_choice=allowed)
    assert [tool["function"]["name"] for tool in seen(client)["tools"]] == ["other"]
    assert refused(client, tools=[ADD], tool_choice={"type": "function", "name": "none"})["param"] == "tool_choice"
    assert refused(client, tool_choice="required")["param"] == "tool_choice"


def test_previous_response_id_goes_on(client: Client) -> None:
    first = ask(client, "One", instructions="Be kind.")
    second = ask(client, "Two", previous_response_id=first["id"])
    assert second["previous_response_id"] == first["id"]
    shown = [(m["role"], m["content"]) for m in seen(client)["messages"]]
    assert [role for role, _ in shown] == ["user", "assistant", "user"]  # instructions are not handed on
    assert shown[0][1] == "One" and shown[2][1] == "Two"
    assert refused(client, 404, previous_response_id="resp_nothing")["code"] == "response_not_found"


def test_stored_responses(client: Client) -> None:
    first = ask(client, "One")
    second = ask(client, [{"role": "user", "content": "Two"}], previous_response_id=first["id"], stream=False)
    assert client.get(f"{PATH}/{second['id']}").json() == second
    page = client.get(f"{PATH}/{second['id']}/input_items?order=asc&limit=2").json()
    assert page["has_more"] and [each["role"] for each in page["data"]] == ["user", "assistant"]
    rest = client.get(f"{PATH}/{second['id']}/input_items?order=asc&after={page['last_id']}").json()
    assert [each["content"] for each in rest["data"]] == ["Two"] and not rest["has_more"]
    for query in ("limit=0", "limit=x", "order=up"):
        assert client.get(f"{PATH}/{second['id']}/input_items?{query}").status_code == 400
    assert client.get(f"{PATH}/{second['id']}/input_items?after=x").status_code == 404
    assert client.post(f"{PATH}/{second['id']}/cancel", {}).status_code == 400
    assert client.call("DELETE", f"{PATH}/{first['id']}").json()["deleted"] is True
    assert client.get(f"{PATH}/{first['id']}").status_code == 404
    assert ask(client, "Three", previous_response_id=second["id"])["status"] == "completed"
    assert client.call("PUT", f"{PATH}/{second['id']}").headers["allow"] == "GET, DELETE"


def test_a_streamed_response_is_stored(client: Client) -> None:
    last = events(client)[-1]["response"]
    assert client.get(f"{PATH}/{last['id']}").json() == last


def wait_for(client: Client, response_id: str, status: str) -> dict[str, Any]:
    for _ in range(200):
        reply: dict[str, Any] = client.get(f"{PATH}/{response_id}").json()
        if reply["status"] == status:
            return reply
        time.sleep(0.01)
    raise AssertionError(reply["status"])


def test_in_the_background() -> None:
    engine = FakeEngine("word " * 30, delay_s=0.005)
    with Client(make_server(engine)) as client:
        reply = ask(client, background=True)
        assert reply["status"] == "queued" and reply["output"] == []
        wait_for(client, reply["id"], "in_progress")
        done = wait_for(client, reply["id"], "completed")
        assert done["output"][0]["content"][0]["text"] == "word " * 30
        assert client.post(f"{PATH}/{reply['id']}/cancel", {}).json()["status"] == "completed"
        stopped = ask(client, background=True)
        wait_for(client, stopped["id"], "in_progress")
        assert refused(client, previous_response_id=stopped["id"])["param"] == "previous_response_id"
        told = client.post(f"{PATH}/{stopped['id']}/cancel", {}).json()
        assert told["status"] == "cancelled" and engine.live == 0
        gone = ask(client, background=True)
        wait_for(client, gone["id"], "in_progress")
        assert client.call("DELETE", f"{PATH}/{gone['id']}").status_code == 200
        client.get("/health")
        assert client.get(f"{PATH}/{gone['id']}").status_code == 404 and not client.server.busy


def test_failures() -> None:
    engine = FakeEngine(fail_after=3)
    with Client(make_server(engine)) as client:
        assert refused(client, 500)["message"] == "the model ran out of luck"
        told = events(client)
        assert told[-1]["type"] == "response.failed"
        failed = told[-1]["response"]
        assert failed["status"] == "failed" and failed["error"]["message"] == "the model ran out of luck"
        assert failed["output"][0]["content"][0]["text"] == TEXT[:3]
        reply = ask(client, background=True)
        assert wait_for(client, reply["id"], "failed")["error"]["code"] == "server_error"


def test_a_long_input_is_refused_or_cut_as_asked(client: Client) -> None:
    items = [{"role": "user", "content": f"{i} " + "x" * 150} for i in range(6)]
    error = refused(client, input=items)
    assert error["code"] == "context_length_exceeded"
    reply = ask(client, items, truncation="auto", instructions="Keep me.", max_output_tokens=5)
    kept = seen(client)["messages"]
    assert reply["truncation"] == "auto" and kept[0]["content"] == "Keep me."
    assert [message["content"][:2] for message in kept[1:]] == ["4 ", "5 "] or len(kept) == 4
    assert refused(client, input="x" * 600, truncation="auto")["code"] == "context_length_exceeded"
    assert ask(client, truncation="auto")["status"] == "completed"


@pytest.mark.parametrize(
    ("param", "more"),
    [
        ("input", {"input": [{"role": "robot", "content": "x"}]}),
        ("input", {"input": [{"type": "item_reference", "id": "msg_1"}]}),
        ("input", {"input": [{"type": "function_call", "name": "f"}]}),
        ("input", {"input": [{"type": 3}]}),
        ("input", {"input": [{"role": "user", "content": 3}]}),
        ("prompt", {"prompt": {"id": "pmpt_1"}}),
        ("conversation", {"conversation": "conv_1"}),
        ("background", {"background": True, "store": False}),
        ("background", {"background": True, "stream": True}),
        ("max_output_tokens", {"max_output_tokens": 0}),
        ("text", {"text": {"format": {"type": "poem"}}}),
        ("truncation", {"truncation": "some"}),
        ("top_logprobs", {"top_logprobs": 21}),
        ("temperature", {"temperature": -1}),
    ],
)
def test_what_is_refused(client: Client, param: str, more: dict[str, Any]) -> None:
    assert refused(client, **more)["param"] == param


def test_the_store_is_bounded() -> None:
    with Client(make_server()) as client:
        client.server.responses = ResponseStore(max_responses=2)
        ids = [ask(client, str(i))["id"] for i in range(3)]
        assert [client.get(f"{PATH}/{each}").status_code for each in ids] == [404, 200, 200]
        client.server.responses = ResponseStore(max_bytes=3000)
        ids = [ask(client, "x" * 300)["id"] for _ in range(3)]
        assert client.get(f"{PATH}/{ids[0]}").status_code == 404 and client.get(f"{PATH}/{ids[2]}").status_code == 200
        client.server.responses = ResponseStore(max_age_s=0.0)
        assert client.get(f"{PATH}/{ask(client)['id']}").status_code == 404
