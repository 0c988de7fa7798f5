"""Where a model is on this machine: a path, or a hub name that the Hugging Face or ModelScope cache holds."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from pagoda.errors import ConfigError, ModelError

# Owner and name; two dots in a row would let a name climb out of the cache.
_HUB_NAME = re.compile(r"(?!.*\.\.)[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def find_model(name: str, environ: Mapping[str, str]) -> str:
    """The local path of a model; ModelError with what to type where there is none."""
    path = Path(name).expanduser()
    if path.exists():
        if not os.access(path, os.R_OK):
            raise ModelError(f"{path} is not readable by this user", remedy=f"Allow it: sudo chmod -R a+rX {path}")
        return str(path)
    if _HUB_NAME.fullmatch(name) and not name.endswith(".gguf"):
        for folder in _cached(name, environ):
            return str(folder)
        raise ModelError(
            f"{name} is neither a folder here nor in the Hugging Face or ModelScope cache, "
            "and Pagoda does not download models yet",
            remedy=f"Fetch it with: hf download {name} --local-dir ./{name.split('/')[1]}  "
            f"then: pagoda serve ./{name.split('/')[1]}",
        )
    raise ModelError(f"There is no file or folder {path}", remedy=_similar(path))


def check_format(path: str, load_format: str, quantization: str | None) -> None:
    """Refuse a --load-format or --quantization that contradicts the files at `path`."""
    folder = Path(path)
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else [folder.name]
    found = "safetensors" if any(n.endswith(".safetensors") for n in names) else "gguf"
    for flag, wanted in (("--load-format", load_format), ("--quantization", quantization)):
        if wanted in ("safetensors", "gguf") and wanted != found:
            raise ConfigError(f"{flag} {wanted}: the weights in {path} are {found}", remedy=f"Leave {flag} out")


def _cached(name: str, environ: Mapping[str, str]) -> Iterator[Path]:
    """Folders of the caches that hold this model, complete enough to be opened, the best first."""
    owner, short = name.split("/")
    home = environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    hf_home = environ.get("HF_HOME") or f"{home}/huggingface"
    hub = Path(environ.get("HF_HUB_CACHE") or f"{hf_home}/hub") / f"models--{owner}--{short}"
    scope = Path(environ.get("MODELSCOPE_CACHE") or os.path.expanduser("~/.cache/modelscope"))
    folders = [*_snapshots(hub), *_snapshots(scope / "models" / f"{owner}--{short}")]
    for base in (scope, scope / "models", scope / "hub", scope / "hub" / "models"):
        folders += [base / owner / short.replace(".", "___"), base / owner / short]
    yield from (folder for folder in folders if _has_model(folder))


def _snapshots(repo: Path) -> list[Path]:
    """The snapshots of a cached repository: the one `main` points at first, then the newest."""
    try:
        found = sorted((repo / "snapshots").iterdir(), key=lambda p: p.stat().st_mtime, reverse=True)
        main = (repo / "refs" / "main").read_text().strip() if (repo / "refs" / "main").exists() else ""
    except OSError:
        return []
    return sorted(found, key=lambda p: p.name != main)


def _has_model(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    return (folder / "config.json").exists() or any(folder.glob("*.gguf"))


def _similar(path: Path) -> str:
    parent = path.parent
    names = [p.name for p in parent.iterdir()] if parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, 1, 0.6)
    if near:
        return f"Did you mean {parent / near[0]}?"
    return f"See what is there: ls {parent}" if parent.is_dir() else f"The folder {parent} does not exist either"
