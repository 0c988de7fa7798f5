"""What front ends that cannot be installed here send, in their order, and what each of them reads of the answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pooled_models import minilm_folder
from server_process import running, serve

HI = [{"role": "user", "content": "Hi"}]
DOCUMENTS = ["The tower is tall.", "Cats like milk.", "A kitten drinks from a bowl."]


@pytest.fixture(scope="module")
def chat(smollm2_path: str) -> Iterator[httpx.Client]:
    options = ("--served-model-name", "small", "--max-model-len", "512", "--num-gpu-blocks-override", "128")
    with running(*serve(smollm2_path, *options)) as url, httpx.Client(base_url=url, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def vectors() -> Iterator[httpx.Client]:
    with running(*serve(str(minilm_folder()), "--served-model-name", "minilm")) as url:
        with httpx.Client(base_url=url, timeout=120) as client:
            yield client


def events(client: httpx.Client, path: str, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream that is framed as clients need it, without its last word."""
    reply = client.post(path, json={"stream": True, **body})
    assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/event-stream"), reply.text
    *lines, rest = reply.text.replace(": keep-alive\n\n", "").split("\n\n")  # a slow machine is silent for seconds
    assert not rest and lines[-1] == "data: [DONE]" and all(line.startswith("data: {") for line in lines[:-1])
    return [json.loads(line[6:]) for line in lines[:-1]]


def text_of(found: list[dict[str, Any]]) -> str:
    return "".join(each["choices"][0]["delta"].get("content") or "" for each in found if each["choices"])


def test_open_webui(chat: httpx.Client, vectors: httpx.Client) -> None:
    (card,) = chat.get("/v1//models", headers={"Authorization": ""}).json()["data"]
    body = {"model": card["id"], "messages": HI, "tools": [], "max_tokens": 12, "temperature": 0}
    body["stream_options"] = {"include_usage": True}
    found = events(chat, "/v1/chat/completions", **body, metadata={"chat_id": "1"}, features={})
    assert text_of(found) and [bool(each.get("usage")) for each in found][-2:] == [False, True]
    assert found[-1]["choices"] == [] and found[-2]["choices"][0]["finish_reason"] in ("stop", "length")
    begun = [*HI, {"role": "assistant", "content": "Hello, my name is"}]  # its button Continue
    again = events(chat, "/v1/chat/completions", model=card["id"], messages=begun, max_tokens=6)
    assert text_of(again)
    assert chat.get("/api/version").json()["version"]  # as a connection to Ollama
    assert chat.get("/api/tags").json()["models"][0]["model"] == "small:latest"
    assert chat.get("/api/ps").json()["models"][0]["expires_at"]
    unload = {"model": "small", "prompt": "", "keep_alive": 0}
    assert chat.post("/api/generate", json=unload).json()["done"] is True
    made = vectors.post("/v1/embeddings", json={"input": DOCUMENTS, "model": "minilm"}).json()["data"]
    assert [each["index"] for each in made] == [0, 1, 2]
    ask = {"model": "minilm", "query": "What does a cat eat?", "documents": DOCUMENTS, "top_n": 3}
    ranked = vectors.post("/v1/rerank", json=ask).json()["results"]
    assert sorted(each["index"] for each in ranked) == [0, 1, 2] and ranked[0]["index"] == 1


@pytest.mark.parametrize("base", ["/v1", ""])
def test_ragflow(chat: httpx.Client, vectors: httpx.Client, base: str) -> None:
    key = {"Authorization": "Bearer x"}
    (card,) = chat.get("/v1/models", headers=key).json()["data"]
    assert card["max_tokens"] == card["max_model_len"] == 512
    asked = {"model": "small", "messages": HI, "temperature": 0, "enable_thinking": False, "stop": ["\n\n"]}
    found = events(chat, f"{base}/chat/completions", **asked)
    assert text_of(found) and not any(each.get("usage") for each in found) and all(each["choices"] for each in found)
    whole = chat.post(f"{base}/chat/completions", json=asked, headers=key).json()
    assert whole["choices"][0]["message"]["content"] == text_of(found) and whole["usage"]["total_tokens"] > 0
    texts = {"input": ["Test if the api key is available"], "model": "minilm", "encoding_format": "float"}
    made = vectors.post(f"{base}/embeddings", json={**texts, "drop_params": True}).json()
    assert len(made["data"][0]["embedding"]) == 384 and made["usage"]["total_tokens"] > 0
    query = {"model": "minilm", "query": "What's the weather?", "documents": ["It rains."], "top_n": 1}
    more = {"return_documents": "true", "return_len": "true"}  # as Xinference's client writes them
    for path in (f"{base}/rerank", "/v1/v1/rerank"):
        ranked = vectors.post(path, json={**query, **more}).json()
        assert 0 <= ranked["results"][0]["relevance_score"] <= 1 and ranked["usage"]["total_tokens"] > 0
    shown = chat.post("/api/show", json={"model": "small"}).json()
    assert shown["model_info"][f"{shown['details']['family']}.context_length"] == 512
    vision = {"model": "small", "prompt": "Hi", "stream": False, "options": {"num_predict": 3}}
    assert chat.post("/v1/api/generate", json=vision).json()["response"]


