"""Services in tmux: for people without root and without systemd."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from pagoda.deploy.service.boot import not_at_boot, start_at_boot
from pagoda.deploy.service.service import LAUNCHER_VARIABLE, Service, State, call
from pagoda.deploy.service.supervise import LOG_FILE, STATE_FILE
from pagoda.errors import ConfigError

SOCKET = "pagoda"
_INSTALL = "Install it: sudo apt-get install tmux, or conda install -c conda-forge tmux"
_TMUX = ("tmux", "-L", SOCKET, "-f", "/dev/null")


class Tmux:
    """One session for each service, on a socket of its own; in it a supervisor, which starts the server again."""

    def check(self) -> None:
        if shutil.which("tmux") is None:
            raise ConfigError("tmux is not installed", remedy=_INSTALL)

    def files(self, service: Service) -> Mapping[Path, str]:
        return {}

    def enable(self, service: Service) -> str:
        try:
            start_at_boot(service)
        except ConfigError as error:
            return f"Nothing starts it at boot: {error.message}."
        return "It starts at boot, by a line in your crontab."

    def start(self, service: Service) -> None:
        if self._supervisor(service) is not None:
            return
        # The tmux server keeps the environment of its first start: what Python needs is given to each session.
        path = os.pathsep.join(os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p)
        needed = {"PYTHONPATH": path, LAUNCHER_VARIABLE: os.environ.get(LAUNCHER_VARIABLE)}
        given = [word for name, value in needed.items() if value for word in ("-e", f"{name}={value}")]
        command = (sys.executable, "-m", "pagoda.deploy.service.supervise", str(service.folder))
        (service.folder / STATE_FILE).unlink(missing_ok=True)
        call(*_TMUX, "new-session", "-d", "-s", service.name, *given, *command, needs=_INSTALL)

    def stop(self, service: Service) -> None:
        supervisor = self._supervisor(service)
        if supervisor is None:
            return
        supervisor.send_signal(signal.SIGTERM)
        with contextlib.suppress(psutil.TimeoutExpired):
            supervisor.wait(service.stop_s + 5)
        with contextlib.suppress(ConfigError):  # the session ends with its command
            call(*_TMUX, "kill-session", "-t", f"={service.name}")

    def restart(self, service: Service) -> None:
        self.stop(service)
        self.start(service)

    def remove(self, service: Service) -> None:
        self.stop(service)
        with contextlib.suppress(ConfigError):  # of a user who may have no crontab
            not_at_boot(service)

    def state(self, service: Service) -> State:
        told = self._told(service)
        word = told.get("word", "stopped")
        if self._supervisor(service) is None:
            # Just started, it has not told yet.
            session = self._has_session(service) and not told
            return State(
                "starting" if session else word if word == "failed" else "stopped", detail=told.get("detail", "")
            )
        return State(word, told.get("pid"), told.get("since_s"), told.get("detail", ""))

    def tail(self, service: Service, lines: int) -> list[str]:
        try:
            with (service.folder / LOG_FILE).open(encoding="utf-8", errors="replace") as file:
                return [line.rstrip("\n") for line in deque(file, lines)]
        except FileNotFoundError:
            return []

    def follow(self, service: Service, lines: int) -> Sequence[str]:
        return ("tail", "-n", str(lines), "-F", str(service.folder / LOG_FILE))

    def _told(self, service: Service) -> dict[str, Any]:
        try:
            told: dict[str, Any] = json.loads((service.folder / STATE_FILE).read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        return told

    def _supervisor(self, service: Service) -> psutil.Process | None:
        """The supervisor's process, if it lives."""
        pid = self._told(service).get("supervisor")
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid) if pid else None
            if process is not None and str(service.folder) in process.cmdline():
                return process
        return None

    def _has_session(self, service: Service) -> bool:
        try:
            call(*_TMUX, "has-session", "-t", f"={service.name}")
        except ConfigError:
            return False
        return True
