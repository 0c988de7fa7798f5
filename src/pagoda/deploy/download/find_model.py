"""Where a model is on this machine: a path, or a hub name that the Hugging Face or ModelScope cache holds."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from pagoda.deploy.download.choose import pick_gguf
from pagoda.deploy.download.created import created_model
from pagoda.deploy.download.hub import split_name
from pagoda.deploy.download.layout import hf_folder
from pagoda.errors import ConfigError, ModelError
from pagoda.weights.pytorch import PT_INDEX
from pagoda.weights.safetensors import INDEX

_SHARD = re.compile(r"-\d{5}-of-(\d{5})\.(safetensors|gguf|bin)$")


def find_model(name: str, environ: Mapping[str, str]) -> str:
    """The local path of a model; ModelError with what to type where there is none."""
    path = Path(name).expanduser()
    if path.exists():
        if not os.access(path, os.R_OK):
            raise ModelError(f"{path} is not readable by this user", remedy=f"Allow it: sudo chmod -R a+rX {path}")
        return str(path)
    if (created := created_model(name)) is not None:
        return created
    split = split_name(name)
    if split is None:
        raise ModelError(f"There is no file or folder {path}", remedy=_similar(path))
    found = cached_model(name, environ) or next((str(f) for f in _cached(split[0], environ) if _has_config(f)), None)
    if found is None:
        raise ModelError(
            f"{name} is neither a folder here nor in the Hugging Face or ModelScope cache",
            remedy=f"Fetch it, where there is a network: pagoda pull {name}",
        )
    return found


def cached_model(name: str, environ: Mapping[str, str], revision: str | None = None) -> str | None:
    """The path of a model of which all weights are in a cache: a folder, or the GGUF file that was named."""
    if (created := created_model(name)) is not None:
        return created
    split = split_name(name)
    if split is None:
        return None
    repo, part = split
    for folder in _cached(repo, environ, revision):
        if part is None and is_complete(folder):
            return str(folder)
        if part is not None and folder.is_dir():
            try:
                pieces = pick_gguf([str(p.relative_to(folder)) for p in folder.rglob("*.gguf")], part, repo)
            except ModelError:
                continue
            if _all_pieces(pieces):
                return str(folder / pieces[0])
    return None


def is_complete(folder: Path) -> bool:
    """True if the folder has a model's weights, in all their pieces."""
    names = [p.name for p in folder.iterdir() if p.exists()] if folder.is_dir() else []
    tensors = [name for name in names if name.endswith(".safetensors")]
    ggufs = [name for name in names if name.endswith(".gguf")]
    index_name = INDEX if tensors or ggufs else PT_INDEX
    if not tensors and not ggufs:
        tensors = [name for name in names if name.startswith("pytorch_model") and name.endswith(".bin")]
    if "config.json" not in names or not tensors:
        return _all_pieces(ggufs)
    if index_name in names:
        try:
            index = json.loads((folder / index_name).read_bytes())["weight_map"]
            return set(index.values()) <= set(names)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False
    return _all_pieces(tensors)


def _all_pieces(names: list[str]) -> bool:
    """True if there is a file, and no numbered piece of one is missing."""
    pieces: dict[str, int] = {}
    for name in names:
        pieces[_SHARD.sub(r"-of-\1", name)] = pieces.get(_SHARD.sub(r"-of-\1", name), 0) + 1
    return bool(names) and all(
        count == int(match[1]) for name, count in pieces.items() if (match := re.search(r"-of-(\d{5})$", name))
    )


def check_format(path: str, load_format: str, quantization: str | None) -> None:
    """Refuse a --load-format or --quantization that contradicts the files at `path`."""
    folder = Path(path)
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else [folder.name]
    formats = (("safetensors", (".safetensors",)), ("gguf", (".gguf",)), ("pt", (".bin", ".pt", ".pth")))
    found = next((format for format, ends in formats if any(name.endswith(ends) for name in names)), "gguf")
    for flag, wanted in (("--load-format", load_format), ("--quantization", quantization)):
        if wanted in ("safetensors", "gguf", "pt") and wanted != found:
            raise ConfigError(f"{flag} {wanted}: the weights in {path} are {found}", remedy=f"Leave {flag} out")


def _cached(repo: str, environ: Mapping[str, str], revision: str | None = None) -> Iterator[Path]:
    """Folders of the caches that may hold this model, the best first."""
    owner, short = repo.split("/")
    scope = Path(environ.get("MODELSCOPE_CACHE") or os.path.expanduser("~/.cache/modelscope"))
    yield from _snapshots(hf_folder(repo, environ), revision)
    yield from _snapshots(scope / "models" / f"{owner}--{short}", revision)
    for base in (scope, scope / "models", scope / "hub", scope / "hub" / "models"):
        if revision in (None, "main", "master"):
            yield base / owner / short.replace(".", "___")
            yield base / owner / short


def _snapshots(repo: Path, revision: str | None) -> list[Path]:
    """The snapshots of a cached repository: the one `main` points at first, then the newest; or that of `revision`."""
    try:
        found = sorted((repo / "snapshots").iterdir(), key=lambda p: p.stat().st_mtime, reverse=True)
        ref = repo / "refs" / (revision or "main")
        named = ref.read_text().strip() if ref.is_file() else revision
    except OSError:
        return []
    return [p for p in found if p.name == named] if revision else sorted(found, key=lambda p: p.name != named)


def _has_config(folder: Path) -> bool:
    return (folder / "config.json").exists()


def _similar(path: Path) -> str:
    parent = path.parent
    names = [p.name for p in parent.iterdir()] if parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, 1, 0.6)
    if near:
        return f"Did you mean {parent / near[0]}?"
    return f"See what is there: ls {parent}" if parent.is_dir() else f"The folder {parent} does not exist either"
