"""Which files go into a pack: the interpreter, the packages that Pagoda needs, and the model."""

from __future__ import annotations

import base64
import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pagoda
from pagoda.deploy.download.choose import TEXTS, pick_gguf
from pagoda.errors import ConfigError, ModelError
from pagoda.weights.mmproj import preferred

DISTRIBUTION = "pagoda-llm"
PYTHON = "python/bin/python3"
_VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"
_NOT_STDLIB = (
    "test", "tests", "idlelib", "tkinter", "turtledemo", "lib2to3", "ensurepip", "pydoc_data", "config-*",
    "__pycache__", "site-packages", "dist-packages",
)  # fmt: skip
# Modules that need a desktop or a directory service, and code that this machine runs at each start of Python.
_NOT_MODULES = (
    "*.a", "*.pyc", "_test*.so", "*_test.*.so", "_tkinter.*", "nis.*", "sitecustomize.py", "usercustomize.py",
    "EXTERNALLY-MANAGED",
)  # fmt: skip
# Where a package came from may hold a password in its address; installed commands hold this machine's paths.
_NOT_OF_PACKAGES = ("*/direct_url.json", "*.pyc", "../*", "*/REQUESTED", "*/INSTALLER")
_REQUIREMENT = re.compile(r"\s*([A-Za-z0-9._-]+)\s*(?:\[([^\]]*)\])?")
_EXTRA = re.compile(r"extra\s*==\s*['\"]([^'\"]+)['\"]")


@dataclass(frozen=True, slots=True)
class Member:
    """One file of the pack: `path` in it, where its bytes are now, and the SHA-256 that it must have, if known."""

    path: str
    source: Path
    executable: bool = False
    sha256: str | None = None

    @property
    def size(self) -> int:
        return self.source.stat().st_size


def python_members() -> Iterator[Member]:
    """The interpreter that runs this (that of the virtual environment's base), and its standard library."""
    base = Path(sys.base_prefix)
    program, library = base / "bin" / _VERSION, Path(sysconfig.get_path("stdlib"))
    if not program.is_file() or not library.is_relative_to(base):
        raise ConfigError(
            f"the Python in {base} is laid out in an unknown way",
            remedy="Make an environment with another Python (python3 -m venv), and install Pagoda into it",
        )
    yield Member(PYTHON, program, executable=True)
    yield from _below(library, f"python/{library.relative_to(base)}")


def _below(folder: Path, path: str) -> Iterator[Member]:
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            if not any(fnmatchcase(entry.name, pattern) for pattern in _NOT_STDLIB):
                yield from _below(entry, f"{path}/{entry.name}")
        elif entry.is_file() and not any(fnmatchcase(entry.name, pattern) for pattern in _NOT_MODULES):
            yield Member(f"{path}/{entry.name}", entry)


def package_members(*, torch: bool) -> Iterator[Member]:
    """Pagoda and all that it needs, of each package what its installer wrote down, with its hashes."""
    place = f"python/{_site()}"
    code = Path(pagoda.__file__).parent
    yield from _below(code, f"{place}/pagoda")
    for distribution in _closure({"cuda", "vision"} if torch else {"vision"}):
        yield from _of_distribution(distribution, place)


