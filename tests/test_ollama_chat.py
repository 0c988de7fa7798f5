"""Ollama's /api/chat and /api/generate in memory: shapes, options, errors in Ollama's words."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from api_fake import TEXT, Client, FakeEngine, PlainTemplate, make_server

HI = [{"role": "user", "content": "Hi"}]


def chat(client: Client, **more: Any) -> Any:
    response = client.post("/api/chat", {"model": "fake-model", "messages": HI, "stream": False, **more})
    assert response.status_code == 200, response.text
    return response.json()


def refused(client: Client, path: str = "/api/chat", status: int = 400, **more: Any) -> str:
    given = {"messages": HI} if path == "/api/chat" else {"prompt": "Hi"}
    response = client.post(path, {"model": "fake-model", **given, **more})
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    return str(response.json()["error"])


def lines(client: Client, path: str, **body: Any) -> list[dict[str, Any]]:
    response = client.post(path, {"model": "fake-model", **body})
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/x-ndjson"
    assert response.text.endswith("}\n") and "\n\n" not in response.text
    return [json.loads(line) for line in response.text.splitlines()]


@pytest.mark.parametrize("path", ["/api/chat", "/v1/api/chat", "//api/chat/"])
def test_a_whole_answer(client: Client, path: str) -> None:
    reply = client.post("http://localhost" + path, {"model": "fake-model", "messages": HI, "stream": False}).json()
    assert reply["message"] == {"role": "assistant", "content": TEXT}
    assert (reply["model"], reply["done"], reply["done_reason"]) == ("fake-model", True, "stop")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", reply["created_at"])
    assert reply["prompt_eval_count"] == len("?user: Hi\nassistant: ") and reply["eval_count"] == 54
    durations = [reply[name + "_duration"] for name in ("total", "prompt_eval", "eval")]
    assert all(isinstance(each, int) and each > 0 for each in durations)
    assert durations[0] == pytest.approx(durations[1] + durations[2], abs=2)


def test_lines_are_the_default_and_the_last_one_is_done(client: Client) -> None:
    got = lines(client, "/api/chat", messages=HI)
    assert "".join(line["message"]["content"] for line in got) == TEXT
    assert [line["done"] for line in got] == [False] * (len(got) - 1) + [True]
    assert set(got[0]) == {"model", "created_at", "message", "done"}
    assert got[-1]["message"]["content"] == "" and got[-1]["done_reason"] == "stop" and got[-1]["eval_count"] == 54


def test_generate(client: Client, engine: FakeEngine) -> None:
    got = lines(client, "/api/generate", prompt="Hi", system="Be kind.")
    assert "".join(line["response"] for line in got) == TEXT and got[-1]["done_reason"] == "stop"
    template = client.server.chat_template
    assert isinstance(template, PlainTemplate)
    assert [message["role"] for message in template.seen[-1]["messages"]] == ["system", "user"]
    whole = client.post("/api/generate", {"prompt": "Hi", "stream": False, "raw": True}).json()
    assert whole["response"] == TEXT and whole["model"] == "fake-model"
    assert engine.requests[-1].prompt_token_ids == list(b"Hi")


def test_generate_with_a_model_that_has_no_template(engine: FakeEngine) -> None:
    with Client(make_server(engine, chat_template=None)) as client:
        client.post("/api/generate", {"prompt": "Hi", "system": "S", "stream": False})
        assert engine.requests[-1].prompt_token_ids == list(b"S\n\nHi")
        assert "has no chat template" in refused(client)


def test_defaults_are_the_models_then_ollamas(engine: FakeEngine, client: Client) -> None:
    chat(client)
    params = engine.requests[-1].params
    assert (params.temperature, params.top_k, params.top_p, params.repetition_penalty) == (0.8, 40, 0.9, 1.0)
    with Client(make_server(engine, default_params={"temperature": 0.3})) as other:
        chat(other)
        params = engine.requests[-1].params
        assert (params.temperature, params.top_k) == (0.3, 40)
        chat(other, options={"temperature": 0})
        assert engine.requests[-1].params.temperature == 0


def test_options_become_parameters(engine: FakeEngine, client: Client) -> None:
    options = {
        "num_predict": 5, "temperature": 0.5, "top_k": 3.0, "top_p": 0.7, "min_p": 0.1, "repeat_penalty": 1.1,
        "presence_penalty": 0.2, "frequency_penalty": 0.3, "seed": 7, "stop": ["zz"], "num_ctx": 512,
    }  # fmt: skip
    reply = chat(client, options=options)
    assert (reply["done_reason"], reply["eval_count"]) == ("length", 5)
    params = engine.requests[-1].params
    assert (params.max_tokens, params.temperature, params.top_k, params.top_p, params.min_p) == (5, 0.5, 3, 0.7, 0.1)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.1, 0.2, 0.3)
    assert (params.seed, params.stop) == (7, ("zz",))


def test_a_stop_string_ends_the_answer(client: Client) -> None:
    reply = chat(client, options={"stop": "wörld"})
    assert (reply["message"]["content"], reply["done_reason"]) == ("Hello, ", "stop")


@pytest.mark.parametrize("limit", [-1, -2, 0])
def test_no_limit_means_the_rest_of_the_context(engine: FakeEngine, client: Client, limit: int) -> None:
    assert chat(client, options={"num_predict": limit})["eval_count"] == 54
    request = engine.requests[-1]
    assert request.params.max_tokens == 512 - len(request.prompt_token_ids)


def test_a_negative_seed_is_drawn(engine: FakeEngine, client: Client) -> None:
    for _ in range(2):
        chat(client, options={"seed": -1})
    seeds = {request.params.seed for request in engine.requests}
    assert len(seeds) == 2 and all(seed is not None and seed >= 0 for seed in seeds)


def test_null_and_unknown_options_are_tolerated_and_named(client: Client) -> None:
    options = {"temperature": None, "num_ctx": None, "stop": None, "mirostat": None, "num_thread": 4, "new": "x"}
    body = {"messages": HI, "options": options, "tools": [], "stream": False, "keep_alive": -1.0, "whatever": 1}
    response = client.post("/api/chat", body)
    assert response.status_code == 200
    assert response.headers["x-pagoda-ignored"] == "whatever, options.num_thread, options.new"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_ctx": 4096}, "asks for 4096 tokens of context, but this server has 512"),
        ({"temperature": "hot"}, "options.temperature must be a number"),
        ({"top_k": True}, "options.top_k must be a number"),
        ({"seed": 1.5}, "options.seed must be an integer"),
        ({"num_predict": 1e300}, "options.num_predict must be an integer"),
        ({"stop": [1]}, "options.stop must be"),
        ({"temperature": -1}, "temperature must be between"),
    ],
)
def test_options_that_cannot_be_honoured(client: Client, options: dict[str, Any], words: str) -> None:
    assert words in refused(client, options=options)


def test_a_prompt_that_does_not_fit_is_not_cut(client: Client, engine: FakeEngine) -> None:
    long = [{"role": "user", "content": "x" * 600}]
    for more in ({}, {"truncate": True}, {"options": {"num_ctx": 100}}):
        words = refused(client, messages=long, **more)
        assert "maximum context length is 512 tokens" in words and "619" in words
    assert "512" in refused(client, "/api/generate", prompt="x" * 600)
    assert engine.requests == []


def test_what_is_not_here_is_refused(client: Client) -> None:
    assert "suffix" in refused(client, "/api/generate", suffix="x")
    assert "--chat-template" in refused(client, "/api/generate", template="{{ .Prompt }}")
    assert "/api/chat" in refused(client, "/api/generate", context=[1, 2])
    assert "text only" in refused(client, "/api/generate", images=["aGk="])
    assert "text only" in refused(client, messages=[{"role": "user", "content": "x", "images": ["aGk="]}])
    assert "JSON schema" in refused(client, format="yaml")
    assert refused(client, format={"type": "nothing"}).startswith("format: ")
    assert refused(client, "/api/generate", format={"type": "nothing"}, raw=True).startswith("format: ")
    assert chat(client, messages=[{"role": "user", "content": "x", "images": []}], format="")["done"]


def test_an_unknown_model_is_not_found(client: Client) -> None:
    assert refused(client, status=404, model="llama3").startswith("model 'llama3' not found")
    assert refused(client, "/api/generate", 404, model="llama3").startswith("model 'llama3' not found")
    assert chat(client, model="fake-model:latest")["model"] == "fake-model:latest"


def test_nothing_asked_means_is_it_loaded(client: Client, engine: FakeEngine) -> None:
    for path, body in (("/api/chat", {"messages": []}), ("/api/generate", {"prompt": ""}), ("/api/generate", {})):
        (only,) = lines(client, path, **body)
        assert (only["done"], only["done_reason"]) == (True, "load")
        reply = client.post(path, {**body, "stream": False, "keep_alive": 0}).json()
        assert reply["done_reason"] == "unload" and reply["model"] == "fake-model"
    assert engine.requests == []


def test_thinking_is_switched_in_the_template(client: Client) -> None:
    template = client.server.chat_template
    assert isinstance(template, PlainTemplate)
    for think in (False, True, None):
        chat(client, think=think)
        assert template.seen[-1]["kwargs"].get("enable_thinking") is think
    chat(client, think="low")
    kwargs = template.seen[-1]["kwargs"]
    assert kwargs["enable_thinking"] is True and kwargs["reasoning_effort"] == "low"


def test_tools_and_their_results_reach_the_template(client: Client) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        *HI,
        {"role": "assistant", "content": "", "thinking": "hm", "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_name": "add"},
    ]
    chat(client, messages=messages, tools=tools)
    template = client.server.chat_template
    assert isinstance(template, PlainTemplate)
    seen = template.seen[-1]
    assert seen["tools"] == tools
    assert seen["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert seen["messages"][1]["reasoning_content"] == "hm"
    assert seen["messages"][2] == {"role": "tool", "content": "3", "name": "add"}


def test_logprobs(client: Client) -> None:
    reply = chat(client, logprobs=True, top_logprobs=2, options={"num_predict": 2})
    assert [entry["token"] for entry in reply["logprobs"]] == ["H", "e"]
    assert len(reply["logprobs"][0]["top_logprobs"]) == 2
    got = lines(client, "/api/chat", messages=HI, logprobs=True, options={"num_predict": 2})
    assert [entry["token"] for line in got[:-1] for entry in line["logprobs"]] == ["H", "e"]


def test_an_error_in_the_middle_is_a_line(engine: FakeEngine) -> None:
    with Client(make_server(FakeEngine(fail_after=2))) as client:
        got = lines(client, "/api/chat", messages=HI)
        assert "".join(line["message"]["content"] for line in got[:-1]) == "He"
        assert got[-1] == {"error": "the model ran out of luck"}
        response = client.post("/api/chat", {"messages": HI, "stream": False})
        assert (response.status_code, response.json()) == (500, {"error": "the model ran out of luck"})


def test_errors_of_the_door_are_in_ollamas_shape(client: Client) -> None:
    assert client.get("/api/chat").json() == {"error": "/api/chat takes POST, not GET"}
    assert "not valid JSON" in client.post("/api/chat", b"{").json()["error"]
    assert "messages must be a list" in refused(client, messages="x")
    with Client(make_server(api_keys=("right",))) as guarded:
        assert "API key" in refused(guarded, status=401)
