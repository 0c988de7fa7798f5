"""`pagoda pack`: a model and all that serves it in one file, which installs itself where there is no network."""

from __future__ import annotations

import json
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pagoda import __version__
from pagoda.arch.memory import size_text
from pagoda.deploy.download.failures import DiskFailed
from pagoda.deploy.pack.answer import MANIFEST, record
from pagoda.deploy.pack.archive import Part, Parts, Progress, Tar, header, header_bytes, part_path
from pagoda.deploy.pack.files import Member, model_members, package_members, python_members
from pagoda.deploy.pack.libraries import Linked, link
from pagoda.errors import ConfigError

LAUNCHER = """\
#!/bin/sh
# Starts the Pagoda of this folder with its own Python, whatever this machine has.
self=$(readlink -f "$0")
here=${self%/bin/pagoda}
unset PYTHONHOME PYTHONPATH
export PYTHONNOUSERSITE=1
case $here in */versions/*)
    # A service starts what is current when it starts; a running server keeps its own version.
    export PAGODA_LAUNCHER="${here%/versions/*}/current/bin/pagoda"
    [ ! -f "$here/serve.yaml" ] || export PAGODA_CONFIG="${PAGODA_CONFIG:-$here/serve.yaml}" ;;
esac
exec "$here/python/bin/python3" -m pagoda.cli.main "$@"
"""
HERE = "@HERE@"
"""Stands in the packed options for the folder in which the pack is installed."""

_VERSION_DIGITS = 12
_BLOCK = 4096
_MIB = 1 << 20
_ENTRY_BYTES = 2048  # of a file in the tar, in the manifest and in the sums, at the most


@dataclass(frozen=True, slots=True)
class Draft:
    """A draft model, and its folder in the pack."""

    model: Path
    folder: str

    @property
    def place(self) -> str:
        return _place(self.model, self.folder)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to pack. `options` are those of `pagoda serve`, without the model and without secrets."""

    name: str
    model: Path
    folder: str
    options: Mapping[str, Any]
    out: Path
    part_bytes: int | None = None
    answer: bool = True
    torch: bool = True
    draft: Draft | None = None
    encoder: Path | None = None

    @property
    def place(self) -> str:
        """Where the model is, below the folder of an installed version."""
        return _place(self.model, f"model/{self.folder}")

    def members(self) -> Iterator[Member]:
        yield from model_members(self.model, f"model/{self.folder}", beside=self.encoder is None)
        if self.encoder is not None:
            yield Member(encoder_place(self.folder, self.encoder), self.encoder)
        if self.draft is not None:
            yield from model_members(self.draft.model, self.draft.folder)


def encoder_place(folder: str, encoder: Path) -> str:
    """Where the image encoder that was named is; others lie beside their model."""
    return f"model/{folder}/mmproj/{encoder.name}"


def _place(model: Path, folder: str) -> str:
    return folder if model.is_dir() else f"{folder}/{model.name}"


@dataclass(frozen=True, slots=True)
class Packed:
    """What was written, and for whom. `engine_bytes`: Python and its packages; `torch_bytes` is a part of it."""

    parts: tuple[Part, ...]
    version: str
    machine: str
    glibc: str
    installed_bytes: int
    engine_bytes: int
    torch_bytes: int
    model_bytes: int
    missing: Mapping[str, str]
    answer: Mapping[str, Any] | None


def below(limit_bytes: int) -> int:
    """The size of parts that are smaller than the limit: FAT's is a byte less than 4 GiB."""
    if limit_bytes < 2 * _MIB:
        raise ConfigError("--split: parts are at least 2 MiB large", remedy="Such as: --split 4GiB")
    return (limit_bytes - 1) // _MIB * _MIB


