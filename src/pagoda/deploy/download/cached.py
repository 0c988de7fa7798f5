"""What the caches hold: the models that `pagoda list` shows and `pagoda rm` removes."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pagoda.deploy.download.created import created_models, remove_created
from pagoda.deploy.download.find_model import is_complete
from pagoda.deploy.download.layout import hf_cache, modelscope_cache
from pagoda.deploy.download.lock import owned
from pagoda.errors import ModelError

CREATED = "created"


@dataclass(frozen=True, slots=True)
class CachedModel:
    """One model in one cache. `folders` is all that belongs to it; `state`: "", "incomplete" or "not finished"."""

    name: str
    cache: str
    folders: tuple[Path, ...]
    size_bytes: int
    used_s: float
    state: str


def cached_models(environ: Mapping[str, str]) -> list[CachedModel]:
    """All models in the caches of Hugging Face and ModelScope, and those that clients made, sorted by name."""
    found = [*_hugging_face(hf_cache(environ))]
    scope = modelscope_cache(environ)
    bases = {scope, scope.parent, *((scope.parent / "hub", scope.parent / "hub" / "models"))}
    for base in sorted(bases):
        found += _modelscope(base)
    found += [_model(name, CREATED, (folder,), "") for name, folder in created_models()]
    return sorted(found, key=lambda model: (model.name.lower(), model.cache))


def remove(model: CachedModel) -> None:
    """Delete it, unless it is being fetched."""
    if model.cache == CREATED:
        remove_created(model.folders[0])
        return
    lock = model.folders[0] / ".pagoda" / "lock" if model.cache == "huggingface" else _work(model.folders[0]) / "lock"
    with owned(lock, model.name):
        for folder in model.folders:
            try:
                # A model that is removed half way must not look like one.
                doomed = folder.with_name(f".removed-{os.getpid()}-{folder.name}")
                os.rename(folder, doomed)
                shutil.rmtree(doomed)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise ModelError(f"{folder} cannot be removed: {error.strerror}", remedy=f"rm -r {folder}") from None


def _hugging_face(cache: Path) -> Iterator[CachedModel]:
    for folder in _folders(cache):
        parts = folder.name.split("--")
        if parts[0] != "models" or len(parts) < 2:
            continue
        snapshots = _folders(folder / "snapshots")
        if any(is_complete(snapshot) for snapshot in snapshots):
            state = ""
        else:
            state = "not finished" if (folder / ".pagoda" / "partial").is_dir() else "incomplete"
        yield _model("/".join(parts[1:]), "huggingface", (folder,), state)


def _modelscope(base: Path) -> Iterator[CachedModel]:
    for owner in _folders(base):
        if "--" in owner.name and any(is_complete(snapshot) for snapshot in _folders(owner / "snapshots")):
            yield _model(owner.name.replace("--", "/", 1), "modelscope", (owner,), "")
        for folder in _folders(owner):
            name = folder.name.removeprefix(".pagoda-")
            target = owner / name
            if folder != target and target.is_dir():
                continue
            own = (target, _work(target)) if _work(target).is_dir() else (target,)
            if folder != target:
                if not (folder / "partial").is_dir():
                    continue
                yield _model(f"{owner.name}/{name.replace('___', '.')}", "modelscope", own, "not finished")
            elif is_complete(folder):
                yield _model(f"{owner.name}/{name.replace('___', '.')}", "modelscope", own, "")


def _work(folder: Path) -> Path:
    return folder.parent / f".pagoda-{folder.name}"


def _folders(place: Path) -> list[Path]:
    try:
        return sorted(path for path in place.iterdir() if path.is_dir() and not path.name.startswith(".removed-"))
    except OSError:
        return []


def _model(name: str, cache: str, folders: tuple[Path, ...], state: str) -> CachedModel:
    size_bytes, used_s, counted = 0, 0.0, set()
    for folder in folders:
        for root, _, names in os.walk(folder):
            for path in (os.path.join(root, name) for name in names):
                try:
                    stat = os.lstat(path)
                except OSError:
                    continue
                if stat.st_ino not in counted and not os.path.islink(path):
                    counted.add(stat.st_ino)
                    # Partial files are as long as the whole will be; what they take is told by their blocks.
                    size_bytes += min(stat.st_size, stat.st_blocks * 512)
                    used_s = max(used_s, stat.st_atime, stat.st_mtime)
    return CachedModel(name, cache, folders, size_bytes, used_s, state)
