"""Small packs with a stand-in for Python, to try the installer on; the real one is tried in test_pack_real.py."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from pagoda.deploy.pack.archive import header_bytes
from pagoda.deploy.pack.files import PYTHON, Member
from pagoda.deploy.pack.libraries import Linked
from pagoda.deploy.pack.pack import Packed, Plan, write

# It "answers" as the model's file says: with 0 for the recorded answer.
STAND_IN = """\
#!/bin/sh
case "$*" in
*--version) echo 0 ;;
*"pack --answer "*) exit "$(cat "${5}/model/tiny/exit")" ;;
*compileall*) ;;
*) echo "$PAGODA_CONFIG $PAGODA_LAUNCHER [$PYTHONPATH] $*" ;;
esac
"""


def quiet(phase: str, share: float, note: str = "") -> None: ...


def small_pack(
    folder: Path,
    name: str = "tiny.pagoda",
    *,
    exit: int = 0,
    files: int = 20,
    glibc: tuple[int, int] = (2, 17),
    **more: Any,
) -> Packed:
    """Write a pack of `files` small files below `folder`."""
    source = folder / f"{name}.source"
    (source / "model").mkdir(parents=True)
    (source / "python3").write_text(STAND_IN)
    (source / "model" / "exit").write_text(str(exit))
    for i in range(files):
        (source / "model" / f"{i}.bin").write_bytes(name.encode() + os.urandom(3000 + i))
    members = [Member(PYTHON, source / "python3", executable=True)]
    members += [Member(f"model/tiny/{path.name}", path) for path in sorted((source / "model").iterdir())]
    plan = Plan(name="tiny", model=source / "model", folder="tiny", options={"port": 8123}, out=folder / name, **more)
    return write(plan, Linked(tuple(members), glibc, {}), None, header_bytes(64), quiet)


def sh(*words: str | Path, shell: str = "sh", **more: Any) -> subprocess.CompletedProcess[str]:
    """Run a script; what it says on both streams is in `stdout`."""
    command = [*shell.split(), *map(str, words)]
    return subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300, **more)


def shells() -> list[str]:
    """The shells of this machine that may be `sh` on another."""
    return [one for one in ("dash", "bash --posix", "busybox sh") if shutil.which(one.split()[0])]
