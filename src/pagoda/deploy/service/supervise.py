"""Keeps one server running where no systemd does: `python -m pagoda.deploy.service.supervise FOLDER`."""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

from pagoda.deploy.service.service import (
    HOPELESS_EXITS,
    MOST_STARTS,
    START_LIMIT_S,
    STARTS_WINDOW_S,
    WATCHDOG_S,
    Service,
    load,
    program,
    read_secrets,
)

LOG_FILE = "server.log"
STATE_FILE = "state.json"
LOG_BYTES = 20_000_000
LOGS_KEPT = 5
_LONGEST_BACKOFF_S = 60.0
_TICK_S = 0.5
_TRAILING_S = 2.0


class Supervisor:
    """Starts the server again when it ends with an error, or gives no sign of life, until that is no use."""

    def __init__(self, service: Service, *, watchdog_s: float = WATCHDOG_S, backoff_s: float = 1.0) -> None:
        self._service = service
        self._watchdog_s = watchdog_s
        self._backoff_s = backoff_s
        self._log = logging.handlers.RotatingFileHandler(
            service.folder / LOG_FILE, maxBytes=LOG_BYTES, backupCount=LOGS_KEPT, encoding="utf-8"
        )
        self._ends: deque[float] = deque()
        self._stop_at: float | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._restarts = 0
        self._word = ""
        self._since_s = 0.0

    def run(self) -> int:
        """Until a signal asks for the end, the server ends well, or it cannot be helped; the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: self._ask_to_stop())
        while True:
            code = self._one_life()
            if self._stop_at is not None or code == 0:
                self._tell("stopped")
                return 0
            if (reason := self._hopeless(code)) is not None:
                self._say(reason)
                self._tell("failed", reason)
                return code if code > 0 else 1
            delay_s = min(_LONGEST_BACKOFF_S, self._backoff_s * 2.0 ** (len(self._ends) - 1))
            self._say(f"the server ended ({_ending(code)}); it starts again in {delay_s:g} s")
            self._tell("starting", f"the last one ended with {_ending(code)}")
            until = time.monotonic() + delay_s
            while self._stop_at is None and time.monotonic() < until:
                time.sleep(_TICK_S / 5)
            self._restarts += 1

    def _hopeless(self, code: int) -> str | None:
        now = time.monotonic()
        self._ends.append(now)
        while now - self._ends[0] > STARTS_WINDOW_S:
            self._ends.popleft()
        if code in HOPELESS_EXITS:
            return f"the server ended with exit code {code}: starting it again would not help"
        if len(self._ends) > MOST_STARTS:
            return f"the server ended {len(self._ends)} times in {STARTS_WINDOW_S // 60} minutes, last {_ending(code)}"
        return None

    def _ask_to_stop(self) -> None:
        """The first signal lets running requests finish; a second one is passed on too, and ends it at once."""
        self._stop_at = self._stop_at or time.monotonic() + self._service.stop_s
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()

    def _one_life(self) -> int:
        if self._stop_at is not None:
            return 0
        command = [*program(os.environ), "serve", "--config", str(self._service.options_path)]
        with (
            tempfile.TemporaryDirectory(prefix="pagoda-") as folder,
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices,
        ):
            notices.bind(f"{folder}/notify")
            environ = {
                **os.environ,
                **read_secrets(self._service.secrets_path),
                "PYTHONUNBUFFERED": "1",
                "NOTIFY_SOCKET": f"{folder}/notify",
                "WATCHDOG_USEC": str(int(self._watchdog_s * 1e6)),
            }
            with subprocess.Popen(
                command, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            ) as process:
                self._process = process
                self._tell("starting")
                if self._stop_at is not None:  # the signal came while it was started
                    process.terminate()
                self._attend(process, notices)
        return process.returncode

    def _attend(self, process: subprocess.Popen[bytes], notices: socket.socket) -> None:
        """Log what it prints and hear what it tells, until it has ended."""
        if process.stdout is None:
            raise RuntimeError("the server's output is no pipe")
        heard_at, limit_s, half = time.monotonic(), float(START_LIMIT_S), b""
        with selectors.DefaultSelector() as ready:
            ready.register(process.stdout, selectors.EVENT_READ)
            ready.register(notices, selectors.EVENT_READ)
            ended_at: float | None = None
            while ended_at is None or (ready.get_map() and time.monotonic() < ended_at + _TRAILING_S):
                keys = [key.fileobj for key, _ in ready.select(_TICK_S)]
                if process.stdout in keys:
                    piece = os.read(process.stdout.fileno(), 1 << 16)
                    *lines, half = (half + piece).split(b"\n")
                    for line in lines:
                        self._write(line)
                    if not piece:
                        ready.unregister(process.stdout)
                        ready.unregister(notices)
                if notices in keys and self._hear(notices.recv(1 << 12).decode("utf-8", "replace")):
                    heard_at, limit_s = time.monotonic(), self._watchdog_s
                if process.poll() is not None:
                    ended_at = ended_at or time.monotonic()
                elif time.monotonic() - heard_at > limit_s:
                    self._say(f"the server gave no sign of life for {limit_s:g} s; it is stopped")
                    process.kill()
                elif self._stop_at is not None and time.monotonic() > self._stop_at:
                    process.kill()
        if half:
            self._write(half)

    def _hear(self, text: str) -> bool:
        """Take in one notice; True if it is a sign of life."""
        told = dict(line.split("=", 1) for line in text.split("\n") if "=" in line)
        if "STATUS" in told or "READY" in told:
            word = "running" if "READY" in told or self._word == "running" else "starting"
            self._tell("stopping" if "STOPPING" in told else word, told.get("STATUS", ""))
        return "READY" in told or "WATCHDOG" in told

    def _tell(self, word: str, detail: str = "") -> None:
        """Write down how it is, for `pagoda service status`."""
        if word != self._word:
            self._since_s = time.time()
        self._word = word
        pid = self._process.pid if self._process is not None and self._process.returncode is None else None
        state = {
            "supervisor": os.getpid(),
            "pid": pid,
            "word": word,
            "since_s": self._since_s,
            "restarts": self._restarts,
            "detail": detail,
        }
        path = self._service.folder / STATE_FILE
        path.with_suffix(".new").write_text(json.dumps(state), "utf-8")
        path.with_suffix(".new").replace(path)

    def _say(self, text: str) -> None:
        self._write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} error   {text}".encode())

    def _write(self, line: bytes) -> None:
        text = line.decode("utf-8", "replace").rstrip("\r")
        record = logging.LogRecord("server", logging.INFO, "", 0, "%s", (text,), None)
        self._log.emit(record)
        with contextlib.suppress(OSError):  # the terminal may be gone
            print(text, flush=True)


def _ending(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


if __name__ == "__main__":
    sys.exit(Supervisor(load(Path(sys.argv[1]))).run())
