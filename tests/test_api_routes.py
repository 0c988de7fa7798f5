"""Routes in memory: models, health, tokenizer, pages, paths as clients write them, keys, hosts, CORS."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import pytest
from api_fake import ByteTokenizer, Client, FakeEngine, make_server

from pagoda.api.app import create_app
from pagoda.api.http.paths import normalize
from pagoda.api.routes import endpoints
from pagoda.api.serving.names import ServedNames
from pagoda.errors import ModelNotFound

KEY = "sk-right"
PUBLIC = {"/health", "/ping"}


@pytest.fixture
def client() -> Iterator[Client]:
    with Client(make_server(names=("Qwen3-32B-AWQ", "./qwen3-32b"), root="/home/user/vllm/models/qwen3-32b")) as made:
        yield made


def test_models_in_the_shape_that_vllm_gives(client: Client) -> None:
    response = client.get("/v1/models")
    reply = response.json()
    assert reply["object"] == "list" and [card["id"] for card in reply["data"]] == ["Qwen3-32B-AWQ", "./qwen3-32b"]
    card = reply["data"][0]
    assert list(card)[:8] == [
        "id", "object", "created", "owned_by", "root", "parent", "max_model_len", "permission",
    ]  # fmt: skip
    assert (card["object"], card["parent"], card["root"]) == ("model", None, "/home/user/vllm/models/qwen3-32b")
    assert card["max_model_len"] == card["context_length"] == card["max_tokens"] == 512
    (permission,) = card["permission"]
    assert re.fullmatch(r"modelperm-[0-9a-f]{32}", permission.pop("id"))
    assert permission.pop("created") == card["created"]
    assert permission == {
        "object": "model_permission",
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    assert client.get("/v1/models").content == response.content


@pytest.mark.parametrize("name", ["Qwen3-32B-AWQ", "qwen3-32b", "./qwen3-32b", "/home/user/vllm/models/qwen3-32b"])
def test_one_model_by_any_of_its_names(client: Client, name: str) -> None:
    card = client.get(f"/v1/models/{name}").json()
    assert card["object"] == "model" and card["max_model_len"] == 512


def test_one_model_is_the_one_that_was_asked_for() -> None:
    with Client(make_server(names=("first", "Second"))) as client:
        assert client.get("/v1/models/second").json()["id"] == "Second"
        missing = client.get("/v1/models/third")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (None, "Org/Qwen3-4B"),
        ("", "Org/Qwen3-4B"),
        ("Org/Qwen3-4B", "Org/Qwen3-4B"),
        ("org/qwen3-4b", "Org/Qwen3-4B"),
        ("qwen3-4b:latest", "Org/Qwen3-4B"),
        ("Qwen3-4B", "Org/Qwen3-4B"),
        ("alias", "alias"),
        ("/models/x/Qwen.gguf", "Org/Qwen3-4B"),
        ("qwen", "Org/Qwen3-4B"),
    ],
)
def test_names_are_matched_tolerantly(wanted: str | None, found: str) -> None:
    assert ServedNames(("Org/Qwen3-4B", "alias"), "/models/x/Qwen.gguf").resolve(wanted) == found


def test_an_unknown_model_is_404_and_tells_what_is_served(client: Client) -> None:
    with pytest.raises(ModelNotFound):
        ServedNames(("a",), "/x/b").resolve("../../etc/passwd")
    for response in (client.get("/v1/models/gpt-4o"), client.chat(model="gpt-4o"), client.complete(model="gpt-4o")):
        assert response.status_code == 404
        error = response.json()["error"]
        assert error["code"] == "model_not_found" and "Qwen3-32B-AWQ, ./qwen3-32b" in error["message"]


def test_the_reply_names_the_model_that_was_meant(client: Client) -> None:
    assert client.chat(model="./qwen3-32b").json()["model"] == "./qwen3-32b"
    assert client.chat().json()["model"] == "Qwen3-32B-AWQ"


@pytest.mark.parametrize(
    ("path", "plain"),
    [
        ("/v1/chat/completions", "/chat/completions"),
        ("/chat/completions", "/chat/completions"),
        ("/v1/chat/completions/", "/chat/completions"),
        ("//v1//chat/completions", "/chat/completions"),
        ("/v1/v1/chat/completions", "/chat/completions"),
        ("/v1/chat/completions/chat/completions", "/chat/completions"),
        ("/v1/chat/completions/v1/models", "/models"),
        ("/v1/completions/completions", "/completions"),
        ("/v1/models/v1x", "/models/v1x"),
        ("/v1", "/"),
        ("/v1/", "/"),
        ("", "/"),
        ("/v1x/models", "/v1x/models"),
    ],
)
def test_paths_as_clients_write_them(path: str, plain: str) -> None:
    assert normalize(path, [each.path for each in endpoints()]) == plain


def test_normalized_paths_reach_their_routes(client: Client) -> None:
    for path in ("/models", "//v1/models", "/v1/v1/models", "/v1/models/"):
        assert client.get("http://localhost" + path).json()["object"] == "list"
    body = {"prompt": "x", "max_tokens": 1}
    assert client.post("/v1/completions/completions", body).json()["object"] == "text_completion"


def test_unknown_routes_name_the_right_one(client: Client) -> None:
    for path, right in (
        ("/v1/chat/completion", "/v1/chat/completions"),
        ("/api/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/model", "/v1/models"),
        ("/helth", "/health"),
    ):
        response = client.post(path, {})
        assert response.status_code == 404
        assert f"there is no {path} here. Did you mean {right}?" == response.json()["error"]["message"]
    assert "/docs" in client.get("/completely/other").json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/audio/speech", "/v1/audio/transcriptions", "/embed", "/generate", "/info"])
def test_what_is_not_here_is_404(client: Client, path: str) -> None:
    response = client.post(path, {"input": "hi", "query": "hi", "texts": ["hi"]})
    assert response.status_code == 404 and f"there is no {path} here" in response.json()["error"]["message"]


def test_wrong_methods(client: Client) -> None:
    response = client.get("/v1/chat/completions")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert response.json()["error"]["message"] == "/v1/chat/completions takes POST, not GET"
    assert client.call("DELETE", "/v1/models").status_code == 405
    assert client.call("OPTIONS", "/v1/models").status_code == 405
    assert client.call("HEAD", "/health").status_code == 200


def test_health_follows_the_engine() -> None:
    engine = FakeEngine()
    with Client(make_server(engine)) as client:
        for path in ("/health", "/ping", "/v1/health"):
            assert (client.get(path).status_code, client.get(path).json()) == (200, {"status": "ready"})
        assert client.post("/ping", {}).status_code == 200
        engine.ready = False
        response = client.get("/health")
        assert (response.status_code, response.json()) == (503, {"status": "loading"})
        assert response.headers["retry-after"] == "1"
        assert client.chat().status_code == 200
        engine.ready = True
        client.server.draining = True
        assert (client.get("/health").status_code, client.get("/health").json()["status"]) == (503, "shutting down")
        refused = client.chat()
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert refused.json()["error"]["code"] == "shutting_down"


def test_version_and_metrics(client: Client) -> None:
    assert client.get("/version").json() == {"version": "1.2.3"}
    client.chat()
    client.chat(max_tokens=3)
    text = client.get("/metrics").text
    labels = '{engine="0",model_name="Qwen3-32B-AWQ"}'
    for line in (
        f"vllm:num_requests_running{labels} 0.0",
        f"vllm:kv_cache_usage_perc{labels} 0.25",
        f"vllm:prefix_cache_hits_total{labels} 4.0",
        f"vllm:prompt_tokens_total{labels} 100.0",
        f"vllm:generation_tokens_total{labels} 50.0",
        f"vllm:time_to_first_token_seconds_count{labels} 2.0",
        f"vllm:inter_token_latency_seconds_count{labels} 55.0",
        f"vllm:e2e_request_latency_seconds_count{labels} 2.0",
        f"vllm:request_decode_time_seconds_count{labels} 2.0",
        "vllm:request_params_max_tokens_bucket" + '{engine="0",le="5.0",model_name="Qwen3-32B-AWQ"} 1.0',
        f"vllm:request_max_num_generation_tokens_count{labels} 2.0",
        f"vllm:prompt_tokens_cached_total{labels} 4.0",
        f"pagoda:engine_restarts_total{labels} 3.0",
        'vllm:request_success_total{engine="0",finished_reason="stop",model_name="Qwen3-32B-AWQ"} 1.0',
        'vllm:request_success_total{engine="0",finished_reason="length",model_name="Qwen3-32B-AWQ"} 1.0',
    ):
        assert line in text


def test_tokenize_and_detokenize(client: Client) -> None:
    reply = client.post("/tokenize", {"prompt": "aé", "return_token_strs": True, "add_special_tokens": False}).json()
    assert reply == {
        "count": 3,
        "max_model_len": 512,
        "tokens": [97, 195, 169],
        "token_strs": ["<97>", "<195>", "<169>"],
    }
    chat = client.post("/tokenize", {"messages": [{"role": "user", "content": "q"}]}).json()
    assert chat["tokens"][0] == 258 and chat["token_strs"] is None
    assert client.post("/detokenize", {"tokens": [258, 97, 195, 169]}).json() == {"prompt": "<|im_start|>aé"}
    for body in ({}, {"prompt": "x", "messages": []}):
        assert client.post("/tokenize", body).status_code == 400
    assert client.post("/tokenize", {"prompt": "x" * (512 * 64 + 1)}).status_code == 400
    assert client.post("/detokenize", {"tokens": [260]}).status_code == 400
    assert client.get("/tokenizer_info").json()["eos_token"] == "</s>"


class Beginning(ByteTokenizer):
    """Puts a token before each text, unless it is told not to."""

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        return [self.bos_token_id] * add_special_tokens + super().encode(text)


def test_special_tokens_are_added_unless_they_are_not_wanted() -> None:
    engine = FakeEngine()
    with Client(make_server(engine, tokenizer=Beginning())) as client:
        for more, tokens in (({}, [256, 97]), ({"add_special_tokens": False}, [97])):
            assert client.post("/tokenize", {"prompt": "a", **more}).json()["tokens"] == tokens
            assert client.complete("a", **more).status_code == 200
            assert engine.requests[-1].prompt_token_ids == tokens


class Links(HTMLParser):
    """Everything in a page that a browser would fetch or go to, and the tags that are open."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.targets += [value for name, value in attrs if name in ("src", "href") and value]
        self.ids |= {value for name, value in attrs if name == "id" and value}