def pack(plan: Plan, progress: Progress) -> Packed:
    """Write the pack; its files appear when they are complete."""
    first = part_path(plan.out, 1, split=plan.part_bytes is not None)
    if first.exists():
        raise ConfigError(f"{first} is there already", remedy="Remove it, or give another name: -o FILE")
    model = list(plan.members())
    with tempfile.TemporaryDirectory(prefix="pagoda-pack-") as scratch:
        linked = link([*python_members(), *package_members(torch=plan.torch), *model], Path(scratch))
        total = sum(member.size for member in linked.members)
        room = total + _ENTRY_BYTES * len(linked.members)
        try:
            plan.out.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(plan.out.parent).free
            if free < room:
                raise DiskFailed(f"{size_text(room)} are needed in {plan.out.parent}, {size_text(free)} are free",
                                 remedy="Make room, or write to another disk: -o FILE")  # fmt: skip
            answer = None
            if plan.answer:
                progress("answer", 0.0, "asking the model, to record its answer")
                answer = record(plan.model, plan.options)
            most_parts = 1 if plan.part_bytes is None else room // plan.part_bytes + 2
            return write(plan, linked, answer, header_bytes(most_parts), progress)
        except OSError as error:
            why = error.strerror or str(error)
            raise DiskFailed(f"Cannot pack {error.filename or plan.out}: {why}", remedy="Free some space, or write to "
                             "another disk: -o FILE") from None  # fmt: skip


def write(plan: Plan, linked: Linked, answer: Mapping[str, Any] | None, room: int, progress: Progress) -> Packed:
    """Write the members and what tells of them, with `room` bytes for the header; remove what is half on an error."""
    parts = Parts(plan.out, plan.part_bytes, room)
    total = sum(member.size for member in linked.members)
    glibc = ".".join(map(str, linked.glibc))
    try:
        tar = Tar(parts, total, progress)
        tar.add_text("bin/pagoda", LAUNCHER, executable=True)
        tar.add_text(
            "serve.yaml.in", yaml.safe_dump({"model": f"{HERE}/{plan.place}", **plan.options}, sort_keys=False)
        )
        for member in linked.members:
            tar.add(member)
        facts = {
            "format": 1,
            "pagoda": __version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "glibc": glibc,
            "model": plan.place,
            "options": dict(plan.options),
            "answer": answer,
            "files": [{"path": path, "size": size, "sha256": sha256} for path, size, sha256 in tar.files],
        }
        tar.add_text(MANIFEST, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
        sums, count = tar.add_sums()
        needed = installed_bytes(linked.members)
        values = {
            "NAME": plan.name,
            "VERSION": sums[:_VERSION_DIGITS],
            "MACHINE": platform.machine(),
            "GLIBC": glibc,
            "NEED_KB": str(needed // 1024),
            "FILES": str(count),
            "SUMS": sums,
            "SPLIT": str(int(plan.part_bytes is not None)),
        }
        parts.publish(header(values, parts.parts(), room))
    except BaseException:
        parts.discard()
        raise
    return _packed(linked, parts, values["VERSION"], needed, answer)


def _packed(linked: Linked, parts: Parts, version: str, needed: int, answer: Mapping[str, Any] | None) -> Packed:
    sizes: dict[str, int] = {"engine": 0, "torch": 0, "model": 0}
    for member in linked.members:
        sizes["model" if member.path.startswith(("model/", "draft/")) else "engine"] += member.size
        sizes["torch"] += member.size if any(f"-packages/{name}" in member.path for name in _CUDA) else 0
    return Packed(
        parts=tuple(parts.parts()),
        version=version,
        machine=platform.machine(),
        glibc=".".join(map(str, linked.glibc)),
        installed_bytes=needed,
        engine_bytes=sizes["engine"],
        torch_bytes=sizes["torch"],
        model_bytes=sizes["model"],
        missing=linked.missing,
        answer=answer,
    )


_CUDA = ("torch", "triton", "nvidia")


def installed_bytes(members: Sequence[Member]) -> int:
    """Room on the disk, in whole blocks, with the compiled modules, which are as large as their sources."""
    modules = sum(member.size for member in members if member.path.endswith(".py"))
    blocks = sum(-(-member.size // _BLOCK) * _BLOCK for member in members)
    return blocks + modules + modules // 2 + _ENTRY_BYTES * len(members)
