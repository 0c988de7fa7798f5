"""/v1/batches: states, counts, output and errors, cancelling, expiry, a restart in the middle, beside clients."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai
import pytest
from api_fake import TEXT, Client, FakeEngine, make_server, on_port

from pagoda.api.batch.file_store import FileStore
from pagoda.api.batch.protocol import KeptBatch
from pagoda.api.batch.runner import BatchRunner, resume
from pagoda.api.batch.store import BatchStore
from pagoda.types import SamplingParams

CHAT = "/v1/chat/completions"


def line(custom_id: str, url: str = CHAT, **body: Any) -> dict[str, Any]:
    messages = {"messages": [{"role": "user", "content": "Hi"}]} if url == CHAT else {}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": "fake-model", **messages, **body}}


def content(*lines: object) -> bytes:
    return "".join(json.dumps(each) + "\n" for each in lines).encode()


def store_of(folder: Path) -> BatchStore:
    return BatchStore(FileStore(str(folder)))


def begin(batches: BatchStore, *lines: object, endpoint: str = CHAT, window_s: int = 3600) -> KeptBatch:
    source = batches.files.folder / "in"
    source.write_bytes(content(*lines))
    file = batches.files.keep(source, "in.jsonl", "batch", f"file-{len(batches.files.list())}")
    return batches.create(endpoint, file.id, "1h", window_s, {})


def work(
    batches: BatchStore, batch: KeptBatch, engine: FakeEngine | None = None, until: Callable[[], bool] | None = None
) -> None:
    """Let a runner work until the batch is over, or until something else is true."""

    async def main() -> None:
        batches.changed = asyncio.Event()  # each loop has its own
        running = asyncio.create_task(BatchRunner(make_server(engine, batches=batches), batches).run())
        end = time.monotonic() + 120
        while not (until() if until else batch.is_over) and time.monotonic() < end:
            await asyncio.sleep(0.002)
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running

    asyncio.run(main())


def results(batches: BatchStore, file_id: str | None) -> dict[str, Any]:
    assert file_id is not None
    lines = batches.files.path(file_id).read_text().splitlines()
    found = {each["custom_id"]: each for each in map(json.loads, lines)}
    assert len(found) == len(lines)
    return found


def test_output_and_errors(tmp_path: Path) -> None:
    batches = store_of(tmp_path)
    engine = FakeEngine()
    batch = begin(
        batches, line("a"), line("b", temperature=-1), line("c", stream=True, max_tokens=2), line("d", model="?")
    )
    work(batches, batch, engine)
    assert batch.status == "completed" and batch.completed_at and batch.in_progress_at and batch.finalizing_at
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (4, 2, 2)
    good = results(batches, batch.output_file_id)
    assert set(good) == {"a", "c"} and good["a"]["error"] is None
    assert good["a"]["response"]["status_code"] == 200 and good["a"]["response"]["request_id"].startswith("chatcmpl-")
    assert good["a"]["response"]["body"]["choices"][0]["message"]["content"] == TEXT
    bad = results(batches, batch.error_file_id)
    assert bad["b"]["response"]["status_code"] == 400 and bad["d"]["response"]["status_code"] == 404
    assert bad["b"]["response"]["body"]["error"]["param"] == "temperature"
    assert all(request.priority > 0 for request in engine.requests)
    assert batches.files.get(batch.output_file_id or "").purpose == "batch_output"


@pytest.mark.parametrize(
    ("bad", "code"),
    [
        ("[]", "invalid_request_error"),
        (line(""), "invalid_request_error"),
        (line("a"), "invalid_request_error"),  # twice
        (line("b", "/v1/completions", prompt="x"), "invalid_request_error"),  # not the batch's endpoint
        (line("b", "/metrics"), "invalid_request_error"),
        ({**line("b"), "method": "GET"}, "invalid_request_error"),
    ],
)
def test_a_broken_input_fails_with_the_line(tmp_path: Path, bad: object, code: str) -> None:
    batches = store_of(tmp_path)
    batch = begin(batches, line("a"), bad)
    work(batches, batch)
    assert batch.status == "failed" and batch.errors is not None
    (error,) = batch.errors.data
    assert (error.line, error.code) == (2, code)
    empty = begin(batches)
    work(batches, empty)
    assert empty.errors is not None and empty.errors.data[0].code == "empty_file"


def test_a_restart_goes_on_where_it_was(tmp_path: Path) -> None:
    batches = store_of(tmp_path)
    ids = [f"r{i}" for i in range(12)]
    batch = begin(batches, *(line(each) for each in ids))
    engine = FakeEngine(delay_s=0.001)
    work(batches, batch, engine, until=lambda: batch.request_counts.completed >= 3)
    assert batch.status == "in_progress" and engine.live == 0
    part = batches.part(batch, "output")
    before = resume(part)
    assert 3 <= len(before) < 12
    with part.open("ab") as file:
        file.write(b'{"id": "half of a li')  # as a crash may leave it
    batches.files.close()
    again = store_of(tmp_path)
    found = again.get(batch.id)
    assert found.status == "in_progress"
    second = FakeEngine()
    work(again, found, second)
    assert found.status == "completed" and found.request_counts.completed == 12
    assert set(results(again, found.output_file_id)) == set(ids)
    assert len(second.requests) == 12 - len(before)


def test_a_crash_while_the_output_is_published(tmp_path: Path) -> None:
    batches = store_of(tmp_path)
    batch = begin(batches, line("a"))
    work(batches, batch)
    first = batch.output_file_id
    asyncio.run(batches.enter(batch, "finalizing"))
    work(batches, batch, engine := FakeEngine())
    assert batch.status == "completed" and batch.output_file_id == first and not engine.requests


def test_responses_are_answered_there_and_not_stored(tmp_path: Path) -> None:
    batches = store_of(tmp_path)
    asked = [line(each, "/v1/responses", input="Hi", background=each == "b") for each in "ab"]
    batch = begin(batches, *asked, endpoint="/v1/responses")
    with Client(make_server(batches=batches)) as client:
        work(batches, batch)
        for result in results(batches, batch.output_file_id).values():
            reply = result["response"]["body"]
            assert reply["status"] == "completed" and reply["output"][0]["content"][0]["text"] == TEXT
            assert client.get(f"/v1/responses/{reply['id']}").status_code == 404


def test_a_full_disk_makes_a_batch_wait(tmp_path: Path) -> None:
    batches = store_of(tmp_path)
    batch = begin(batches, line("a"), line("b"))
    (tmp_path / "batches" / f"{batch.id}.json.tmp").symlink_to("/dev/full")  # it is gone after the first try

    async def main() -> None:
        running = asyncio.create_task(BatchRunner(make_server(batches=batches), batches, retry_s=0.001).run())
        end = time.monotonic() + 120
        while not batch.is_over and time.monotonic() < end:
            await asyncio.sleep(0.002)
        running.cancel()

    asyncio.run(main())
    assert batch.status == "completed" and set(results(batches, batch.output_file_id)) == {"a", "b"}
    batches.files.close()
    assert store_of(tmp_path).get(batch.id).status == "completed"


def test_an_input_that_is_gone_fails_its_batch_only(tmp_path: Path) -> None:
    batches = store_of(tmp_path)
    lost, batch = begin(batches, line("a")), begin(batches, line("b"))
    batches.files.path(lost.input_file_id).unlink()
    work(batches, lost)  # either may come first: they were made in the same second
    work(batches, batch)
    assert lost.status == "failed" and batch.status == "completed"


def test_old_batches_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagoda.api.batch.store.MAX_BATCHES", 1)
    batches = store_of(tmp_path)
    old = begin(batches, line("a"))
    batches.part(old, "errors").write_bytes(b"x")
    asyncio.run(batches.enter(old, "failed"))
    new = begin(batches, line("b"))
    assert [path.name for path in (tmp_path / "batches").iterdir()] == [f"{new.id}.json"]


def test_cancelling_keeps_what_is_there(tmp_path: Path) -> None:
    batches = store_of(tmp_path)
    batch = begin(batches, *(line(f"r{i}") for i in range(40)))
    engine = FakeEngine(delay_s=0.001)
    work(batches, batch, engine, until=lambda: batch.request_counts.completed >= 2)
    asyncio.run(batches.enter(batch, "cancelling"))
    work(batches, batch, engine)
    assert batch.status == "cancelled" and batch.cancelled_at and batch.error_file_id is None
    assert 2 <= len(results(batches, batch.output_file_id)) < 40 and engine.live == 0


def test_a_batch_that_is_late_expires(tmp_path: Path) -> None:
    batches = store_of(tmp_path)
    batch = begin(batches, line("a"), line("b"), window_s=0)
    work(batches, batch)
    assert batch.status == "expired" and batch.expired_at and batch.output_file_id is None
    bad = results(batches, batch.error_file_id)
    assert set(bad) == {"a", "b"} and bad["a"]["error"]["code"] == "batch_expired" and bad["a"]["response"] is None


def test_clients_have_most_of_the_places(tmp_path: Path) -> None:
    batches = store_of(tmp_path)
    batch = begin(batches, *(line(f"r{i}") for i in range(30)))
    engine = FakeEngine(delay_s=0.001, max_num_seqs=8)
    most = {"alone": 0, "beside": 0}

    async def main() -> None:
        server = make_server(engine, batches=batches)
        running = asyncio.create_task(BatchRunner(server, batches).run())
        while batch.request_counts.completed < 5:
            most["alone"] = max(most["alone"], engine.live)
            await asyncio.sleep(0)
        generation = server.start("x", [[1]], SamplingParams(max_tokens=5))
        while batch.request_counts.completed < 20:
            await asyncio.sleep(0.001)
            if batch.request_counts.completed > 12:
                most["beside"] = max(most["beside"], engine.live)
        generation.close()
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running

    asyncio.run(main())
    assert most == {"alone": 4, "beside": 1}


def test_routes(tmp_path: Path) -> None:
    batches = store_of(tmp_path)
    with Client(make_server(batches=batches)) as client:
        file = client.call(
            "POST", "/v1/files", files={"file": ("a.jsonl", content(line("a")))}, data={"purpose": "batch"}
        ).json()
        good = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "24h", "metadata": {"k": "v"}}
        for name, value in (
            ("endpoint", "/v1/models"), ("completion_window", "soon"), ("completion_window", "0h"),
            ("input_file_id", "file-x"), ("metadata", {str(i): "" for i in range(17)}), ("metadata", {"a": 1}),
        ):  # fmt: skip
            response = client.post("/v1/batches", {**good, name: value})
            assert response.status_code == 400 and response.json()["error"]["param"] == name
        made = client.post("/v1/batches", good).json()
        assert made["status"] == "validating" and made["metadata"] == {"k": "v"}
        assert made["expires_at"] - made["created_at"] == 24 * 3600
        assert (
            client.get("/v1/batches").json()["data"] == [made] and client.get("/v1/batches?limit=0").status_code == 400
        )
        assert client.call("DELETE", f"/v1/files/{file['id']}").status_code == 400  # still needed
        assert client.post(f"/v1/batches/{made['id']}/cancel", {}).json()["status"] == "cancelling"
        work(batches, batches.get(made["id"]))
        assert client.get(f"/v1/batches/{made['id']}").json()["status"] == "cancelled"
        assert client.post(f"/v1/batches/{made['id']}/cancel", {}).status_code == 400
        assert client.get("/v1/batches/batch_x").status_code == 404
        assert client.call("DELETE", f"/v1/files/{file['id']}").status_code == 200


def test_the_openai_package(tmp_path: Path) -> None:
    engine = FakeEngine()
    with on_port(make_server(engine, batches=store_of(tmp_path)), engine) as base:
        client = openai.OpenAI(base_url=base + "/v1", api_key="x", max_retries=0, timeout=60)
        file = client.files.create(file=("in.jsonl", content(line("a"), line("b", n=2))), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")
        while batch.status not in ("completed", "failed"):
            batch = client.batches.retrieve(batch.id)
        assert batch.output_file_id is not None and batch.request_counts is not None
        assert batch.request_counts.completed == 2
        told = [json.loads(each) for each in client.files.content(batch.output_file_id).text.splitlines()]
        assert {each["custom_id"]: len(each["response"]["body"]["choices"]) for each in told} == {"a": 1, "b": 2}
        assert [each.id for each in client.batches.list()] == [batch.id]
        assert {each.purpose for each in client.files.list()} == {"batch", "batch_output"}
        assert client.files.delete(file.id).deleted
