"""POST /v1/chat/completions in memory: shapes, the rules of streams, what the template gets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from api_fake import TEXT, Client, FakeEngine, PlainTemplate, events, make_server

from pagoda.sched.outcome import GRAMMAR_ENDED
from pagoda.types import SamplingParams


@pytest.fixture
def client() -> Iterator[Client]:
    with Client(make_server()) as made:
        yield made


def engine(client: Client) -> FakeEngine:
    made = client.server.engine
    assert isinstance(made, FakeEngine)
    return made


def seen(client: Client) -> dict[str, Any]:
    template = client.server.chat_template
    assert isinstance(template, PlainTemplate)
    return template.seen[-1]


def test_whole_reply_has_every_field_clients_read(client: Client) -> None:
    reply = client.chat("ping", max_tokens=5).json()
    assert reply["object"] == "chat.completion"
    assert reply["id"].startswith("chatcmpl-")
    assert reply["model"] == "fake-model"
    assert reply["choices"] == [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": "Hello",
                **dict.fromkeys(("refusal", "annotations", "audio", "function_call", "reasoning")),
            },
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
            "token_ids": None,
        }
    ]
    assert {"service_tier", "prompt_logprobs", "prompt_token_ids", "kv_transfer_params"} <= set(reply)
    assert reply["system_fingerprint"].startswith("pagoda-")
    prompt = len("user: ping\nassistant: ") + 1
    assert reply["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 5,
        "total_tokens": prompt + 5,
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def test_stream_is_role_content_finish_usage_done(client: Client) -> None:
    got = events(client.chat(stream=True, stream_options={"include_usage": True}))
    assert got[-1] == "[DONE]"
    first, *content, finish, usage = got[:-1]
    opening = {"role": "assistant", "content": ""}
    assert first["choices"] == [{"index": 0, "delta": opening, "logprobs": None, "finish_reason": None}]
    for chunk in content:
        (choice,) = chunk["choices"]
        assert list(choice["delta"]) == ["content"] and choice["delta"]["content"]
        assert choice["finish_reason"] is None
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in content) == TEXT
    assert finish["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]
    assert finish["system_fingerprint"] == client.server.fingerprint
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == len(TEXT.encode()) + 1
    assert all("usage" not in chunk for chunk in (first, *content, finish))
    assert len({(c["id"], c["object"], c["created"], c["model"]) for c in got[:-1]}) == 1
    assert first["object"] == "chat.completion.chunk"


def test_stream_without_usage_has_none(client: Client) -> None:
    assert all("usage" not in chunk for chunk in events(client.chat(stream=True))[:-1])


def test_continuous_usage_grows(client: Client) -> None:
    got = events(client.chat(stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}))
    counts = [chunk["usage"]["completion_tokens"] for chunk in got[:-1]]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == len(TEXT.encode()) + 1


def test_stream_headers(client: Client) -> None:
    headers = client.chat(stream=True).headers
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert headers["cache-control"] == "no-cache"
    assert headers["x-accel-buffering"] == "no"
    assert "content-encoding" not in headers
    assert headers["x-request-id"].startswith("chatcmpl-")


def test_line_separators_inside_text_are_escaped() -> None:
    with Client(make_server(FakeEngine("a\u2028b\u0085c\nd"))) as client:
        response = client.chat(stream=True)
    assert not any(mark in response.text for mark in ("\u2028", "\u0085"))
    got = events(response)
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in got[:-1]) == "a\u2028b\u0085c\nd"


def test_logprobs_have_bytes_and_alternatives(client: Client) -> None:
    (choice,) = client.chat(logprobs=True, top_logprobs=2, max_tokens=9).json()["choices"]
    content = choice["logprobs"]["content"]
    assert len(content) == 9
    assert content[0] == {
        "token": "H",
        "logprob": -0.5,
        "bytes": [72],
        "top_logprobs": [
            {"token": "H", "logprob": -0.5, "bytes": [72]},
            {"token": "I", "logprob": -1.5, "bytes": [73]},
        ],
    }
    assert content[8]["bytes"] == list("ö".encode())[:1]
    streamed = events(client.chat(logprobs=True, top_logprobs=2, max_tokens=9, stream=True))
    pieces = [chunk["choices"][0].get("logprobs") for chunk in streamed[:-1]]
    assert [entry for piece in pieces if piece for entry in piece["content"]] == content


def test_n_answers_with_seeds_of_their_own(client: Client) -> None:
    reply = client.chat(n=3, seed=2**64 - 1, max_tokens=4).json()
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
    assert reply["usage"]["completion_tokens"] == 12
    seeds = [request.params.seed for request in engine(client).requests]
    assert seeds[0] == 2**64 - 1 and len(set(seeds)) == 3
    client.chat(n=3, seed=2**64 - 1)
    assert [request.params.seed for request in engine(client).requests[3:]] == seeds
    got = events(client.chat(n=2, stream=True))
    for index in (0, 1):
        mine = [c["choices"][0] for c in got[:-1] if c["choices"][0]["index"] == index]
        assert "".join(choice["delta"].get("content", "") for choice in mine) == TEXT
        assert mine[-1]["finish_reason"] == "stop"


def test_stop_string_ends_the_answer_and_frees_the_engine(client: Client) -> None:
    (choice,) = client.chat(stop=["wör", "zzz"]).json()["choices"]
    assert choice["message"]["content"] == "Hello, "
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "wör")
    assert engine(client).cancelled == 1 and engine(client).live == 0
    got = events(client.chat(stop="wör", stream=True))
    assert got[-2]["choices"][0]["stop_reason"] == "wör"
    assert client.chat(stop_token_ids=[ord(",")]).json()["choices"][0]["stop_reason"] == ord(",")


def test_limits_of_tokens(client: Client) -> None:
    client.chat(max_completion_tokens=3, max_tokens=7)
    client.chat()
    client.chat(max_tokens=10**6)
    room = 512 - len("user: Hi\nassistant: ") - 1
    assert [request.params.max_tokens for request in engine(client).requests] == [3, room, room]


def test_too_long_a_prompt_names_both_numbers(client: Client) -> None:
    response = client.chat("x" * 600)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "maximum context length is 512 tokens, but the prompt holds 619" in error["message"]
    far = client.chat("x" * 10**6).json()["error"]
    assert "maximum context length is 512 tokens, but the prompt holds at least 4096" in far["message"]
    assert client.chat("x" * 600, truncate_prompt_tokens=100).json()["usage"]["prompt_tokens"] == 100
    assert client.chat("x" * 600, truncate_prompt_tokens=-1).json()["usage"]["prompt_tokens"] == 511


def test_model_defaults_are_used_and_overridden() -> None:
    with Client(make_server(default_params={"temperature": 0.6, "top_k": 20, "max_tokens": 30})) as client:
        client.chat()
        client.chat(temperature=0, top_k=None, max_tokens=9)
        params = [request.params for request in engine(client).requests]
    assert [(p.temperature, p.top_k, p.max_tokens) for p in params] == [(0.6, 20, 30), (0.0, 20, 9)]


def test_every_sampling_field_reaches_the_engine(client: Client) -> None:
    given: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 0.2,
        "frequency_penalty": -0.3,
        "repetition_penalty": 1.1,
        "min_tokens": 2,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
    }
    client.chat(
        **given,
        logit_bias={"5": -100, "6": 1.5},
        allowed_token_ids=[1, 2],
        cache_salt="s",
        priority=-3,
        stop_token_ids=[7],
    )
    request = engine(client).requests[0]
    assert {name: getattr(request.params, name) for name in given} == given
    assert request.params.logit_bias == {5: -100.0, 6: 1.5}
    assert (request.params.allowed_token_ids, request.params.stop_token_ids) == ((1, 2), (7,))
    assert (request.cache_salt, request.priority) == ("s", -3)
    assert request.eos_token_ids == (257,)


def test_priority_may_come_as_a_header(client: Client) -> None:
    ask = {"messages": [{"role": "user", "content": "Hi"}], "prompt": "Hi", "max_tokens": 1}
    for path in ("/v1/chat/completions", "/v1/completions"):
        for given in ({}, {"priority": 3}):
            assert client.post(path, ask | given, headers={"X-Vllm-Priority": "-7"}).status_code == 200
        for wrong in ("high", "9999999999"):
            refused = client.post(path, ask, headers={"X-Vllm-Priority": wrong})
            assert refused.status_code == 400 and refused.json()["error"]["param"] == "priority"
    assert [request.priority for request in engine(client).requests] == [-7, 3, -7, 3]


def test_bad_words_become_their_tokens(client: Client) -> None:
    client.chat(bad_words=[" hi", "\n", "x"])
    assert engine(client).requests[0].params.bad_words_token_ids == (
        (104, 105), (32, 104, 105), (10,), (120,), (32, 120),
    )  # fmt: skip
    assert client.chat(bad_words=[""]).json()["error"]["param"] == "bad_words"


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking", "reasoning_text"])
def test_earlier_reasoning_has_one_name_and_no_place_in_the_content(client: Client, name: str) -> None:
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}]
    messages = [{"role": "assistant", name: "hm", "content": parts}, {"role": "user", "content": "q", "name": None}]
    assert client.post("/v1/chat/completions", {"messages": messages}).status_code == 200
    assert seen(client)["messages"] == [
        {"role": "assistant", "content": [{"type": "text", "text": "a"}], "reasoning_content": "hm"},
        {"role": "user", "content": "q", "name": None},
    ]


def test_tools_reach_the_template(client: Client) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    client.chat(tools=[tool], tool_choice="auto")
    assert seen(client)["tools"] == [tool]
    client.chat(tools=[tool], tool_choice="none")
    assert seen(client)["tools"] is None
    for empty in ([], None):
        assert client.chat(tools=empty).status_code == 200
        assert not seen(client)["tools"]


@pytest.mark.parametrize(
    ("fields", "enabled"),
    [
        ({}, None),
        ({"enable_thinking": False}, False),
        ({"chat_template_kwargs": {"enable_thinking": False}, "enable_thinking": True}, False),
        ({"thinking": {"type": "disabled"}}, False),
        ({"thinking": {"type": "enabled"}}, True),
        ({"think": False}, False),
        ({"think": "high"}, True),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "minimal"}, False),
        ({"chat_template_kwargs": {"thinking": False}, "reasoning_effort": "high"}, False),
        ({"reasoning": {"effort": "low"}}, True),
    ],
)
def test_thinking_has_one_switch_under_many_names(client: Client, fields: dict[str, Any], enabled: bool | None) -> None:
    assert client.chat(**fields).status_code == 200
    assert seen(client)["kwargs"].get("enable_thinking") is enabled


def test_server_defaults_of_template_variables() -> None:
    with Client(make_server(default_template_kwargs={"enable_thinking": False, "x": 1})) as client:
        client.chat(enable_thinking=True)
        assert seen(client)["kwargs"] == {"enable_thinking": True, "thinking": True, "x": 1}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": []}, "messages", "must not be empty"),
        ({"messages": [{"role": "user", "content": "x"}] * 10_001}, "messages", "at most 10000"),
        ({"response_format": {"type": "yaml"}}, "response_format", "type must be"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format", "needs a schema"),
        ({"guided_json": "{"}, "guided_json", "does not hold JSON"),
        ({"guided_regex": "("}, "guided_regex", "regex"),
        ({"structured_outputs": {"choice": [1]}}, "structured_outputs", "list of strings"),
        ({"structured_outputs": {"choice": ["a"], "regex": "a"}}, "structured_outputs", "regex, choice"),
        ({"guided_choice": ["a"], "guided_regex": "a"}, "guided_regex", "give one of them"),
        ({"chat_template": "{{ x }}"}, "chat_template", "--chat-template"),
        ({"top_logprobs": 2}, "top_logprobs", "logprobs: true"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "stream: false"),
        ({"functions": [{"name": "f"}]}, "functions", "tools"),
        ({"modalities": ["text", "audio"]}, "modalities", "text only"),
        ({"max_tokens": 0}, "max_tokens", "at least 1"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"999": 1}}, "logit_bias", "outside 0..259"),
        ({"stop": ["x"] * 17}, "stop", "16"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(client: Client, fields: dict[str, Any], param: str, words: str) -> None:
    response = client.chat(**fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param and words in error["message"]
    assert engine(client).requests == []


def test_harmless_values_of_unsupported_fields_pass(client: Client) -> None:
    fields = {"response_format": {"type": "text"}, "tools": [], "stop": None, "bad_words": [], "functions": []}
    assert client.chat(**fields, modalities=["text"], use_beam_search=False, seed=None).status_code == 200


def test_unknown_fields_are_named_and_do_no_harm(client: Client) -> None:
    response = client.chat(drop_params=True, **{"bad\r\nname: x": 1}, user="me")
    assert response.status_code == 200
    assert response.headers["x-pagoda-ignored"] == "drop_params, bad??name??x"
    assert client.chat(stream=True, web_search=1).headers["x-pagoda-ignored"] == "web_search"


def test_continue_and_echo(client: Client) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "So: "}]
    body = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False, "echo": True}
    reply = client.post("/v1/chat/completions", {**body, "max_tokens": 5}).json()
    assert reply["choices"][0]["message"]["content"] == "So: Hello"
    assert bytes(engine(client).requests[0].prompt_token_ids[1:]) == b"user: q\nassistant: So: "


def test_token_ids_and_prompt_logprobs_on_request(client: Client) -> None:
    reply = client.chat("q", max_tokens=2, return_token_ids=True, prompt_logprobs=1).json()
    assert reply["choices"][0]["token_ids"] == [72, 101]
    assert len(reply["prompt_token_ids"]) == len(reply["prompt_logprobs"]) == reply["usage"]["prompt_tokens"]
    assert reply["prompt_logprobs"][0] is None
    assert reply["prompt_logprobs"][1] == {"117": {"logprob": -0.5, "decoded_token": "u", "rank": 1}}


def test_error_in_a_stream_is_an_event_without_choices() -> None:
    with Client(make_server(FakeEngine(fail_after=3))) as client:
        got = events(client.chat(stream=True))
        assert got[-1]["error"] == {
            "message": "the model ran out of luck",
            "type": "InternalServerError",
            "param": None,
            "code": "engine_error",
        }
        assert "[DONE]" not in got and "choices" not in got[-1]
        whole = client.chat()
        assert (whole.status_code, whole.json()["error"]["code"]) == (500, "engine_error")
        assert not client.server.busy


def test_a_grammar_that_grows_too_complex_is_the_fault_of_the_request() -> None:
    engine = FakeEngine(fail_after=3)
    engine.failure = f"{GRAMMAR_ENDED}: too many items"
    with Client(make_server(engine)) as client:
        assert events(client.chat(stream=True))[-1]["error"]["code"] == "invalid_request_error"
        whole = client.chat()
        assert whole.status_code == 400 and "too many items" in whole.json()["error"]["message"]


def test_a_schema_that_nothing_matches_is_refused() -> None:
    with Client(make_server()) as client:
        for schema in (False, {"$ref": "#"}):
            form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
            error = client.chat(response_format=form).json()["error"]
            assert error["param"] == "response_format" and "NoExtension" not in error["message"]
        form["json_schema"]["schema"] = True  # type: ignore[index]
        assert client.chat(response_format=form).status_code == 200


def test_without_a_template_the_way_out_is_named() -> None:
    with Client(make_server(chat_template=None)) as client:
        error = client.chat().json()["error"]
    assert "no chat template" in error["message"]
    assert "/v1/completions" in error["message"] and "--chat-template" in error["message"]


def test_too_many_at_once_are_sent_away() -> None:
    with Client(make_server(FakeEngine(max_num_seqs=2), max_queued=1)) as client:
        error = client.chat(n=4)
        assert (error.status_code, error.json()["error"]["param"]) == (400, "prompt")
        held = client.server.start("chatcmpl", [[1], [2]], SamplingParams())
        response = client.chat(n=2)
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert response.json()["error"]["code"] == "server_overloaded"
        assert 'vllm:admission_rejections_total{engine="0",model_name="fake-model",reason="queue_full"} 1.0' in (
            client.get("/metrics").text
        )
        held.close()
        assert client.chat(n=2).status_code == 200


def test_documents_reach_the_template(client: Client) -> None:
    documents = [{"title": "a", "text": "b"}]
    assert "x-pagoda-ignored" not in client.chat(documents=documents, max_tokens=1).headers
    template = client.server.chat_template
    assert isinstance(template, PlainTemplate) and template.seen[-1]["kwargs"]["documents"] == documents


def test_several_conversations_have_a_choice_each() -> None:
    with Client(make_server(FakeEngine("one two three"))) as client:
        told = [[{"role": "user", "content": text}] for text in ("A", "Bcd", "Ef")]
        reply = client.post("/v1/chat/completions/batch", {"messages": told, "max_tokens": 3, "seed": 5, "other": 1})
        assert reply.status_code == 200 and reply.headers["x-pagoda-ignored"] == "other"
        found = reply.json()
        alone = [client.chat(messages=each, max_tokens=3, seed=5).json() for each in told]
        assert [choice["index"] for choice in found["choices"]] == [0, 1, 2]
        for choice, single in zip(found["choices"], alone, strict=True):
            assert choice["message"] == single["choices"][0]["message"]
        for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
            assert found["usage"][name] == sum(single["usage"][name] for single in alone)
        assert found["object"] == "chat.completion" and not client.server.busy
        asked = engine(client).requests[:3]
        assert [request.params.max_tokens for request in asked] == [3] * 3


def test_what_a_batch_of_conversations_refuses() -> None:
    with Client(make_server(FakeEngine())) as client:
        hi = [{"role": "user", "content": "Hi"}]
        tool = {"type": "function", "function": {"name": "f"}}
        for body, param in (
            ({"messages": hi}, "messages"),
            ({"messages": []}, "messages"),
            ({"messages": [hi, []]}, "messages"),
            ({"messages": [hi], "stream": True}, "stream"),
            ({"messages": [hi], "n": 2}, "n"),
            ({"messages": [hi], "tools": [tool]}, "tools"),
            ({"messages": [hi], "use_beam_search": True}, "use_beam_search"),
            ({"messages": [hi, [{"role": "user", "content": "x" * 5000}]]}, None),
            ({"messages": [hi], "temperature": -1}, "temperature"),
        ):
            reply = client.post("/v1/chat/completions/batch", body)
            assert reply.status_code == 400 and reply.json()["error"]["param"] == param, body
            assert not client.server.busy
