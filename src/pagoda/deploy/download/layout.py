"""Where fetched files go, in the layouts that other tools read, so that a model appears only when it is complete."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from pagoda.deploy.download.failures import disk_failed
from pagoda.deploy.download.hub import Listing, RemoteFile, hf_home
from pagoda.deploy.download.partial import Partial


class Layout(Protocol):
    """A place for one model."""

    @property
    def work(self) -> Path:
        """Pagoda's own folder: the lock, partial files, what is verified and not published."""

    def has(self, file: RemoteFile) -> bool:
        """True if the verified content is there."""

    def store(self, partial: Partial) -> None:
        """Take over a verified file."""

    def publish(self, listing: Listing, files: list[RemoteFile]) -> Path:
        """Make the stored files one model, and return its folder."""


def hf_cache(environ: Mapping[str, str]) -> Path:
    """The folder in which huggingface_hub keeps models."""
    named = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE")
    return Path(named).expanduser() if named else hf_home(environ) / "hub"


def modelscope_cache(environ: Mapping[str, str]) -> Path:
    """The folder below which modelscope keeps models."""
    named = environ.get("MODELSCOPE_CACHE")
    return Path(named or "~/.cache/modelscope/hub").expanduser() / "models"


def hf_folder(repo: str, environ: Mapping[str, str]) -> Path:
    return hf_cache(environ) / f"models--{repo.replace('/', '--')}"


def modelscope_folder(repo: str, environ: Mapping[str, str]) -> Path:
    owner, name = repo.split("/")
    return modelscope_cache(environ) / owner / name.replace(".", "___")


