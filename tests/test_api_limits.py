"""A request's own deadline, its id, and what the server tells of its load."""

from __future__ import annotations

import time

from api_fake import Client, FakeEngine, events, make_server


def test_a_deadline_ends_an_answer_with_an_error() -> None:
    engine = FakeEngine("word " * 100, delay_s=0.01)
    with Client(make_server(engine)) as client:
        for response in (
            client.chat(deadline_s=0.2),
            client.complete(deadline_s=0.2),
            client.post("/v1/responses", {"input": "Hi", "deadline_s": 0.2}),
        ):
            assert response.status_code == 504 and response.headers["x-should-retry"] == "false"
            error = response.json()["error"]
            assert (error["code"], error["param"]) == ("deadline_exceeded", "deadline_s")
        told = events(client.chat(deadline_s=0.2, stream=True))
        assert len(told) > 2 and told[-1]["error"]["code"] == "deadline_exceeded"
        assert engine.live == 0 and not client.server.busy
        start = time.monotonic()
        assert client.chat(deadline_s=60, max_tokens=2).status_code == 200 and time.monotonic() - start < 30
        for bad in (0, -1, 1e9):
            assert client.chat(deadline_s=bad).json()["error"]["param"] == "deadline_s"


def test_the_clients_id_comes_back(client: Client) -> None:
    sent = {"x-request-id": "abc-1"}
    assert client.post("/v1/completions", {"prompt": "x"}, headers=sent).headers["x-request-id"] == "abc-1"
    assert client.get("/health", headers=sent).headers["x-request-id"] == "abc-1"
    assert client.post("/v1/completions", b"{", headers=sent).headers["x-request-id"] == "abc-1"
    own = client.post("/v1/completions", {"prompt": "x"}, headers={"x-request-id": "a b"}).headers["x-request-id"]
    assert own.startswith("cmpl-")


def test_load_and_server_info(client: Client) -> None:
    assert client.get("/load").json() == {"server_load": 0}
    told = client.get("/server_info").json()
    assert (told["version"], told["models"], told["state"]) == ("1.2.3", ["fake-model"], "ready")
    assert told["engine"]["max_model_len"] == 512 and told["engine"]["device"] == "fake"
