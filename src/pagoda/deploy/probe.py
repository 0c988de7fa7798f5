"""Facts about this machine, as the system tells them; what they mean is said in doctor.py."""

from __future__ import annotations

import contextlib
import email.utils
import os
import re
import shutil
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

_NVIDIA_TIMEOUT_S = 8
_NAME = {"User-Agent": "pagoda"}
CPU_FEATURES = ("avx2", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp", "i8mm", "sve")


@dataclass(frozen=True, slots=True)
class Gpu:
    """`holders`: (process id, name, MiB) of those that hold its memory."""

    index: int
    name: str
    total_mib: int
    used_mib: int
    driver: str
    holders: tuple[tuple[int, str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Gpus:
    """`error`: why there are none though the machine has some; `cuda`: the newest version that the driver can run."""

    gpus: tuple[Gpu, ...] = ()
    cuda: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a place in the network said. `skew_s`: how far our clock is before its own; None if it did not say."""

    name: str
    url: str
    reached: bool
    error: str = ""
    certificate_error: bool = False
    time_s: float = 0.0
    skew_s: float | None = None


def cpu_name_and_features() -> tuple[str, tuple[str, ...]]:
    """The processor's name, and which features it has of those that kernels use."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "", ()
    name = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.M)
    found = set(flags[1].split()) if flags else set()
    return name[1].strip() if name else "", tuple(f for f in CPU_FEATURES if f in found)


def is_wsl() -> bool:
    try:
        return "microsoft" in Path("/proc/version").read_text().lower()
    except OSError:
        return False


def has_nvidia_device() -> bool:
    if any(Path("/dev").glob("nvidia[0-9]*")):
        return True
    ids = Path("/sys/bus/pci/devices").glob("*/vendor")
    with contextlib.suppress(OSError):
        # 0x03: display controllers; NVIDIA makes network cards too
        return any(
            path.read_text().strip() == "0x10de" and (path.parent / "class").read_text().startswith("0x03")
            for path in ids
        )
    return False


def nvidia_gpus() -> Gpus:
    """What nvidia-smi says; nothing where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return Gpus()
    try:
        table = _nvidia(program, "--query-gpu=index,name,memory.total,memory.used,driver_version,uuid")
        holders = _nvidia(program, "--query-compute-apps=gpu_uuid,pid,used_memory")
        header = subprocess.run([program], capture_output=True, text=True, timeout=_NVIDIA_TIMEOUT_S).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return Gpus(error=_said(error))
    cuda = re.search(r"CUDA[A-Z ]*Version:\s*([\d.]+)", header)
    return Gpus(tuple(_gpus(table, holders)), cuda[1] if cuda else "")


def _nvidia(program: str, query: str) -> list[list[str]]:
    command = [program, query, "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_NVIDIA_TIMEOUT_S, check=True)
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]


def _said(error: Exception) -> str:
    if isinstance(error, subprocess.TimeoutExpired):
        return f"nvidia-smi did not answer within {_NVIDIA_TIMEOUT_S} s"
    text = (error.stdout or error.stderr or "") if isinstance(error, subprocess.CalledProcessError) else str(error)
    return " ".join(text.split())[:200] or "nvidia-smi failed"


def _gpus(table: Iterable[list[str]], holders: Iterable[list[str]]) -> Iterable[Gpu]:
    by_gpu: dict[str, list[tuple[int, str, int]]] = {}
    for row in holders:
        if len(row) >= 3 and row[1].isdigit():
            by_gpu.setdefault(row[0], []).append((int(row[1]), process_name(int(row[1])), _number(row[2])))
    for row in table:
        if len(row) >= 6:
            holding = tuple(by_gpu.get(row[5], ()))
            yield Gpu(_number(row[0]), row[1], _number(row[2]), _number(row[3]), row[4], holding)


def _number(text: str) -> int:
    """A number of nvidia-smi, 0 for its `[N/A]`."""
    return int(text) if text.isdigit() else 0


def process_name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return "a process of another user or container"


def port_owner(port: int) -> str | None:
    """Who listens on a port: None if nobody, '' if somebody whom we may not see."""
    seen: str | None = None
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port:
                pid = connection.pid
                seen = f"{process_name(pid)}, process {pid}" if pid else seen or ""
    except (psutil.Error, OSError):
        return None
    return seen


def ask(places: Mapping[str, str], timeout_s: float) -> list[Answer]:
    """Ask all places at once whether they answer; none takes much longer than the timeout."""
    answers: dict[str, Answer] = {}

    def one(name: str, url: str) -> None:
        answers[name] = _ask(name, url, timeout_s)

    # Daemons: a name server that hangs cannot be interrupted, and must not hold us.
    threads = [threading.Thread(target=one, args=place, daemon=True) for place in places.items()]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 2 * timeout_s
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    late = f"no answer within {2 * timeout_s:g} s"
    return [answers.get(name) or Answer(name, url, False, late) for name, url in places.items()]


def _ask(name: str, url: str, timeout_s: float) -> Answer:
    started = time.monotonic()
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, method="HEAD", headers=_NAME), timeout=timeout_s
        ) as got:
            date = got.headers.get("Date")
    except urllib.error.HTTPError as error:
        date = error.headers.get("Date")  # it is there, and refuses HEAD or wants a key
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        text = str(getattr(reason, "strerror", None) or reason)
        return Answer(name, url, False, " ".join(text.split())[:160], isinstance(reason, ssl.SSLError))
    return Answer(name, url, True, time_s=time.monotonic() - started, skew_s=_skew(date))


def _skew(date: str | None) -> float | None:
    try:
        return time.time() - email.utils.parsedate_to_datetime(date or "").timestamp()
    except (ValueError, TypeError, OverflowError):
        return None


def clock_drift(sample_s: float = 0.05) -> float:
    """How much the wall clock moves against the monotonic one in a moment: far from 0 where somebody sets it."""
    wall, steady = time.time(), time.monotonic()
    time.sleep(sample_s)
    return (time.time() - wall) - (time.monotonic() - steady)


def writable(folder: Path) -> bool:
    """True if files can be made in the folder, or the folder itself can be made."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)