def modelscope_snapshot(repo: str, revision: str, environ: Mapping[str, str]) -> Path:
    """Where modelscope 2 puts a model itself; it looks in `modelscope_folder` first, which older versions read, too."""
    root = Path(environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope").expanduser()
    return root / "models" / repo.replace("/", "--") / "snapshots" / revision


def layout_for(listing: Listing, local_dir: Path | None, environ: Mapping[str, str]) -> Layout:
    """The folder the user named, or the cache of the tool that belongs to the source."""
    if local_dir is not None:
        return PlainFolder(local_dir, local_dir / ".cache" / "pagoda")
    if listing.source.protocol == "huggingface":
        return HubCache(hf_folder(listing.repo, environ))
    folder = modelscope_folder(listing.repo, environ)
    newer = modelscope_snapshot(listing.repo, listing.commit, environ)
    if newer.is_dir() and not folder.exists():
        folder = newer
    return PlainFolder(folder, folder.parent / f".pagoda-{folder.name}")


class HubCache:
    """huggingface_hub's cache: blobs by hash, snapshots that link to them, refs that name a snapshot."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.work = folder / ".pagoda"

    def has(self, file: RemoteFile) -> bool:
        try:
            return bool(file.etag) and (self._folder / "blobs" / file.etag).stat().st_size == file.size
        except OSError:
            return False

    def store(self, partial: Partial) -> None:
        _move(partial, self._folder / "blobs" / partial.file.etag)

    def publish(self, listing: Listing, files: list[RemoteFile]) -> Path:
        snapshot = self._folder / "snapshots" / listing.commit
        try:
            if snapshot.exists():
                self._link(snapshot, files, snapshot)
            else:
                staged = self.work / f"snapshot-{listing.commit}"
                shutil.rmtree(staged, ignore_errors=True)
                self._link(staged, files, snapshot)
                snapshot.parent.mkdir(parents=True, exist_ok=True)
                os.rename(staged, snapshot)
            if listing.revision != listing.commit:
                write_atomically(self._folder / "refs" / listing.revision, listing.commit)
        except OSError as error:
            raise disk_failed(error, snapshot) from None
        return snapshot

    def _link(self, folder: Path, files: list[RemoteFile], final: Path) -> None:
        """config.json last: a model without it is none."""
        for file in sorted(files, key=lambda file: file.path == "config.json"):
            link, blob = folder / file.path, self._folder / "blobs" / file.etag
            link.parent.mkdir(parents=True, exist_ok=True)
            target = os.path.relpath(blob, (final / file.path).parent)
            if link.is_symlink() and os.readlink(link) == target:
                continue
            fresh = link.with_name(f"{link.name[:200]}.pagoda")
            fresh.unlink(missing_ok=True)
            try:
                os.symlink(target, fresh)
            except OSError:
                # A disk without symbolic links: the content twice, by a hard link where that works.
                _copy(blob, fresh)
            os.replace(fresh, link)


class PlainFolder:
    """Files under their own names, and a record of their hashes. They are moved in when all are verified."""

    def __init__(self, folder: Path, work: Path) -> None:
        self._folder, self.work = folder, work
        self._staged = work / "verified"
        self._record: dict[str, Any] = read_record(folder)

    def has(self, file: RemoteFile) -> bool:
        path = self._folder / file.path
        try:
            if bool(file.etag) and (self._staged / file.etag).stat().st_size == file.size:
                return True
        except OSError:
            pass
        try:
            if not file.etag or path.stat().st_size != file.size:
                return False
            entry = self._record.get(file.path)
            if entry == self._entry(file):
                return True
            return _hash(path, file) == file.etag
        except OSError:
            return False

    def store(self, partial: Partial) -> None:
        file = partial.file
        _move(partial, self._staged / (file.etag or partial.path.name))

    def publish(self, listing: Listing, files: list[RemoteFile]) -> Path:
        try:
            for file in sorted(files, key=lambda file: file.path == "config.json"):
                self._place(file)
                self._record[file.path] = self._entry(file)
                if listing.source.protocol == "huggingface":
                    self._tell_huggingface(listing.commit, file)
            write_atomically(
                record_path(self._folder),
                json.dumps(
                    {
                        "source": listing.source.name,
                        "repo": listing.repo,
                        "revision": listing.revision,
                        "commit": listing.commit,
                        "files": self._record,
                    },
                    indent=1,
                ),
            )
            shutil.rmtree(self._staged, ignore_errors=True)
        except OSError as error:
            raise disk_failed(error, self._folder) from None
        return self._folder

    def _place(self, file: RemoteFile) -> None:
        target = self._folder / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = self._staged / (file.etag or f"unverified-{hashlib.sha256(file.path.encode()).hexdigest()}")
        if not staged.exists():
            return
        # Another file of the same content may need it once more.
        fresh = target.with_name(f"{target.name[:200]}.pagoda")
        fresh.unlink(missing_ok=True)
        _copy(staged, fresh)
        os.replace(fresh, target)

    def _entry(self, file: RemoteFile) -> dict[str, Any]:
        stat = (self._folder / file.path).stat()
        return {"size": stat.st_size, "hash": file.etag, "mtime_ns": stat.st_mtime_ns}

    def _tell_huggingface(self, commit: str, file: RemoteFile) -> None:
        """The note by which `hf download --local-dir` knows that it need not fetch the file."""
        note = self._folder / ".cache" / "huggingface" / "download" / f"{file.path}.metadata"
        write_atomically(note, f"{commit}\n{file.etag}\n{time.time()}\n")


def record_path(folder: Path) -> Path:
    return folder / ".cache" / "pagoda" / "files.json"


def read_record(folder: Path) -> dict[str, Any]:
    """The files that Pagoda put into a plain folder, with their hashes; {} if there is no record."""
    try:
        files = json.loads(record_path(folder).read_bytes())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return files if isinstance(files, dict) else {}


def adopt(folder: Path, others: list[Path], files: list[RemoteFile]) -> None:
    """Partial files, and complete ones, that another source has left for the same content go on here."""
    for file in files:
        mine = folder / (file.sha256 or "")
        if file.sha256 is None or mine.exists():
            continue
        for other in others:
            theirs, journal = other / file.sha256, other / f"{file.sha256}.journal"
            if theirs == mine or not theirs.exists() or not journal.exists():
                continue
            try:
                folder.mkdir(parents=True, exist_ok=True)
                shutil.move(theirs, mine)
                shutil.move(journal, folder / journal.name)
            except OSError as error:
                raise disk_failed(error, folder) from None


def adopt_complete(folder: Path, blobs: list[Path], files: list[RemoteFile]) -> None:
    """A file that is complete in the other source's cache becomes a partial file here that lacks nothing."""
    for file in files:
        mine = folder / (file.sha256 or "")
        found = next((path for path in (b / (file.sha256 or "") for b in blobs) if path.is_file()), None)
        if file.sha256 is None or found is None or found.stat().st_size != file.size:
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mine.unlink(missing_ok=True)
            _copy(found, mine)
            (folder / f"{file.sha256}.journal").write_text(f"0 {file.size}\n")
        except OSError as error:
            raise disk_failed(error, folder) from None


def write_atomically(path: Path, text: str) -> None:
    """The file is there with all of the text, or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.{os.getpid()}.pagoda")
    fresh.write_text(text)
    os.replace(fresh, path)


def _move(partial: Partial, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial.seal(), target)
    except OSError as error:
        raise disk_failed(error, target) from None
    partial.forget()


def _copy(source: Path, target: Path) -> None:
    """A second name for the same bytes; a copy where the disk has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _hash(path: Path, file: RemoteFile) -> str:
    if file.sha256:
        with path.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    return hashlib.sha1(b"blob %d\0" % file.size + path.read_bytes(), usedforsecurity=False).hexdigest()
