"""What this machine can give right now: memory that is free, processors that we may use."""

from __future__ import annotations

import os
from pathlib import Path

import psutil


def free_memory_bytes() -> int:
    """Memory that can be taken without swapping, within the limit of the control group if there is one."""
    free = int(psutil.virtual_memory().available)
    limit = _read(Path("/sys/fs/cgroup/memory.max"))
    used = _read(Path("/sys/fs/cgroup/memory.current"))
    return free if limit is None or used is None else max(0, min(free, limit - used))


def _read(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def usable_cores() -> int:
    """Physical cores among the processors that this process may run on, within the control group's quota."""
    allowed = len(os.sched_getaffinity(0))
    cores = min(allowed, psutil.cpu_count(logical=False) or allowed)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return max(1, cores)
    return max(1, min(cores, int(quota) // int(period))) if quota.isdigit() else max(1, cores)