def test_the_page_for_browsers_loads_nothing_from_elsewhere(client: Client) -> None:
    for path in ("/", "/docs", "/v1"):
        response = client.get(path, headers={"accept": "text/html,application/xhtml+xml"})
        assert response.headers["content-type"] == "text/html; charset=utf-8"
        assert "default-src 'none'" in response.headers["content-security-policy"]
        links = Links()
        links.feed(response.text)
        for target in links.targets:
            assert not re.match(r"[a-z]+:|//", target)
            assert client.get("/" + target.removeprefix("./")).status_code == 200
        assert "http://" not in response.text and "https://" not in response.text
    script = client.get("/", headers={"accept": "text/html"}).text
    links = Links()
    links.feed(script)
    assert set(re.findall(r'\$\("(\w+)"\)', script)) <= links.ids


def test_the_root_for_programs(client: Client) -> None:
    reply = client.get("/").json()
    assert (reply["name"], reply["status"], reply["models"][0]) == ("pagoda", "ready", "Qwen3-32B-AWQ")


def test_openapi_describes_every_route(client: Client) -> None:
    description = client.get("/openapi.json").json()
    assert description["openapi"] == "3.1.0"
    described = {(path, method.upper()) for path, methods in description["paths"].items() for method in methods}
    assert described == {(each.shown, method) for each in endpoints() for method in each.methods}
    text = json.dumps(description)
    schemas = description["components"]["schemas"]
    for name in re.findall(r'"#/components/schemas/(\w+)"', text):
        assert name in schemas
    operations = [operation for methods in description["paths"].values() for operation in methods.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    assert all(operation["responses"]["200"]["description"] for operation in operations)
    assert schemas["ChatBody"]["required"] == ["messages"]
    page = client.get("/docs").text
    assert all(each.shown in page for each in endpoints()) and "max_completion_tokens" in page


def requests_for_all_routes() -> list[tuple[str, str]]:
    paths = [(method, each.path.replace("{model:path}", "x")) for each in endpoints() for method in each.methods]
    return [*paths, ("GET", "/nothing/here"), ("POST", "/v1/chat/completion")]


def test_the_table_is_all_there_is() -> None:
    paths = [route.path for route in create_app(make_server()).routes]  # type: ignore[attr-defined]
    assert paths == list(dict.fromkeys(each.path for each in endpoints()))


def test_a_key_guards_every_route() -> None:
    with Client(make_server(api_keys=("sk-other", KEY))) as client:
        for method, path in requests_for_all_routes():
            for spelling in (path, "/v1" + path, "/" + path, "/v1/v1" + path, path + "/"):
                url = "http://localhost" + spelling
                for headers in ({}, {"authorization": "Bearer wrong"}, {"x-api-key": ""}, {"authorization": KEY}):
                    response = client.call(method, url, headers=headers)
                    if path in PUBLIC:
                        assert response.status_code == 200
                    else:
                        assert response.status_code == 401, (method, url)
                        assert response.headers["www-authenticate"] == "Bearer" and KEY not in response.text
                        if method != "HEAD":
                            assert "needs an API key" in str(response.json()["error"])  # in the dialect's shape
        for headers in ({"authorization": f"Bearer {KEY}"}, {"authorization": f"bearer  {KEY}"}, {"x-api-key": KEY}):
            assert client.get("/v1/models", headers=headers).status_code == 200
        for method in ("HEAD", "OPTIONS", "TRACE", "DELETE", "PUT"):
            assert client.call(method, "/v1/models").status_code == 401
        assert client.get("http://localhost/%76%31/models").status_code == 401
        assert client.get("http://localhost/v1/x/../models").status_code == 401


def test_browsers_without_a_key_get_the_page_to_type_it_on() -> None:
    with Client(make_server(api_keys=(KEY,))) as client:
        page = client.get("/", headers={"accept": "text/html"})
        assert page.status_code == 401 and 'id="key"' in page.text and "fake-model" not in page.text
        assert client.get("/docs", headers={"accept": "text/html"}).json()["error"]["code"] == "invalid_api_key"


def test_the_key_is_asked_for_before_the_body_is_read() -> None:
    with Client(make_server(api_keys=(KEY,))) as client:
        assert client.post("/v1/chat/completions", b"{" * 1000).status_code == 401


@pytest.mark.parametrize("value", [None, "", "Bearer ", "Bearer None", "Bearer undefined", "Bearer EMPTY", "Basic x"])
def test_any_key_or_none_passes_where_none_is_set(client: Client, value: str | None) -> None:
    assert client.get("/v1/models", headers={} if value is None else {"authorization": value}).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("LOCALHOST", 200),
        ("app.localhost:8000", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("192.168.1.5:8000", 200),
        ("host.docker.internal:8000", 200),
        ("testserver", 200),
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("localhost.evil.example", 403),
        ("a/v1?x", 403),
        ("127.0.0.1.evil.example", 403),
    ],
)
def test_foreign_host_names_are_refused_on_loopback(client: Client, host: str, status: int) -> None:
    for path in ("/v1/models", "/health", "/nothing"):
        expected = 404 if path == "/nothing" and status == 200 else status
        assert client.get(path, headers={"host": host}).status_code == expected


