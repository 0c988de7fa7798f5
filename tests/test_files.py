"""/v1/files in memory and on disk: multipart, limits, what a crash may leave."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_fake import Client, make_server

from pagoda.api.batch.file_store import FileStore
from pagoda.api.batch.store import BatchStore
from pagoda.errors import ConfigError


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    files = FileStore(str(tmp_path), max_total_bytes=1000, max_files=4)
    with Client(make_server(batches=BatchStore(files))) as made:
        yield made
    files.close()


def upload(client: Client, content: bytes = b'{"a": 1}\n', name: str = "in.jsonl", **form: str) -> Any:
    return client.call("POST", "/v1/files", files={"file": (name, content)}, data={"purpose": "batch", **form})


def test_upload_and_read(client: Client) -> None:
    made = upload(client).json()
    assert made["id"].startswith("file-") and (made["object"], made["bytes"]) == ("file", 9)
    assert (made["filename"], made["purpose"], made["status"]) == ("in.jsonl", "batch", "processed")
    assert client.get(f"/v1/files/{made['id']}").json() == made
    content = client.get(f"/v1/files/{made['id']}/content")
    assert content.content == b'{"a": 1}\n' and content.headers["content-type"] == "application/octet-stream"
    assert content.headers["content-disposition"].startswith("attachment")
    other = upload(client, purpose="user_data").json()
    assert {each["id"] for each in client.get("/v1/files").json()["data"]} == {made["id"], other["id"]}
    assert [each["id"] for each in client.get("/v1/files?purpose=batch").json()["data"]] == [made["id"]]
    page = client.get("/v1/files?limit=1").json()
    assert page["has_more"] and client.get(f"/v1/files?after={page['last_id']}").json()["has_more"] is False
    assert client.call("DELETE", f"/v1/files/{made['id']}").json() == {
        "id": made["id"], "object": "file", "deleted": True,
    }  # fmt: skip
    assert client.get(f"/v1/files/{made['id']}").status_code == 404


def test_names_never_become_paths(client: Client, tmp_path: Path) -> None:
    made = upload(client, name="../../../etc/passwd\r\nx: y").json()
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(
        ["files", "batches", "lock", made["id"], made["id"] + ".json"]
    )
    assert client.get(f"/v1/files/{made['id']}/content").status_code == 200
    for path in ("..%2f..%2fetc%2fpasswd", "%2e%2e", made["id"] + ".json"):
        assert client.get(f"/v1/files/{path}").status_code == 404
        assert client.get(f"/v1/files/{path}/content").status_code == 404


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("application/json", b"{}"),
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=a", b""),
        ("multipart/form-data; boundary=a", b"--b\r\n"),
        ("multipart/form-data; boundary=a; charset=nothing", b"--a\r\nContent-Disposition: form-data; name=x\r\n\r\n1"),
        ("multipart/form-data; boundary=a", b"--a\r\n\xff\xfe: x\r\n\r\n1\r\n--a--"),
        ("multipart/form-data; boundary=a", b"--a\r\nContent-Disposition: form-data\r\n\r\n1\r\n--a--\r\n"),
        (
            "multipart/form-data; boundary=a",
            b'--a\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--a--\r\n',
        ),
    ],
)
def test_broken_forms(client: Client, content_type: str, body: bytes) -> None:
    response = client.call("POST", "/v1/files", content=body, headers={"content-type": content_type})
    assert response.status_code == 400 and response.json()["error"]["message"]


def test_limits(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    assert upload(client, purpose="poem").json()["error"]["param"] == "purpose"
    assert upload(client, b"x" * 1001).status_code == 413
    for _ in range(4):
        assert upload(client).status_code == 200
    assert "Delete some" in upload(client).json()["error"]["message"]
    monkeypatch.setattr("pagoda.api.batch.files.MAX_FILE_BYTES", 100)
    monkeypatch.setattr("pagoda.api.batch.files._FORM_BYTES", 100)
    assert upload(client, b"x" * 900).status_code == 413
    for query in ("limit=0", "order=up", "limit=99999"):
        assert client.get("/v1/files?" + query).status_code == 400


def test_without_a_folder() -> None:
    with Client(make_server()) as client:
        for response in (upload(client), client.get("/v1/files"), client.get("/v1/batches")):
            assert response.status_code == 501 and "--files-dir" in response.json()["error"]["message"]


def test_the_folder_outlives_the_server(tmp_path: Path) -> None:
    first = FileStore(str(tmp_path))
    with Client(make_server(batches=BatchStore(first))) as client:
        made = upload(client).json()
    with pytest.raises(ConfigError, match="another server"):
        FileStore(str(tmp_path))
    first.close()
    (tmp_path / "files" / "file-x.tmp").write_bytes(b"half")
    (tmp_path / "files" / "file-y").write_bytes(b"no description")
    (tmp_path / "files" / "file-z.json").write_bytes(b"{broken")
    again = FileStore(str(tmp_path))
    assert [each.id for each in again.list()] == [made["id"]] and again.path(made["id"]).read_bytes()
    assert not (tmp_path / "files" / "file-x.tmp").exists() and not (tmp_path / "files" / "file-y").exists()
    again.close()
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigError, match="can't be written"):
        FileStore(str(file))


def test_a_full_disk_keeps_no_half_of_a_file(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagoda.api.batch.files.new_file_id", lambda: "file-full")
    folder = tmp_path / "files"
    for name in ("file-full.tmp", "file-full.json.tmp"):
        (folder / name).symlink_to("/dev/full")
        answer = upload(client)
        assert answer.status_code == 507 and "No space left" in answer.json()["error"]["message"]
        assert not list(folder.iterdir()) and client.get("/v1/files").json()["data"] == []
    assert upload(client).status_code == 200


def test_a_crash_while_a_file_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = FileStore(str(tmp_path))
    source = tmp_path / "results"
    source.write_bytes(b"results")

    def crash(_: Path, to: Path) -> None:
        if to.name == "file-a":
            raise KeyboardInterrupt
        _.rename(to)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.replace", crash)
        store.keep(source, "out.jsonl", "batch_output", "file-a")
    store.close()
    again = FileStore(str(tmp_path))
    assert again.find("file-a") is None and source.read_bytes() == b"results"
    assert again.keep(source, "out.jsonl", "batch_output", "file-a").bytes == 7
    assert again.path("file-a").read_bytes() == b"results"
    again.close()


@pytest.mark.parametrize("charset", ["undefined", "unicode_escape", "utf-16", "idna", "punycode"])
def test_odd_encodings_of_a_form(client: Client, charset: str) -> None:
    body = (
        b'--a\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--a\r\n'
        b'Content-Disposition: form-data; name="file"; filename="\\ud800"\r\n\r\n1\r\n--a--\r\n'
    )
    headers = {"content-type": f"multipart/form-data; boundary=a; charset={charset}"}
    response = client.call("POST", "/v1/files", content=body, headers=headers)
    assert response.status_code in (200, 400)
    assert client.get("/v1/files").status_code == 200


def test_each_key_has_files_of_its_own(tmp_path: Path) -> None:
    files = FileStore(str(tmp_path))
    of_all = files.keep(_source(tmp_path), "old.jsonl", "batch", "file-old").id  # from before there were keys
    with Client(make_server(batches=BatchStore(files), api_keys=("one", "two"))) as client:

        def call(key: str, method: str, path: str, **more: Any) -> Any:
            return client.call(method, "/v1" + path, headers={"authorization": f"Bearer {key}"}, **more)

        form = {"files": {"file": ("in.jsonl", b"{}\n")}, "data": {"purpose": "batch"}}
        mine = call("one", "POST", "/files", **form).json()
        assert "owner" not in mine and "owner" not in str(call("one", "GET", "/files").json())
        assert {each["id"] for each in call("one", "GET", "/files").json()["data"]} == {mine["id"], of_all}
        assert [each["id"] for each in call("two", "GET", "/files").json()["data"]] == [of_all]
        for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
            assert call("two", method, f"/files/{mine['id']}{path}").status_code == 404
        body = {"input_file_id": mine["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        assert call("two", "POST", "/batches", json=body).json()["error"]["param"] == "input_file_id"
        batch = call("one", "POST", "/batches", json=body).json()
        assert "owner" not in batch and call("two", "GET", "/batches").json()["data"] == []
        for method, path in (("GET", ""), ("POST", "/cancel")):
            assert call("two", method, f"/batches/{batch['id']}{path}").status_code == 404
            assert call("one", method, f"/batches/{batch['id']}{path}").status_code == 200
        assert all(b"one" not in path.read_bytes() for path in tmp_path.rglob("*.json"))
    files.close()
    again = FileStore(str(tmp_path))
    with Client(make_server(batches=BatchStore(again), api_keys=("two",))) as client:
        headers = {"authorization": "Bearer two"}
        assert client.get(f"/v1/files/{mine['id']}", headers=headers).status_code == 404
    with Client(make_server(batches=BatchStore(again))) as client:  # without keys there is one user
        assert client.get(f"/v1/files/{mine['id']}").status_code == 200
    again.close()


def _source(folder: Path) -> Path:
    path = folder / "source"
    path.write_bytes(b"{}\n")
    return path
