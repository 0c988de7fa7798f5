"""Options of the side that clients see: what each changes in answers, and TLS."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_fake import Client, FakeEngine, events, make_server, on_port
from starlette.applications import Starlette

from pagoda.api.run import http_server
from pagoda.cli.address import address
from pagoda.errors import ConfigError
from pagoda.options.config import Options
from pagoda.options.http import HttpOptions
from pagoda.options.resolve import resolve

CHAT = {"messages": [{"role": "user", "content": "x"}]}
STREAMS = (("/v1/chat/completions", CHAT), ("/v1/completions", {"prompt": "x"}))


def serving(**options: Any) -> Client:
    return Client(make_server(options=HttpOptions(**options)))


@pytest.mark.parametrize(("path", "body"), STREAMS)
def test_usage_in_every_chunk(path: str, body: dict[str, Any]) -> None:
    with serving(enable_force_include_usage=True) as client:
        got = events(client.post(path, {**body, "stream": True}))
    assert all("usage" in chunk for chunk in got[:-1]) and got[-2]["choices"] == []


@pytest.mark.parametrize(("path", "body"), STREAMS)
def test_tokens_as_ids_for_all(path: str, body: dict[str, Any]) -> None:
    with serving(return_tokens_as_token_ids=True) as client:
        told = client.post(path, {**body, "logprobs": 1 if "prompt" in body else True}).json()["choices"][0]["logprobs"]
    tokens = told["tokens"] if "tokens" in told else [entry["token"] for entry in told["content"]]
    assert tokens and all(token.startswith("token_id:") for token in tokens)


@pytest.mark.parametrize(("path", "body"), STREAMS)
def test_the_fingerprint(path: str, body: dict[str, Any]) -> None:
    def given(**options: Any) -> Any:
        with serving(**options) as client:
            last = events(client.post(path, {**body, "stream": True}))[-2]
            whole = client.post(path, body).json()["system_fingerprint"]
        assert last["system_fingerprint"] == whole
        return whole

    assert given().startswith("pagoda-1.2.3-") and given() == given()
    assert given(fingerprint_mode="custom", fingerprint_value="mine") == "mine"
    assert given(fingerprint_mode="none") is None


def test_docs_may_be_left_out() -> None:
    with serving(disable_fastapi_docs=True) as client:
        assert client.get("/docs").status_code == client.get("/openapi.json").status_code == 404
    with serving() as client:
        assert client.get("/openapi.json").status_code == 200


def test_what_other_origins_may_do() -> None:
    asks = {"origin": "http://a.example", "access-control-request-method": "POST"}
    options = HttpOptions(allowed_methods=("GET",), allow_credentials=True)
    with Client(make_server(options=options, allowed_origins=["http://a.example"])) as client:
        answer = client.get("/health", headers={"origin": "http://a.example"})
        assert answer.headers["access-control-allow-credentials"] == "true"
        assert client.call("OPTIONS", "/v1/completions", headers=asks).status_code == 400


def test_lists_as_vllm_takes_them() -> None:
    line = ["--allowed-methods", '["GET", "POST"]', "--allowed-headers", "x-a", "--sse-keep-alive-interval", "0"]
    options = resolve(line, {}).options
    assert (options.allowed_methods, options.allowed_headers) == (("GET", "POST"), ("x-a",))
    assert options.sse_keep_alive_interval == 0


def test_a_certificate_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.pem: No such file"):
        http_server(Starlette(), HttpOptions(ssl_certfile=str(tmp_path / "nowhere.pem")))
    bad = tmp_path / "bad.pem"
    bad.write_text("no certificate")
    with pytest.raises(ConfigError, match="--ssl-keyfile as PEM"):
        http_server(Starlette(), HttpOptions(ssl_certfile=str(bad)))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_streams_over_tls(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subject = ("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2")
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    command = ["openssl", "req", "-x509", *curve, *subject, "-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    engine = FakeEngine()
    options = HttpOptions(ssl_certfile=str(cert), ssl_keyfile=str(key))
    with on_port(make_server(engine, options=options), engine) as base:
        url = base.replace("http://", "https://")
        trust = ssl.create_default_context(cafile=str(cert))
        with httpx.Client(verify=trust, base_url=url, trust_env=False) as client:
            assert client.get("/health").status_code == 200
            body = {"prompt": "x", "stream": True}
            assert client.post("/v1/completions", json=body).text.endswith("data: [DONE]\n\n")
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{base}/health", trust_env=False)


def test_the_address_says_https() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert address(Options(ssl_certfile="x"), listener).startswith("https://localhost:")
        assert address(Options(), listener).startswith("http://localhost:")


def test_more_log_probabilities_where_the_server_allows_them() -> None:
    engine = FakeEngine()
    with Client(make_server(engine, options=HttpOptions(max_logprobs=30))) as client:
        for body in ({"logprobs": 30}, {"prompt_logprobs": 30}):
            assert client.complete(**body).status_code == 200
            ((name, count),) = body.items()
            assert getattr(engine.requests[-1].params, name) == count
            refused = client.complete(**{name: 31})
            assert refused.status_code == 400 and refused.json()["error"]["param"] == name
        assert client.chat(logprobs=True, top_logprobs=30).status_code == 200
        assert engine.requests[-1].params.logprobs == 30
        assert client.chat(logprobs=True, top_logprobs=31).json()["error"]["param"] == "top_logprobs"
    with Client(make_server(engine)) as client:
        assert "--max-logprobs" in client.chat(logprobs=True, top_logprobs=21).json()["error"]["message"]
