"""Bad bodies: wrong types, numbers out of range, broken JSON. All are refused at once, in OpenAI's shape, by name."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from api_fake import Client, FakeEngine, make_server

from pagoda.api.http.body import MAX_BODY_BYTES
from pagoda.api.turn.bodies import ChatBody, CompletionBody

BAD = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e400",
    "-1",
    "9223372036854775808",
    "18446744073709551616",
    '"1"',
    "true",
    "[]",
    "{}",
)
FLOATS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
INTS = ("n", "top_k", "seed", "max_tokens", "min_tokens", "prompt_logprobs", "truncate_prompt_tokens", "priority")
CHAT_INTS = ("max_completion_tokens", "top_logprobs")
COMPLETION_INTS = ("logprobs",)
ALLOWED = {
    ("presence_penalty", "-1"),
    ("frequency_penalty", "-1"),
    ("top_k", "-1"),
    ("seed", "-1"),
    ("seed", "9223372036854775808"),
    ("truncate_prompt_tokens", "-1"),
    ("priority", "-1"),
}
CHAT = '"messages": [{"role": "user", "content": "x"}], "logprobs": true'
ROUTES = (
    ("/v1/chat/completions", CHAT, FLOATS + INTS + CHAT_INTS),
    ("/v1/completions", '"prompt": "x"', FLOATS + INTS + COMPLETION_INTS),
)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with Client(make_server()) as made:
        yield made


def refused(client: Client, path: str, body: bytes, status: int = 400) -> dict[str, str | None]:
    engine = client.server.engine
    assert isinstance(engine, FakeEngine)
    before = len(engine.requests)
    start = time.perf_counter()
    response = client.post(path, body)
    assert time.perf_counter() - start < 10
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error: dict[str, str | None] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(engine.requests) == before
    message = error["message"]
    assert message is not None and not any(word in message for word in ("Traceback", ".py", "0x", "msgspec", "<"))
    return error


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize(
    ("path", "rest", "field"), [(path, rest, field) for path, rest, fields in ROUTES for field in fields]
)
def test_bad_numbers(client: Client, path: str, rest: str, field: str, value: str) -> None:
    if (field, value) in ALLOWED or value == '"1"':
        assert client.post(path, f'{{{rest}, "{field}": {value}}}'.encode()).status_code == 200
        return
    error = refused(client, path, f'{{{rest}, "{field}": {value}}}'.encode())
    if value in ("NaN", "Infinity", "-Infinity"):
        assert "not valid JSON" in str(error["message"])
    else:
        assert field in str(error["message"]) or error["param"] == field


@pytest.mark.parametrize(("route", "kind"), list(zip(ROUTES, (ChatBody, CompletionBody), strict=True)))
def test_null_means_the_default(
    client: Client, route: tuple[str, str, tuple[str, ...]], kind: type[ChatBody | CompletionBody]
) -> None:
    path, rest, fields = route
    optional = {*kind.__struct_fields__} - {"messages", "prompt", "logprobs"}
    assert optional >= {*fields} - {"logprobs"} and {"stream", "ignore_eos", "echo"} <= optional
    for field in sorted(optional):
        response = client.post(path, f'{{{rest}, "{field}": null}}'.encode())
        assert response.status_code == 200 and "x-pagoda-ignored" not in response.headers, field


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", '"hot"', "temperature must be a number, got a string"),
        ("n", "true", "n must be an integer, got true or false"),
        ("n", "1.5", "n must be an integer, got a number"),
        ("stream", '"yes"', "stream must be true or false, got a string"),
        ("stop", "5", "stop must be a string or a list, got an integer"),
        ("stop", "[5]", "stop[0] must be a string, got an integer"),
        ("stop_token_ids", '["a"]', "stop_token_ids[0] must be an integer, got a string"),
        ("messages", "{}", "messages must be a list, got an object"),
        ("messages", "[1]", "messages[0] must be an object, got an integer"),
        ("messages", "null", "messages is required"),
        ("logit_bias", '{"1": "x"}', "logit_bias[...] must be a number, got a string"),
        ("temperature", "2e999", "temperature holds a number that is out of range"),
        (
            "stream_options",
            '{"include_usage": 2}',
            "stream_options.include_usage must be true or false, got an integer",
        ),
    ],
)
def test_wrong_types_are_explained(client: Client, field: str, value: str, message: str) -> None:
    error = refused(client, "/v1/chat/completions", f'{{{CHAT}, "{field}": {value}}}'.encode())
    assert error["message"] == message
    assert error["param"] == field


def test_numbers_and_switches_written_as_text_count(client: Client) -> None:
    """As vLLM takes them: forms and templates write everything as text."""
    engine = client.server.engine
    assert isinstance(engine, FakeEngine)
    fields = b'"temperature": "0.5", "max_tokens": "3", "top_k": 5.0, "ignore_eos": "true", "stream": 0'
    assert client.post("/v1/chat/completions", b"{" + CHAT.encode() + b", " + fields + b"}").status_code == 200
    params = engine.requests[-1].params
    assert (params.temperature, params.max_tokens, params.top_k, params.ignore_eos) == (0.5, 3, 5, True)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "it is empty"),
        (b"{", "ends too early"),
        (b"[1, 2]", "must be a JSON object, got a list"),
        (b'"x"', "must be a JSON object, got a string"),
        (b"{'a': 1}", "not valid JSON"),
        (b'{"a": 1}x', "not valid JSON"),
        (b'\xef\xbb\xbf{"prompt": "x"}', "byte order mark"),
        ('{"prompt": "x"}'.encode("utf-16"), "byte order mark"),
        (b'{"prompt": "\xff"}', "not valid UTF-8"),
        (b'{"prompt": "\\ud800"}', "surrogate"),
        (b'{"prompt": "a\x00b"}', "not valid JSON"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "out of range"),
        (b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}", "nested deeper than 64"),
        (b"[" * 100_000, "nested deeper than 64"),
        (b"{" + b",".join(b'"k%d":1' % i for i in range(10_001)) + b"}", "more than 10000 keys"),
    ],
)
def test_broken_bodies(client: Client, path: str, body: bytes, words: str) -> None:
    assert words in str(refused(client, path, body)["message"])


def test_nesting_up_to_the_limit_passes(client: Client) -> None:
    deep = b'{"prompt": "x", "other": ' + b"[" * 63 + b"]" * 63 + b"}"
    assert client.post("/v1/completions", deep).status_code == 200


def test_huge_bodies_are_refused_unread(client: Client) -> None:
    claimed = client.post("/v1/completions", b"{}", headers={"content-length": str(MAX_BODY_BYTES + 1)})
    assert claimed.status_code == 413
    assert claimed.json()["error"]["code"] == "request_too_large"
    assert claimed.headers["connection"] == "close"
    assert refused(client, "/v1/completions", b" " * (MAX_BODY_BYTES + 1), 413)["code"] == "request_too_large"


def test_nul_and_odd_unicode_in_text_pass(client: Client) -> None:
    assert client.post("/v1/completions", b'{"prompt": "a\\u0000b\\ufffe\\ud83d\\ude42"}').status_code == 200


def test_the_last_of_two_equal_keys_counts(client: Client) -> None:
    response = client.post("/v1/completions", b'{"prompt": "x", "max_tokens": 5, "max_tokens": 2}')
    assert response.json()["usage"]["completion_tokens"] == 2
