"""Fetching for others: only public addresses, each redirect looked at again, limits on size and time, no files."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pagoda.errors import BadRequest
from pagoda.media import fetch as module
from pagoda.media.fetch import Permission, fetch, parse_url, read_file

BODY = b"a picture" * 1000
LOCAL = Permission(("localhost",))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/to/"):
            self.send_response(302)
            self.send_header("location", self.path.removeprefix("/to/"))
            self.send_header("content-length", "0")
        elif path == "/chunks":
            self.send_response(200)
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            for start in range(0, len(BODY), 1000):
                part = BODY[start : start + 1000]
                self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
            self.wfile.write(b"0\r\n\r\n")
            return
        elif path == "/upgrade":
            self.send_response(101)
            self.send_header("connection", "upgrade")
            self.send_header("upgrade", "websocket")
        elif path == "/headers":
            self.send_response(200)
            for i in range(60):
                self.send_header(f"x-{i}", "a" * 1000)
        elif path == "/cut":
            self.send_response(200)
            self.send_header("content-length", str(len(BODY)))
            self.end_headers()
            self.wfile.write(BODY[:100])
            self.close_connection = True
            return
        elif path == "/large":
            self.send_response(200)
            self.end_headers()
            for _ in range(40):
                self.wfile.write(bytes(1 << 20))
            self.close_connection = True
            return
        elif path == "/slow":
            self.server.stop.wait(20)  # type: ignore[attr-defined]
            return
        else:
            self.send_response(200 if path == "/ok" else 404)
            self.send_header("content-length", str(len(BODY)))
            self.end_headers()
            self.wfile.write(BODY)
            return
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.stop = threading.Event()  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.stop.set()  # type: ignore[attr-defined]
    server.shutdown()
    thread.join()


def get(url: str, permission: Permission = LOCAL, answers: dict[str, list[str]] | None = None) -> bytes:
    async def lookup(host: str, port: int) -> Sequence[str]:
        return answers[host] if answers is not None else ["127.0.0.1"]

    return asyncio.run(fetch("part", url, permission, lookup))


@pytest.mark.parametrize("path", ["/ok", "/ok?a=b%20c", "/chunks", "/to//ok"])
def test_what_is_there_comes(port: int, path: str) -> None:
    assert get(f"http://localhost:{port}{path}") == BODY


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/none", "status 404"),
        ("/cut", "broke off|cannot be reached"),
        ("/large", "larger than 32 MiB"),
        ("/headers", "cannot be reached"),
        ("/to//to//to//to//ok", "redirected more than 3"),
        ("/to/file:///etc/passwd", "must hold"),
        ("/to/gopher://localhost/", "must hold"),
        ("/to/http://[", "cannot be reached"),
        ("/upgrade", "cannot be reached"),
        ("/to/http://169.254.169.254/latest/meta-data", "not among --allowed-media-domains"),
    ],
)
def test_what_is_wrong_is_told(port: int, path: str, words: str) -> None:
    with pytest.raises(BadRequest, match=words) as caught:
        get(f"http://localhost:{port}{path}")
    assert "127.0.0.1" not in str(caught.value) and str(port) not in str(caught.value)


def test_time_is_limited(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FETCH_S", 0.3)
    with pytest.raises(BadRequest, match="did not come within"):
        get(f"http://localhost:{port}/slow")


PRIVATE = [
    "127.0.0.1", "10.0.0.1", "172.16.5.5", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
    "255.255.255.255", "192.0.0.8", "198.18.0.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "2002:7f00:1::", "64:ff9b::7f00:1", "ff02::1",
    "2001:0:a9fe:a9fe::", "fec0::1", "192.88.99.1", "3fff::1", "5f00::1", "2001:1::5",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_public_are_refused(address: str) -> None:
    with pytest.raises(BadRequest, match="not a public one"):
        get("http://host.example/a", Permission(), {"host.example": [address]})
    with pytest.raises(BadRequest, match="not a public one"):
        get("http://host.example/a", Permission(), {"host.example": ["93.184.216.34", address]})


@pytest.mark.parametrize("address", ["169.254.169.254", "fe80::1", "::ffff:169.254.169.254", "0.0.0.0"])
def test_a_named_host_may_be_private_but_never_where_clouds_keep_keys(address: str) -> None:
    with pytest.raises(BadRequest, match="not a public one"):
        get("http://host.example/a", Permission(("host.example",)), {"host.example": [address]})


@pytest.mark.parametrize("host", ["2130706433", "0177.0.0.1", "0x7f.1", "127.1", "localhost", "[::1]", "localhost."])
def test_other_ways_to_write_this_machine_are_seen_through(host: str) -> None:
    with pytest.raises(BadRequest, match=r"not a public one|no address|cannot be reached"):
        asyncio.run(fetch("part", f"http://{host}:9/a", Permission()))


def test_the_address_that_was_checked_is_the_one_that_is_used(port: int) -> None:
    asked: list[str] = []

    async def lookup(host: str, port: int) -> Sequence[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["10.255.255.1"]

    assert asyncio.run(fetch("part", f"http://localhost:{port}/ok", LOCAL, lookup)) == BODY
    assert asked == ["localhost"]
    with pytest.raises(BadRequest, match="not a public one"):
        get(f"http://localhost:{port}/to/http://localhost:{port}/ok", Permission(), {"localhost": ["127.0.0.1"]})


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.com/a", "gopher://example.com/", "http://", "http:///a", "http://ok\\@127.0.0.1/",
        "//example.com/a",
        "http://user@example.com/", "http://user:pw@example.com/", "http://example.com:0/", "http://example.com:99999/",
        "http://exa mple.com/", "http://example.com\t/", "http://example.com\r\nHost: x/", "javascript:alert(1)",
        "http://[::1/", "http://例子.example/", "http://a%2eb/", "blob:http://example.com/a", "http://example.com@127.0.0.1/",
    ],
)  # fmt: skip
def test_urls_that_can_be_read_in_two_ways_are_refused(url: str) -> None:
    with pytest.raises(BadRequest, match="must hold"):
        parse_url("part", url)


def test_a_path_may_hold_any_letters() -> None:
    parsed = parse_url("part", "https://Example.COM:8443/图 片.png?x=1#top")
    assert (parsed.host, parsed.port) == ("example.com", 8443)
    assert parsed.target == "/%E5%9B%BE%20%E7%89%87.png?x=1"


def test_fetching_can_be_turned_off_or_held_to_some_hosts() -> None:
    with pytest.raises(BadRequest, match="it fetches none"):
        get("http://localhost/a", Permission(("none",)))
    with pytest.raises(BadRequest, match="not among --allowed-media-domains"):
        get("http://localhost.evil.example/a", LOCAL)


def test_files_are_read_below_one_folder_only(tmp_path: Path) -> None:
    folder, outside = tmp_path / "in", tmp_path / "out"
    (folder / "deep").mkdir(parents=True)
    outside.mkdir()
    (folder / "deep" / "a b.png").write_bytes(b"a")
    (folder / "link.png").symlink_to(folder / "deep" / "a b.png")
    (outside / "secret").write_bytes(b"s")
    (folder / "escape").symlink_to(outside / "secret")
    (folder / "door").symlink_to(outside)
    os.mkfifo(folder / "pipe")
    root = str(folder)
    assert read_file("part", f"file://{root}/deep/a%20b.png", root) == b"a"
    assert read_file("part", f"file://{root}/link.png", root) == b"a"
    for path in (
        f"{outside}/secret", f"{root}/../out/secret", f"{root}/escape", f"{root}/door/secret", f"{root}/pipe",
        f"{root}/%2e%2e/out/secret", root, f"{root}/none", "/dev/zero", "/proc/self/environ", f"{root}/deep/a%00b",
    ):  # fmt: skip
        with pytest.raises(BadRequest, match="no such file below"):
            read_file("part", f"file://{path}", root)
    with pytest.raises(BadRequest, match="no such file below"):
        read_file("part", f"file://host.example{root}/link.png", root)
    with pytest.raises(BadRequest, match="reads no files"):
        read_file("part", f"file://{root}/link.png", None)
    with open(folder / "large", "wb") as large:
        large.truncate(module.MAX_BYTES + 1)
    with pytest.raises(BadRequest, match="larger than"):
        read_file("part", f"file://{root}/large", root)
