"""One pull at a time for each model: a lock file with its owner in it, which also holds on network disks."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pagoda.deploy.download.failures import disk_failed
from pagoda.errors import ModelError

BEAT_S = 5.0
# An owner on another machine is taken for dead after this time without a sign of life.
DEAD_AFTER_S = 60.0


@contextmanager
def owned(path: Path, what: str) -> Iterator[None]:
    """Hold the lock; ModelError if somebody else does. The file of an owner that died is taken over."""
    mine = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid())})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _take(path, mine, what)
        except FileNotFoundError:
            # The owner before has just taken the empty folder away.
            path.parent.mkdir(parents=True, exist_ok=True)
            _take(path, mine, what)
    except OSError as error:
        raise disk_failed(error, path.parent) from None
    done = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, done), daemon=True)
    beat.start()
    try:
        yield
    finally:
        done.set()
        beat.join()
        path.unlink(missing_ok=True)
        with suppress(OSError):
            path.parent.rmdir()


def _take(path: Path, mine: str, what: str) -> None:
    # The file appears with its content, by a link that fails where there is one: flock says yes to all on some disks.
    own = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.{threading.get_ident()}")
    own.write_text(mine)
    try:
        for _ in range(10):
            try:
                os.link(own, path)
                return
            except FileExistsError:
                owner = _living_owner(path)
            if owner:
                raise ModelError(
                    f"{what} is being fetched by {owner}", remedy=f"Wait for it, or, if that is wrong, remove {path}"
                )
            # Moved away under a name of its own, so that of two heirs only one removes it.
            try:
                os.rename(path, f"{own}.dead")
                os.unlink(f"{own}.dead")
            except FileNotFoundError:
                continue
        raise ModelError(f"{what}: the lock {path} could not be taken", remedy=f"Remove it: rm {path}")
    finally:
        own.unlink(missing_ok=True)


def _living_owner(path: Path) -> str | None:
    """Who holds the lock, in words; None if nobody does any more."""
    try:
        text, age_s = path.read_text(), time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return None
    try:
        owner = json.loads(text)
        pid, host, started = int(owner["pid"]), str(owner["host"]), owner["started"]
    except (ValueError, TypeError, KeyError):
        return "somebody" if age_s < DEAD_AFTER_S else None
    if host == socket.gethostname():
        return f"process {pid}" if _started(pid) == started is not None else None
    return f"process {pid} on {host}" if age_s < DEAD_AFTER_S else None


def _started(pid: int) -> int | None:
    """When a process was started, in ticks since the machine was: a number that came again is another process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else int(fields[18])


def _beat(path: Path, done: threading.Event) -> None:
    while not done.wait(BEAT_S):
        try:
            os.utime(path)
        except OSError:
            return
