"""A running server as a client meets it: what it serves, at which address, and what it answers to a call."""

from __future__ import annotations

import http.client
import ipaddress
import json
import re
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, urlsplit

import psutil

from pagoda.deploy.findings import Finding, note, ok, problem
from pagoda.errors import ConfigError, EngineError

Text = tuple[str, str]
"""The same in English and in Chinese."""

LANGUAGES = ("en", "zh")
_PLAIN = re.compile(r"[\w./:@+=,~-]+")
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10, 300


def pick(text: Text, lang: str) -> str:
    return text[LANGUAGES.index(lang)]


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back. `first_s`: when the first text of a stream had come, in seconds from the call."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    took_s: float
    first_s: float | None = None

    def json(self) -> Any:
        try:
            return json.loads(self.body)
        except ValueError:
            return None


class Target:
    """A server at a base URL without /v1, and the key for it."""

    def __init__(self, url: str, key: str = "") -> None:
        parts = _parts(url)
        self.root = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"
        self.key = key
        self.host, self.port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        self._secure, self._path = parts.scheme == "https", urlsplit(self.root).path

    def at(self, host: str) -> str:
        """The same server under another name of its machine."""
        named = f"[{host}]" if ":" in host else host
        return f"{'https' if self._secure else 'http'}://{named}:{self.port}{self._path}"

    @property
    def is_loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def call(
        self,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        enough: Callable[[bytes], bool] = lambda body: False,
    ) -> Reply:
        """One call. A stream is read until `enough`; EngineError where nothing answers."""
        sent = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        sent |= {"Content-Type": "application/json", **(headers or {})}
        if self._secure:
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                self.host, self.port, timeout=CONNECT_TIMEOUT_S, context=ssl.create_default_context()
            )
        else:
            connection = http.client.HTTPConnection(self.host, self.port, timeout=CONNECT_TIMEOUT_S)
        start_s = time.perf_counter()
        try:
            connection.connect()
            connection.sock.settimeout(READ_TIMEOUT_S)
            content = None if body is None else json.dumps(body)
            connection.request("GET" if body is None else "POST", self._path + path, content, sent)
            response = connection.getresponse()
            return _read(response, start_s, enough)
        except (OSError, http.client.HTTPException) as error:
            text = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise EngineError(f"There is no server at {self.root}: {text}", remedy="Start one: pagoda serve") from None
        finally:
            connection.close()


def _read(response: http.client.HTTPResponse, start_s: float, enough: Callable[[bytes], bool]) -> Reply:
    body, first_s = b"", None
    while piece := response.read1(65536):
        body += piece
        if enough(body):
            first_s = time.perf_counter() - start_s
            break
    headers = {name.lower(): value for name, value in response.getheaders()}
    return Reply(response.status, headers, body, time.perf_counter() - start_s, first_s)


def _parts(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts
    except ValueError:
        pass
    raise ConfigError(f"--url {url} is not an address", remedy="Write it as http://localhost:8000")


@dataclass(frozen=True, slots=True)
class Served:
    """What clients are told about. `task` is generate, embed or score; `abilities` such as tools, as far as known."""

    model: str
    context: int | None
    task: str = "generate"
    abilities: tuple[str, ...] = field(default=())

    @property
    def calls_tools(self) -> bool:
        """Where the server does not say what the model can, it may."""
        return not self.abilities or "tools" in self.abilities

    @property
    def sees(self) -> bool:
        return "vision" in self.abilities


def look(target: Target, wanted: str | None) -> Served:
    """Ask the server what it serves."""
    reply = target.call("/v1/models")
    if reply.status in (401, 403):
        remedy = "Give the server's key with --api-key" if reply.status == 401 else ""
        raise EngineError(f"The server at {target.root} refuses: {reason(reply)}", remedy=remedy)
    content = reply.json()
    cards = content.get("data") if isinstance(content, dict) else None
    if reply.status != 200 or not isinstance(cards, list) or not cards:
        text = f"{target.root}/v1/models names no model ({reply.status}: {reason(reply)})"
        raise EngineError(text, remedy="Is this the address of an OpenAI-compatible server?")
    named = {str(card.get("id")): card for card in cards if isinstance(card, dict)}
    if wanted is not None and wanted not in named:
        raise ConfigError(f"The server has no model {wanted}", remedy=f"It serves {', '.join(named)}")
    model = wanted or next(iter(named))
    if not _PLAIN.fullmatch(model):
        # It is going to be pasted into shells and source code.
        text = f"The model's name {model!r} has characters that cannot be typed everywhere"
        raise ConfigError(text, remedy="Serve it under a plain one: --served-model-name NAME")
    context = named[model].get("max_model_len") or named[model].get("context_length")
    engine = _dict(_dict(target.call("/server_info").json()).get("engine"))
    shown = _dict(target.call("/api/show", {"model": model}).json())
    return Served(
        model,
        context if isinstance(context, int) else None,
        str(engine.get("task", "generate")),
        tuple(map(str, shown.get("capabilities") or ())),
    )


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def reason(reply: Reply) -> str:
    """What the body of an error says."""
    content = _dict(reply.json())
    error = content.get("error", content.get("message", content.get("detail")))
    text = _dict(error).get("message") or error
    return str(text or reply.body[:200].decode(errors="replace"))[:300]


def from_containers(target: Target, lang: str, host: str | None = None) -> tuple[str, Finding]:
    """The address under which programs in Docker on this machine reach the server, and whether they do."""
    topic = pick(("from Docker", "从 Docker 访问"), lang)
    if host is None and not target.is_loopback:
        return target.root, ok(topic, target.root)
    host = host or _own_address()
    if host is None:
        root = target.at("host.docker.internal")
        text = ("this machine has no address in a network", "本机没有网络地址")
        cure = ("start the container with --add-host host.docker.internal:host-gateway",) * 2
        return root, note(topic, pick(text, lang), pick(cure, lang))
    root = target.at(host)
    try:
        reply = Target(root, target.key).call("/v1/models")
    except EngineError:
        reply = None
    if reply is not None and reply.status == 200:
        return root, ok(topic, root)
    text = (
        f"{root} does not answer: in a container localhost is the container itself, and this server listens on "
        "this machine's own localhost only",
        f"{root} 无法访问：容器里的 localhost 是容器自己，而服务器只监听本机的 localhost",
    )
    cure = (
        "start it with: pagoda serve ... --host 0.0.0.0 --api-key KEY  (and open the port in the firewall)",
        "这样启动：pagoda serve ... --host 0.0.0.0 --api-key KEY（并在防火墙中放行端口）",
    )
    return root, problem(topic, pick(text, lang), pick(cure, lang))


def _own_address() -> str | None:
    """The address of this machine in its network: the one that goes to the default route, else the first there is."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # connecting sends nothing; it only chooses the way
            found = str(probe.getsockname()[0])
        except OSError:
            found = ""
    if found and not ipaddress.ip_address(found).is_loopback:
        return found
    addresses = (a.address for nic in psutil.net_if_addrs().values() for a in nic if a.family == socket.AF_INET)
    return next((a for a in addresses if not ipaddress.ip_address(a).is_loopback), None)