def _site() -> str:
    """Where the packed interpreter looks for packages, below its own folder: distributions disagree."""
    code = "import site; print(site.getsitepackages(['@'])[-1])"
    program = Path(sys.base_prefix) / "bin" / _VERSION
    done = subprocess.run([program, "-I", "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip().removeprefix("@/")


def _closure(extras: set[str]) -> list[importlib.metadata.Distribution]:
    """The distributions that Pagoda needs, with these extras, and that are installed; without Pagoda itself."""
    found: dict[str, importlib.metadata.Distribution] = {}
    open_: list[tuple[str, set[str]]] = [(DISTRIBUTION, extras)]
    seen: set[tuple[str, str]] = set()
    while open_:
        name, extras = open_.pop()
        for requirement in _requirements(name):
            wanted, _, marker = requirement.partition(";")
            match = _REQUIREMENT.match(wanted)
            if match is None or not set(_EXTRA.findall(marker)) <= extras or (match[0], marker) in seen:
                continue
            seen.add((match[0], marker))
            needed = re.sub(r"[-_.]+", "-", match[1]).lower()
            distribution = found.get(needed) or _distribution(needed)
            if distribution is not None:  # else it is for another system or Python
                found[needed] = distribution
                open_.append((needed, set((match[2] or "").replace(" ", "").split(","))))
    return [found[name] for name in sorted(found) if name != DISTRIBUTION]


def _requirements(name: str) -> Sequence[str]:
    found = _distribution(name)
    if found is not None:
        return found.requires or ()
    checkout = Path(pagoda.__file__).parents[2] / "pyproject.toml"  # run from its sources
    if name != DISTRIBUTION or not checkout.is_file():
        raise ConfigError(f"{name} is not installed as a package", remedy=f"Install it: pip install {name}")
    project = tomllib.loads(checkout.read_text("utf-8"))["project"]
    optional = project["optional-dependencies"]
    extra = [f"{one.partition(';')[0]}; extra == '{name}'" for name in ("cuda", "vision") for one in optional[name]]
    return [*project["dependencies"], *extra]


def _distribution(name: str) -> importlib.metadata.Distribution | None:
    """The one of this environment; a package may put others on the path, which are its own (Ray does)."""
    places = [place for place in sys.path if Path(place).name in ("site-packages", "dist-packages")]
    return next(iter(importlib.metadata.distributions(name=name, path=places)), None)


def _of_distribution(distribution: importlib.metadata.Distribution, place: str) -> Iterator[Member]:
    files = distribution.files
    if not files:
        raise ConfigError(
            f"the package {distribution.name} has no list of its files",
            remedy=f"Install it by pip: {_again(distribution)}",
        )
    for file in sorted(files, key=str):
        path = file.as_posix()
        if any(fnmatchcase(path, pattern) for pattern in _NOT_OF_PACKAGES):
            continue
        source = Path(str(distribution.locate_file(file)))
        if not source.is_file():
            raise ConfigError(f"{source} is missing", remedy=_again(distribution))
        digest = file.hash.value if file.hash is not None and file.hash.mode == "sha256" else None
        yield Member(f"{place}/{path}", source, os.access(source, os.X_OK), digest and _hex(digest))


def _hex(digest: str) -> str:
    return base64.urlsafe_b64decode(digest + "=" * (-len(digest) % 4)).hex()


def _again(distribution: importlib.metadata.Distribution) -> str:
    return f"{sys.executable} -m pip install --force-reinstall {distribution.name}=={distribution.version}"


def model_members(model: Path, place: str, *, beside: bool = True) -> Iterator[Member]:
    """The files of a model that are of use: weights, configuration, tokenizer, license; no others that lie there.

    `beside`: with the image encoder that lies beside a GGUF model.
    """
    folder = model if model.is_dir() else model.parent
    eyes = preferred([one.name for one in folder.glob("*.gguf")]) if beside else None
    if eyes is not None and (model.suffix == ".gguf" or not any(model.glob("*.safetensors"))):
        yield Member(f"{place}/{eyes}", folder / eyes)
    if not model.is_dir():
        for name in pick_gguf([one.name for one in model.parent.glob("*.gguf")], model.name, str(model)):
            yield Member(f"{place}/{name}", model.parent / name)
        return
    names = sorted(path.name for path in model.iterdir() if path.is_file() and not path.name.startswith("."))
    texts = [name for name in names if any(fnmatchcase(name, pattern) for pattern in TEXTS)]
    for name in dict.fromkeys((*texts, *_weights(model, names))):
        yield Member(f"{place}/{name}", model / name)
    for path in sorted(model.glob("[0-9]_*/*")):  # the further stages of a sentence-transformers model
        if path.suffix in (".json", ".safetensors"):
            yield Member(f"{place}/{path.relative_to(model)}", path)


def _weights(model: Path, names: Sequence[str]) -> Sequence[str]:
    tensors = [name for name in names if name.endswith(".safetensors")]
    if tensors:
        return [name for name in tensors if not name.startswith("consolidated")] or tensors
    if any(name.endswith(".gguf") for name in names):
        return pick_gguf(names, None, str(model))
    found = [name for name in names if name.startswith("pytorch_model") and name.endswith(".bin")]
    if not found:
        raise ModelError(f"{model} has no weights", remedy=f"See what is missing: pagoda check {model}")
    return found
