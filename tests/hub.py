"""A hub on loopback: Hugging Face's and ModelScope's protocols; it counts what it sends, and fails on request."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import parse_qs, quote, unquote, urlsplit

REPO = "acme/tiny-1.5"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
BIG_BYTES = 4096
SEND_BYTES = 2**14
WHOLE = ("status", "html", "loop")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Fault:
    """What goes wrong with the next `times` answers whose path matches.

    status (value: code), cut, stall (value: after that many bytes), slow (value: bytes per second), flip (value: which
    byte), ignore_range, wrong_range, gzip, html, expired (the link that the redirect gives is refused), loop.
    """

    kind: str
    path: str = ""
    value: int = 0
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    on: Literal["hub", "cdn", "both"] = "both"


@dataclass
class Seen:
    """One request and what was sent for it."""

    port: str
    method: str
    path: str
    headers: dict[str, str]
    content: str = ""
    sent_bytes: int = 0


class Hub:
    """The two servers: `url` is the hub, its storage (`cdn_url`) is on a port of its own."""

    def __init__(self, files: dict[str, bytes], repo: str = REPO) -> None:
        self.repo, self.files = repo, files
        self.faults: list[Fault] = []
        self.seen: list[Seen] = []
        self.page_size = 1000
        self.gated = self.private = False
        self.token = ""
        self._lock = threading.Lock()
        self._servers = [self._serve("hub"), self._serve("cdn")]
        self.url, self.cdn_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)

    def _serve(self, port: str) -> ThreadingHTTPServer:
        handler = type("Handler", (_Handler,), {"hub": self, "port": port})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server

    def close(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def fault(self, port: str, path: str, *, of_content: bool) -> Fault | None:
        """The fault that is due; those of contents are kept until contents are sent."""
        with self._lock:
            for fault in self.faults:
                fits = fault.on in (port, "both") and fault.path in path
                if fault.times and fits and (fault.kind not in WHOLE or port == "cdn") == of_content:
                    fault.times -= 1
                    return fault
        return None

    def sent_bytes(self, path: str | None = None) -> int:
        """Bytes of file contents that were sent."""
        return sum(seen.sent_bytes for seen in self.seen if seen.content and path in (None, seen.content))

    def total_bytes(self) -> int:
        return sum(map(len, self.files.values()))


@contextmanager
def running(files: dict[str, bytes], repo: str = REPO) -> Iterator[Hub]:
    hub = Hub(files, repo)
    try:
        yield hub
    finally:
        hub.close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    port: str
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *args: Any) -> None:
        return None

    def _answer(self) -> None:
        self.close_connection = True
        self.record = Seen(self.port, self.command, self.path, {k.lower(): v for k, v in self.headers.items()})
        self.hub.seen.append(self.record)
        path = unquote(urlsplit(self.path).path)
        try:
            if self.port == "cdn":
                self._content(path.removeprefix("/"))
            elif path.startswith("/api/v1/models/"):
                self._modelscope(path)
            else:
                self._hugging_face(path)
        except (BrokenPipeError, ConnectionResetError):
            return

    def _hugging_face(self, path: str) -> None:
        repo, fault = self.hub.repo, self.hub.fault("hub", self.path, of_content=False)
        if fault is not None:
            self._spoil(fault)
        elif path.startswith(f"/api/models/{repo}") and not self._private():
            rest = path.removeprefix(f"/api/models/{repo}")
            if rest in ("", "/revision/main", f"/revision/{COMMIT}"):
                self._json({"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.hub.files]})
            elif rest == f"/tree/{COMMIT}":
                self._tree()
            else:
                self._error(404, "RevisionNotFound")
        elif match := re.fullmatch(rf"/{re.escape(repo)}/resolve/(main|{COMMIT})/(.*)", path):
            self._resolve(match[2])
        elif not self._private():
            self._error(401, "RepoNotFound")

    def _private(self) -> bool:
        if not self.hub.private or self.headers.get("Authorization") == f"Bearer {self.hub.token}":
            return False
        self._error(401, "RepoNotFound")
        return True

    def _resolve(self, name: str) -> None:
        if self.hub.gated and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._error(401 if "Authorization" not in self.headers else 403, "GatedRepo")
        elif name not in self.hub.files:
            self._error(404, "EntryNotFound")
        elif self.big(name):
            content = self.hub.files[name]
            headers = {"X-Linked-ETag": f'"{sha256(content)}"', "X-Linked-Size": str(len(content))}
            self._redirect(name, {"X-Repo-Commit": COMMIT, "ETag": f'"{git_sha1(content)}"', **headers})
        else:
            self._content(name)

    def big(self, name: str) -> bool:
        return len(self.hub.files[name]) >= BIG_BYTES

    def _redirect(self, name: str, headers: dict[str, str]) -> None:
        self._head(302, {"Location": f"{self.hub.cdn_url}/{quote(name)}?signature=x", "Content-Length": "0", **headers})

    def _tree(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        at = int(query.get("cursor", ["0"])[0])
        entries = []
        for name, content in self.hub.files.items():
            entry = {"type": "file", "path": name, "size": len(content), "oid": git_sha1(content)}
            if self.big(name):
                entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        end = at + self.hub.page_size
        link = f'<{self.hub.url}{urlsplit(self.path).path}?recursive=true&cursor={end}>; rel="next"'
        self._json(entries[at:end], {"Link": link} if end < len(entries) else {})

    def _modelscope(self, path: str) -> None:
        base, query = f"/api/v1/models/{self.hub.repo}", parse_qs(urlsplit(self.path).query)
        fault = self.hub.fault("hub", self.path, of_content=False)
        if fault is not None:
            self._spoil(fault)
        elif not path.startswith(base) or query.get("Revision", ["master"])[0] != "master":
            self._json({"Code": 10010205001, "Message": "not found", "Success": False}, status=404)
        elif path == f"{base}/repo/files":
            files = [self._modelscope_entry(name, content) for name, content in self.hub.files.items()]
            self._json({"Code": 200, "Data": {"Files": files}, "Success": True})
        elif path == f"{base}/revisions":
            branches = [{"Revision": "master", "CreatedAt": 1}]
            self._json({"Code": 200, "Data": {"RevisionMap": {"Branches": branches, "Tags": []}}, "Success": True})
        elif path == f"{base}/repo" and (name := query.get("FilePath", [""])[0]) in self.hub.files:
            if self.big(name):
                self._redirect(name, {})
            else:
                self._content(name)
        elif path == base:
            self._json({"Code": 200, "Data": {"Name": self.hub.repo.split("/")[1]}, "Success": True})
        else:
            self._json({"Code": 404, "Message": "not found", "Success": False}, status=404)

    def _modelscope_entry(self, name: str, content: bytes) -> dict[str, Any]:
        size, leaf = len(content), name.rpartition("/")[2]
        return {"Name": leaf, "Path": name, "Type": "blob", "Size": size, "Sha256": sha256(content), "Revision": COMMIT}

    def _spoil(self, fault: Fault) -> None:
        if fault.kind == "status":
            self._error(fault.value, "", fault.headers)
        elif fault.kind == "loop":
            self._head(302, {"Location": self.hub.url + self.path, "Content-Length": "0"})
        else:
            page = b"<!doctype html><html>Please log in</html>"
            self._head(200, {"Content-Type": "text/html", "Content-Length": str(len(page))})
            self.wfile.write(page)

    def _content(self, name: str) -> None:
        fault = self.hub.fault(self.port, self.path, of_content=True)
        kind = fault.kind if fault else ""
        if fault is not None and kind in ("status", "html", "expired"):
            self._spoil(Fault("status", value=403) if kind == "expired" else fault)
            return
        content = self.hub.files[name]
        etag = sha256(content) if self.big(name) else git_sha1(content)
        body, start, status = content, 0, 200
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if fault is not None and kind == "flip":
            body = body[: fault.value] + bytes([body[fault.value] ^ 1]) + body[fault.value + 1 :]
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span and kind != "ignore_range":
            start, end = int(span[1]), int(span[2] or len(content) - 1) + 1
            if start >= len(content):
                self._error(416, "")
                return
            shift = 1 if kind == "wrong_range" else 0
            body, status = body[start:end], 206
            headers["Content-Range"] = f"bytes {start + shift}-{end - 1 + shift}/{len(content)}"
        if kind == "gzip":
            body, headers["Content-Encoding"] = gzip.compress(body), "gzip"
        self._head(status, {**headers, "Content-Length": str(len(body))})
        if self.command == "GET":
            self.record.content = name
            self._send(body, fault)

    def _send(self, body: bytes, fault: Fault | None) -> None:
        kind, value = (fault.kind, fault.value) if fault else ("", 0)
        for at in range(0, len(body), SEND_BYTES):
            piece = body[at : at + SEND_BYTES]
            if kind in ("cut", "stall") and at + len(piece) > value:
                self._write(piece[: max(0, value - at)])
                if kind == "stall":
                    time.sleep(3)
                return
            self._write(piece)
            if kind == "slow":
                time.sleep(len(piece) / value)

    def _write(self, piece: bytes) -> None:
        self.wfile.write(piece)
        self.record.sent_bytes += len(piece)

    def _json(self, value: Any, headers: dict[str, str] | None = None, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self._head(status, {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})})
        if self.command == "GET":
            self.wfile.write(body)

    def _error(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._head(status, {"Content-Length": "0", **({"X-Error-Code": code} if code else {}), **(headers or {})})

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
