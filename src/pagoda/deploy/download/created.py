"""Models that clients of a server made of files they sent: each in a folder of its own, found by its name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import quote, unquote

from pagoda.deploy.download.default_model import cache_path
from pagoda.errors import ModelError

_FOLDER = "created"
BLOBS = "blobs"


def keep(name: str, files: Mapping[str, Path], texts: Mapping[str, str]) -> Path:
    """The folder of the model, with links to these files: a file that several models use is on the disk once."""
    folder = _folder(name)
    new = folder.with_name(f".new-{os.getpid()}-{folder.name}")
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700, parents=True)
        for own, source in files.items():
            os.link(source, new / own)
        for own, text in texts.items():
            (new / own).write_text(text, "utf-8")
        if folder.is_dir():
            remove_created(folder)
        os.rename(new, folder)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        raise ModelError(f"{name} can't be stored: {error.strerror}", remedy="Set PAGODA_CACHE to a folder") from None
    return folder


def created_model(name: str) -> str | None:
    """Where the model of this name is, if one was made."""
    folder = _folder(name.removesuffix(":latest"))
    return str(folder) if folder.parent.name == _FOLDER and folder.is_dir() else None


def created_models() -> Iterator[tuple[str, Path]]:
    """All of them by name."""
    base = cache_path() / _FOLDER
    for folder in sorted(base.iterdir()) if base.is_dir() else ():
        if folder.is_dir() and not folder.name.startswith("."):
            yield unquote(folder.name), folder


def remove_created(folder: Path) -> None:
    """Delete it, and those of its files that no other model uses."""
    used = {(stat.st_dev, stat.st_ino) for stat in (path.stat() for path in folder.iterdir())}
    shutil.rmtree(folder)
    blobs = cache_path() / BLOBS
    for path in blobs.iterdir() if blobs.is_dir() else ():
        stat = path.stat()
        if (stat.st_dev, stat.st_ino) in used and stat.st_nlink == 1:
            path.unlink()


def _folder(name: str) -> Path:
    return cache_path() / _FOLDER / quote(name.strip("."), safe="")
