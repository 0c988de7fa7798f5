"""What Triton compiles kernels with, before PyTorch is asked: a C compiler, Python's headers, a folder to keep them."""

from __future__ import annotations

import os
import shutil
import stat
import sysconfig
import tempfile
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from pagoda.errors import ConfigError

_CACHE = "TRITON_CACHE_DIR"
_INSTALL = "sudo apt-get install -y gcc libc6-dev"


def lacking(environ: Mapping[str, str]) -> ConfigError | None:
    """Why kernels that were not compiled before cannot be compiled here."""
    named = environ.get("CC")
    if named and shutil.which(named) is None:
        return ConfigError(
            f"GPU kernels need a C compiler, and CC={named} is no program that is here",
            remedy=f"unset CC, or install one: {_INSTALL}",
        )
    if not named and not (shutil.which("gcc") or shutil.which("clang")):
        return ConfigError(
            "GPU kernels need a C compiler (for the code that starts them), and there is no gcc or clang",
            remedy=f"Install one: {_INSTALL}",
        )
    headers = headers_folder()
    if not (headers / "Python.h").exists():
        version = sysconfig.get_python_version()
        return ConfigError(
            f"GPU kernels need the headers of Python {version}, and {headers} has no Python.h",
            remedy=f"Install them: sudo apt-get install -y python{version}-dev",
        )
    return None


def headers_folder() -> Path:
    scheme = sysconfig.get_default_scheme()
    # where Triton looks: Debian's own scheme names the folder of what is installed locally
    return Path(sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme))


def cache_folder(environ: Mapping[str, str]) -> Path:
    """Where Triton keeps what it has compiled."""
    home = environ.get("TRITON_HOME") or environ.get("HOME") or os.path.expanduser("~")
    return Path(environ.get(_CACHE) or Path(home, ".triton", "cache"))


def use_writable_cache(environ: MutableMapping[str, str]) -> Path:
    """Names Triton another folder, of this user alone, where it may not write its own."""
    folder = cache_folder(environ)
    if not _writable(folder):
        folder = Path(tempfile.gettempdir(), f"pagoda-triton-{os.getuid()}")
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            folder = Path(tempfile.mkdtemp(prefix="pagoda-triton-"))  # what others may write is never loaded
        environ[_CACHE] = str(folder)
    return folder


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
