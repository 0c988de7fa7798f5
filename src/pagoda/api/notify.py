"""Tells systemd, or whoever else keeps the server running, how it is: the datagrams of sd_notify."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Mapping

BEATS_PER_LIMIT = 4
STATUS_S = 10.0
_PROGRESS_S = 1.0


class Notifier:
    """Sends to `$NOTIFY_SOCKET`; without one it does nothing. `limit_s` is after how long a silence kills us."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._address = _address(environ.get("NOTIFY_SOCKET", ""))
        self.limit_s = _limit_s(environ) if self._address else None
        self._loading_at = 0.0

    def send(self, **fields: object) -> None:
        """One message. Who keeps us may be gone, or slow: that must not stop the server."""
        if self._address is None:
            return
        text = "\n".join(f"{name}={str(value).replace(chr(10), ' ')}" for name, value in fields.items())
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
                out.setblocking(False)
                out.sendto(text.encode(), self._address)
        except OSError:
            return

    def loading(self, phase: str, share: float) -> None:
        """How far loading is; not more often than somebody would read it."""
        now = time.monotonic()
        if self._address is not None and now - self._loading_at >= _PROGRESS_S:
            self._loading_at = now
            self.send(STATUS=f"loading: {phase} {share:.0%}")

    async def beat(self, healthy: Callable[[], bool], status: Callable[[], str]) -> None:
        """Say again and again that all is well, for as long as it is."""
        if self._address is None:
            return
        while True:
            sign = {"WATCHDOG": 1} if self.limit_s is not None and healthy() else {}
            self.send(**sign, STATUS=status())
            await asyncio.sleep(STATUS_S if self.limit_s is None else min(STATUS_S, self.limit_s / BEATS_PER_LIMIT))


def _address(name: str) -> str | None:
    """The socket's address: a path, or an abstract name, which is written with @ in front."""
    if name.startswith("@"):
        return "\0" + name[1:]
    return name if name.startswith("/") else None


def _limit_s(environ: Mapping[str, str]) -> float | None:
    """The watchdog's limit, if it is meant for this process."""
    limit_us, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not limit_us.isdigit() or int(limit_us) == 0 or pid not in ("", str(os.getpid())):
        return None
    return int(limit_us) / 1e6