def test_other_hosts_pass_where_the_network_is_meant() -> None:
    with Client(make_server(local=False)) as client:
        assert client.get("/v1/models", headers={"host": "llm.example"}).status_code == 200


def test_web_pages_from_elsewhere_may_not_use_a_local_server(client: Client) -> None:
    assert client.chat().status_code == 200
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}
    for origin, status in (("https://evil.example", 403), ("null", 403), ("http://localhost:3000", 200)):
        assert client.post("/v1/chat/completions", body, headers={"origin": origin}).status_code == status
    assert "access-control-allow-origin" not in client.get("/v1/models", headers={"origin": "http://localhost"}).headers


def test_allowed_origins_get_cors_on_all_routes_and_no_key_for_preflight() -> None:
    origin = "https://app.example"
    ask = {"origin": origin, "access-control-request-method": "POST", "access-control-request-headers": "x-custom"}
    with Client(make_server(allowed_origins=(origin,), api_keys=(KEY,))) as client:
        for each in endpoints():
            response = client.call("OPTIONS", each.shown, headers=ask)
            assert response.status_code == 200
            assert response.headers["access-control-allow-origin"] == origin
            assert "x-custom" in response.headers["access-control-allow-headers"]
        response = client.get("/v1/models", headers={"origin": origin, "x-api-key": KEY})
        assert response.headers["access-control-allow-origin"] == origin
        assert (
            client.call("OPTIONS", "/v1/models", headers={**ask, "origin": "https://evil.example"}).status_code == 400
        )


def test_a_bug_in_a_handler_is_a_500_that_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    server = make_server()
    server.tokenizer = None  # type: ignore[assignment]
    with Client(server) as client:
        response = client.post("/tokenize", {"prompt": "x"})
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "the server failed on this request; its log says why"
    assert "Traceback" in caplog.text


def test_root_path_of_a_proxy() -> None:
    with Client(make_server(root_path="/llm")) as client:
        assert client.get("/llm/v1/models").status_code == client.get("/v1/models").status_code == 200
