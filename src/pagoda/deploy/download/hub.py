"""The two hubs, Hugging Face and ModelScope: where they are, what they list, and where a file is fetched."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from pagoda.deploy.download.failures import SourceFailed
from pagoda.deploy.download.fetch import Endpoint, get_json
from pagoda.errors import ConfigError

HUGGING_FACE = "https://huggingface.co"
MODELSCOPE = "https://www.modelscope.cn"
MODELSCOPE_INTERNATIONAL = "https://www.modelscope.ai"
MIRROR = "https://hf-mirror.com"
MAX_FILES = 100_000
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_REPO = re.compile(r"(?!.*\.\.)[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class Source:
    """One place to fetch from. `protocol` is "huggingface" or "modelscope"."""

    protocol: str
    endpoint: Endpoint

    @property
    def name(self) -> str:
        return self.endpoint.host


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file as a hub lists it. Big files have a SHA-256, small ones on Hugging Face git's SHA-1."""

    path: str
    size: int
    sha256: str | None = None
    git_sha1: str | None = None

    @property
    def etag(self) -> str:
        """Its content's hash as Hugging Face names it; '' if the hub does not tell."""
        return self.sha256 or self.git_sha1 or ""


@dataclass(frozen=True, slots=True)
class Listing:
    """All files of one revision. `commit` is the revision itself where the hub has no commits (ModelScope)."""

    source: Source
    repo: str
    revision: str
    commit: str
    files: tuple[RemoteFile, ...]

    def url(self, file: RemoteFile) -> str:
        """Where the content of a file is asked for."""
        base = self.source.endpoint.url
        if self.source.protocol == "huggingface":
            return f"{base}/{self.repo}/resolve/{self.commit}/{quote(file.path)}"
        query = urlencode({"Revision": self.commit, "FilePath": file.path}, quote_via=quote)
        return f"{base}/api/v1/models/{self.repo}/repo?{query}"


def split_name(name: str) -> tuple[str, str | None] | None:
    """`owner/name` and what follows a colon (a file or a quantization); None if it is no hub name."""
    repo, colon, part = name.partition(":")
    if not _REPO.fullmatch(repo) or repo.endswith(".gguf") or (colon and not part):
        return None
    return repo, part or None


def offline(environ: Mapping[str, str]) -> bool:
    """True if the user forbids the network."""
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in names)


def sources(choice: str, environ: Mapping[str, str], *, token_to_mirror: bool = False) -> list[Source]:
    """The places to ask, in order. `choice` is "auto", or names and addresses with commas."""
    mirror = (environ.get("HF_ENDPOINT") or HUGGING_FACE).rstrip("/")
    scope = (environ.get("MODELSCOPE_ENDPOINT") or _site(environ)).rstrip("/")
    by_name = {"modelscope": scope, "ms": scope, "hf-mirror": MIRROR, "huggingface": mirror, "hf": mirror}
    words = [mirror, HUGGING_FACE, "modelscope"] if choice == "auto" else choice.split(",")
    if choice == "auto" and environ.get("VLLM_USE_MODELSCOPE", "").lower() in ("1", "true"):
        words = ["modelscope", *words[:-1]]
    out: dict[str, Source] = {}
    for word in (word.strip().rstrip("/") for word in words):
        url = by_name.get(word, word)
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
            names = "huggingface, modelscope, hf-mirror, or an address that begins with https://"
            raise ConfigError(f"There is no source {word or choice!r}", remedy=f"Sources are {names}")
        protocol = (
            "modelscope" if word in ("modelscope", "ms") or "modelscope" in urlsplit(url).netloc else "huggingface"
        )
        own = url in (HUGGING_FACE, MODELSCOPE, MODELSCOPE_INTERNATIONAL)
        token = _token(protocol, environ) if own or token_to_mirror else None
        cookie = "m_session_id" if protocol == "modelscope" else None
        out.setdefault(url, Source(protocol, Endpoint(url, token, cookie)))
    return list(out.values())


def _site(environ: Mapping[str, str]) -> str:
    international = environ.get("MODELSCOPE_PREFER_AI_SITE", "").lower() in ("1", "true")
    return MODELSCOPE_INTERNATIONAL if international else MODELSCOPE


def _token(protocol: str, environ: Mapping[str, str]) -> str | None:
    """The user's token: from the environment, or saved by `hf auth login`."""
    if protocol == "modelscope":
        return environ.get("MODELSCOPE_API_TOKEN", "").strip() or None
    token = environ.get("HF_TOKEN", "").strip() or environ.get("HUGGING_FACE_HUB_TOKEN", "").strip()
    if not token and environ.get("HF_HUB_DISABLE_IMPLICIT_TOKEN", "").lower() not in ("1", "true", "yes", "on"):
        place = environ.get("HF_TOKEN_PATH") or hf_home(environ) / "token"
        try:
            token = Path(place).read_text().strip()
        except (OSError, UnicodeDecodeError):
            return None
    return token or None