def test_its_classifier_of_errors_retries_none_of_the_users_own(chat: httpx.Client) -> None:
    """RAGFlow sleeps for minutes where a message has words of rates, quotas, keys or servers in it."""
    long = chat.post(
        "/v1/chat/completions", json={"model": "small", "messages": [{"role": "user", "content": "a " * 900}]}
    )
    wrong = chat.post("/v1/chat/completions", json={"model": "small", "messages": HI, "temperature": -1})
    for reply in (long, wrong):
        said = reply.json()["error"]["message"].lower()
        assert reply.status_code == 400
        for word in (
            "quota",
            "capacity",
            "credit",
            "rate limit",
            "api key",
            "apikey",
            "auth",
            "forbidden",
            "unavailable",
        ):
            assert word not in said


def test_continue_and_cline_read_the_length_from_the_list(chat: httpx.Client) -> None:
    first = chat.get("/v1/models", headers={"Authorization": "Bearer undefined", "x-api-key": "undefined"}).json()[
        "data"
    ][0]
    assert first["max_model_len"] == 512
    body = {"model": first["id"], "messages": HI, "max_tokens": 6, "stream_options": {"include_usage": True}}
    found = events(chat, "/v1/chat/completions", **body)
    assert [bool(each.get("usage")) for each in found] == [False] * (len(found) - 1) + [True]
    assert isinstance(chat.post("/api/show", json={"name": "small"}).json()["parameters"], str)


def test_spring_ai(chat: httpx.Client) -> None:
    """Its base URL is without /v1; the JDK's client offers HTTP/2 in its first request."""
    upgrade = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAEAAEAAAAIAAAAA"}
    body = {"model": "small", "messages": HI, "temperature": 0.7, "top_p": 0.9, "max_tokens": 6, "stream": False}
    whole = chat.post("/v1/chat/completions", json=body, headers=upgrade).json()
    assert whole["choices"][0]["message"]["role"] == "assistant" and whole["usage"]["completion_tokens"] == 6
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    assert text_of(events(chat, "/v1/chat/completions", model="small", messages=parts, max_tokens=6))


def test_nextchat_writes_v1_twice_and_asks_from_a_browser(smollm2_path: str) -> None:
    options = (
        "--allowed-origins",
        '["http://chat.example"]',
        "--max-model-len",
        "256",
        "--num-gpu-blocks-override",
        "64",
    )
    origin = {"Origin": "http://chat.example"}
    with running(*serve(smollm2_path, "--served-model-name", "small", *options)) as url:
        with httpx.Client(base_url=url, timeout=60, headers=origin) as client:
            asked = {
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization,x-requested-with",
            }
            allowed = client.options("/v1/v1/chat/completions", headers=asked)
            assert allowed.status_code == 200, allowed.text
            assert "x-requested-with" in allowed.headers["access-control-allow-headers"]
            assert text_of(events(client, "/v1/v1/chat/completions", model="small", messages=HI, presence_penalty=0))


def test_ollamas_command_line(chat: httpx.Client) -> None:
    """`ollama run small "Hi"`, `ollama ps`, `ollama show`, `ollama list`, `ollama pull`: a heartbeat before each."""
    assert chat.head("/").status_code == 200
    assert "ollama" in chat.get("/", headers={"user-agent": "ollama/0.6 (amd64 linux) Go/go1.24"}).text.lower()
    shown = chat.post("/api/show", json={"model": "small"}).json()
    assert "completion" in shown["capabilities"] and shown["details"]["family"]
    assert chat.post("/api/generate", json={"model": "small", "prompt": ""}).json()["done_reason"] == "load"
    body = {"model": "small", "prompt": "Hi", "options": {"num_predict": 6}, "keep_alive": "5m"}
    lines = [json.loads(line) for line in chat.post("/api/generate", json=body).text.splitlines()]
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert "".join(line["response"] for line in lines) and lines[-1]["eval_count"] == 6
    assert chat.get("/api/ps").json()["models"][0]["name"].startswith("small")
    assert chat.get("/api/tags").json()["models"][0]["digest"]
    pulled = [json.loads(line) for line in chat.post("/api/pull", json={"model": "small"}).text.splitlines()]
    assert pulled[-1]["status"] == "success"


def test_load_tools(chat: httpx.Client) -> None:
    """guidellm counts tokens in each chunk; lm-eval scores prompts of ids as it does those of text."""
    assert chat.get("/health").status_code == 200
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"model": "small", "messages": HI, "max_tokens": 8, "ignore_eos": True, "stop": None}
    found = events(chat, "/v1/chat/completions", **body, stream_options=options)
    assert all(each["usage"] for each in found) and found[-1]["usage"]["completion_tokens"] == 8
    prompt = "The capital of France is Paris."
    ids = chat.post("/tokenize", json={"prompt": prompt, "add_special_tokens": False}).json()["tokens"]
    score = {"model": "small", "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0, "seed": 1234}
    both = [chat.post("/v1/completions", json={**score, "prompt": each}).json() for each in (prompt, [ids])]
    first, second = (each["choices"][0]["logprobs"]["token_logprobs"] for each in both)
    assert first == second and first[0] is None and len(first) == len(ids) + 1
