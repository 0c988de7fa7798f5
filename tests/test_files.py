"""/v1/files in memory and on disk: multipart, limits, what a crash may leave."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_fake import Client, make_server

from pagoda.api.batch_store import BatchStore
from pagoda.api.file_store import FileStore
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
    monkeypatch.setattr("pagoda.api.files.MAX_FILE_BYTES", 100)
    monkeypatch.setattr("pagoda.api.files._FORM_BYTES", 100)
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
