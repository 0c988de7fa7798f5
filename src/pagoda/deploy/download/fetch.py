"""One HTTP request to a hub: proxies and certificates of the system, tokens for its own host only."""

from __future__ import annotations

import http.client
import json
import socket
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import IO, Any

from pagoda import __version__
from pagoda.deploy.download.failures import AccessDenied, SourceFailed, Unreachable

TIMEOUT_S = 15.0
MAX_JSON_BYTES = 64 * 2**20
MAX_WAIT_S = 300.0
# What a connection may raise: refused, cut, too slow, or not HTTP at all.
BROKEN = (OSError, http.client.HTTPException)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The address of a hub, and the token that only this host (name and port) may see.

    ModelScope wants the token in a cookie, too: `cookie` is its name.
    """

    url: str
    token: str | None = None
    cookie: str | None = None

    @property
    def host(self) -> str:
        return urllib.parse.urlsplit(self.url).netloc


class TryLater(Exception):
    """The hub is busy or its link has expired: ask again after `wait_s` seconds."""

    def __init__(self, why: str, wait_s: float | None = None) -> None:
        super().__init__(why)
        self.wait_s = wait_s


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects; secrets stay with the host they were meant for, and https stays https."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        old, new = urllib.parse.urlsplit(req.full_url), urllib.parse.urlsplit(newurl)
        if old.scheme == "https" and new.scheme != "https":
            raise SourceFailed(f"{old.netloc} sends on to an address without encryption, {new.netloc}")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and (old.scheme, old.netloc) == (new.scheme, new.netloc):
            for name, value in req.unredirected_hdrs.items():
                if name in ("Authorization", "Cookie"):
                    request.add_unredirected_header(name, value)
        return request


def request(
    endpoint: Endpoint, url: str, span: tuple[int, int] | None = None, timeout_s: float = TIMEOUT_S
) -> http.client.HTTPResponse:
    """Open `url`, of bytes [start, end) if `span` is given. Raises TryLater, a ModelError, or what BROKEN lists."""
    asked = urllib.request.Request(url, headers={"User-Agent": f"pagoda/{__version__}", "Accept-Encoding": "identity"})
    if endpoint.token and urllib.parse.urlsplit(url).netloc == endpoint.host:
        asked.add_unredirected_header("Authorization", f"Bearer {endpoint.token}")
        if endpoint.cookie:
            asked.add_unredirected_header("Cookie", f"{endpoint.cookie}={endpoint.token}")
    if span is not None:
        asked.add_header("Range", f"bytes={span[0]}-{span[1] - 1}")
    _check_proxy(url)
    try:
        answer = urllib.request.build_opener(_Redirects()).open(asked, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        with error:
            raise _refused(endpoint, error) from None
    if not isinstance(answer, http.client.HTTPResponse):
        raise SourceFailed(f"{url} is not an address on the web", remedy="Give one that begins with https://")
    return answer


def _check_proxy(url: str) -> None:
    parts = urllib.parse.urlsplit(url)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all", "")
    if proxy.startswith("socks") and not urllib.request.proxy_bypass(parts.hostname or ""):
        raise Unreachable(
            f"{parts.netloc} is behind the proxy {urllib.parse.urlsplit(proxy).hostname}, and SOCKS is not spoken here",
            remedy="Set HTTPS_PROXY to an http:// address; most SOCKS programs offer one, too",
        )


def get_json(endpoint: Endpoint, url: str, tries: int = 3) -> tuple[Any, str | None]:
    """The answer as JSON, and the address of the next page if there is one."""
    for left in reversed(range(tries)):
        try:
            with request(endpoint, url) as answer:
                body = answer.read(MAX_JSON_BYTES + 1)
                next_page = _next_page(answer.headers.get("Link", ""), url)
            break
        except TryLater as error:
            if not left:
                raise Unreachable(f"{endpoint.host} is busy: {error}") from None
            pause(error.wait_s, tries - left)
        except BROKEN as error:
            # Nobody there, or no such name: that does not change in a second.
            if not left or isinstance(getattr(error, "reason", error), ConnectionRefusedError | socket.gaierror):
                raise Unreachable(f"{endpoint.host} cannot be reached: {reason(error)}", remedy=_PROXY) from None
            pause(None, tries - left)
    if len(body) > MAX_JSON_BYTES:
        raise SourceFailed(f"{endpoint.host} answers with a list of more than {MAX_JSON_BYTES >> 20} MiB")
    try:
        return json.loads(body), next_page
    except ValueError:
        raise Unreachable(
            f"{endpoint.host} does not answer like a hub: what came is not JSON",
            remedy="A proxy or a login page may be in between; open the address in a browser",
        ) from None


_PROXY = "Check the network and HTTPS_PROXY, or name another source: --source modelscope, or HF_ENDPOINT=https://MIRROR"


def pause(wait_s: float | None, attempt: int) -> None:
    """Wait before the next try: as long as the hub asks for, else 0.5 s, 1 s, 2 s, ..."""
    time.sleep(min(MAX_WAIT_S, wait_s) if wait_s is not None else min(8.0, 0.25 * 2**attempt))


def reason(error: BaseException) -> str:
    """Why a connection failed, in its own words."""
    inner = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(inner, TimeoutError):
        return "no answer in time"
    if isinstance(inner, OSError) and inner.strerror:
        return inner.strerror
    return str(inner) or type(inner).__name__


def _next_page(link: str, url: str) -> str | None:
    for part in link.split(","):
        target, _, parameters = part.partition(";")
        if 'rel="next"' in parameters.replace(" ", ""):
            return urllib.parse.urljoin(url, target.strip(" <>"))
    return None


def _refused(endpoint: Endpoint, error: urllib.error.HTTPError) -> Exception:
    """What a status of 300 and more means."""
    code, host = error.headers.get("X-Error-Code", ""), urllib.parse.urlsplit(error.url).netloc
    if error.code in (408, 429) or error.code >= 500:
        return TryLater(f"{host} answers {error.code}", _retry_after(error.headers.get("Retry-After")))
    if host != endpoint.host and error.code in (401, 403, 404, 410):
        # The storage behind the hub: its signed links expire, and the hub gives new ones.
        return TryLater(f"the link to {host} is not valid ({error.code})")
    if code == "GatedRepo":
        return AccessDenied(f"{host} asks for permission to get this model ({error.code})", remedy=_gated(endpoint))
    if error.code == 404:
        return SourceFailed(f"{host} has no such model, revision or file")
    if error.code in (401, 403):
        message = error.headers.get("X-Error-Message", "")[:200]
        if endpoint.token and code != "RepoNotFound":
            why = message or "wrong or expired token, or no right to this model"
            return AccessDenied(f"{host} refuses the token: {why}", remedy="Make a new one, and set HF_TOKEN")
        # The Hugging Face hub answers like this for names that do not exist, too.
        remedy = f"Check the name; if it is right and the model private: {_token(endpoint)}"
        return SourceFailed(f"{host} has no such model, or it is private", remedy=remedy)
    return SourceFailed(f"{host} answers {error.code} {error.reason}")


def _gated(endpoint: Endpoint) -> str:
    return f"Accept its terms on its page at {endpoint.url} while logged in; then: {_token(endpoint)}"


def _token(endpoint: Endpoint) -> str:
    if endpoint.token:
        return "use a token of the account that did so"
    if "modelscope" in endpoint.host:
        return "set MODELSCOPE_API_TOKEN to your token"
    if endpoint.host == "huggingface.co":
        return "set HF_TOKEN to a token from https://huggingface.co/settings/tokens"
    return "set HF_TOKEN, and add --token-to-mirror if this host may see it"


def _retry_after(value: str | None) -> float | None:
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