def hf_home(environ: Mapping[str, str]) -> Path:
    """Hugging Face's folder: $HF_HOME, or huggingface in the user's cache."""
    caches = environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(environ.get("HF_HOME") or f"{caches}/huggingface").expanduser()


def list_files(source: Source, repo: str, revision: str | None) -> Listing:
    """What the hub has of this model. The first branch has another name on each hub."""
    usual = revision in (None, "main", "master")
    if source.protocol == "huggingface":
        listing = _hugging_face(source, repo, "main" if usual or revision is None else revision)
    else:
        listing = _modelscope(source, repo, "master" if usual or revision is None else revision)
    _check_paths(listing)
    return listing


def _hugging_face(source: Source, repo: str, revision: str) -> Listing:
    base = f"{source.endpoint.url}/api/models/{repo}"
    commit = revision
    if not _COMMIT.fullmatch(revision):
        info, _ = get_json(source.endpoint, f"{base}/revision/{quote(revision, safe='')}")
        found = _hex(_COMMIT, info.get("sha")) if isinstance(info, dict) else None
        if found is None:
            raise SourceFailed(f"{source.name} does not answer like a hub: no commit for {repo}")
        commit = found
    page: str | None = f"{base}/tree/{commit}?recursive=true&expand=false"
    files: list[RemoteFile] = []
    seen: set[str] = set()
    while page is not None and page not in seen and len(files) <= MAX_FILES:
        seen.add(page)
        entries, page = get_json(source.endpoint, page)
        if page is not None and urlsplit(page).netloc != source.endpoint.host:
            # Some mirrors pass on the addresses of the hub behind them.
            page = source.endpoint.url + page[len("{0.scheme}://{0.netloc}".format(urlsplit(page))) :]
        files += _hugging_face_files(source, entries)
    return Listing(source, repo, revision, commit, tuple(files))


def _hugging_face_files(source: Source, entries: Any) -> Iterator[RemoteFile]:
    for entry in _dicts(source, entries):
        if entry.get("type") != "file":
            continue
        lfs = entry.get("lfs")
        sha256 = _hex(_SHA256, lfs.get("oid")) if isinstance(lfs, dict) else None
        git = None if sha256 else _hex(_COMMIT, entry.get("oid"))
        size = lfs.get("size", entry.get("size")) if isinstance(lfs, dict) else entry.get("size")
        if not sha256 and not git:
            raise SourceFailed(f"{source.name} does not answer like a hub: a file without a hash")
        yield _file(source, entry.get("path"), size, sha256, git)


def _modelscope(source: Source, repo: str, revision: str) -> Listing:
    query = urlencode({"Revision": revision, "Recursive": "True"})
    answer, _ = get_json(source.endpoint, f"{source.endpoint.url}/api/v1/models/{repo}/repo/files?{query}")
    data = answer.get("Data") if isinstance(answer, dict) else None
    entries = data.get("Files") if isinstance(data, dict) else data
    if entries is None:
        why = answer.get("Message") if isinstance(answer, dict) else None
        raise SourceFailed(f"{source.name} has no such model: {why or 'it lists no files'}")
    files = [
        _file(source, entry.get("Path"), entry.get("Size"), _hex(_SHA256, entry.get("Sha256")), None)
        for entry in _dicts(source, entries)
        if entry.get("Type") == "blob"
    ]
    return Listing(source, repo, revision, revision, tuple(files))


def _dicts(source: Source, entries: Any) -> Sequence[dict[str, Any]]:
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise SourceFailed(f"{source.name} does not answer like a hub: no list of files")
    return entries


def _hex(pattern: re.Pattern[str], value: Any) -> str | None:
    return value if isinstance(value, str) and pattern.fullmatch(value) else None


def _file(source: Source, path: Any, size: Any, sha256: str | None, git: str | None) -> RemoteFile:
    if not isinstance(path, str) or isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise SourceFailed(f"{source.name} does not answer like a hub: a file without a name or a size")
    return RemoteFile(path, size, sha256, git)


def _check_paths(listing: Listing) -> None:
    """No name may lead out of the model's folder, or mean another file on another system."""
    if len(listing.files) > MAX_FILES:
        raise SourceFailed(f"{listing.repo} has more than {MAX_FILES} files")
    folded: set[str] = set()
    for file in listing.files:
        parts = file.path.split("/")
        hostile = any(part in ("", ".", "..") or _RESERVED.fullmatch(part) or len(part) > 255 for part in parts)
        # Characters that Windows reads as a path, and those that play with a terminal.
        hostile = hostile or bool(re.search(r"[\\:\x00-\x1f\x7f]", file.path)) or len(file.path) > 1024
        if hostile or file.path.casefold() in folded or parts[0] in (".cache", ".git", ".pagoda"):
            raise SourceFailed(
                f"{listing.repo} at {listing.source.name} has a file with a name that is not safe: {file.path!r}"
            )
        folded.add(file.path.casefold())
