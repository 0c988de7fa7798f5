"""What the real server tells who keeps it: ready when it is, alive while its engine is, and the log in its file."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pagoda.api.notify import Notifier

LIMIT_S = 4.0
PATIENCE_S = 120.0


class Keeper:
    """A notify socket as systemd makes it, and the server that talks to it."""

    def __init__(self, folder: Path, *words: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(folder / "notify"))
        environ = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "NOTIFY_SOCKET": str(folder / "notify"),
            "WATCHDOG_USEC": str(int(LIMIT_S * 1e6)),
        }
        command = [sys.executable, "-m", "pagoda.cli.main", "serve", *words]
        self.process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.heard: list[tuple[float, str]] = []

    def until(self, wanted: str) -> float:
        """When a line that begins so was heard."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            self._socket.settimeout(max(0.01, deadline - time.monotonic()))
            lines = self._socket.recv(4096).decode().split("\n")
            now = time.monotonic()
            self.heard += [(now, line) for line in lines]
            if any(line.startswith(wanted) for line in lines):
                return now
        raise TimeoutError(wanted)

    def skip(self) -> None:
        """Forget what waits in the socket."""
        self._socket.setblocking(False)
        try:
            while True:
                self._socket.recv(4096)
        except BlockingIOError:
            return

    def engine(self) -> psutil.Process:
        (child,) = psutil.Process(self.process.pid).children()
        return child

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self._socket.close()


@pytest.fixture
def keeper(smollm2_path: str, tmp_path: Path) -> Iterator[Keeper]:
    words = ("--port", "0", "--max-model-len", "256", "--threads", "1", "--log-file", str(tmp_path / "logs" / "x.log"))
    made = Keeper(tmp_path, smollm2_path, *words)
    yield made
    made.close()


@pytest.mark.alone
def test_ready_then_alive_silent_while_the_engine_hangs_then_alive_again(keeper: Keeper, tmp_path: Path) -> None:
    keeper.until("READY=1")
    before = [line for _, line in keeper.heard]
    assert any(line.startswith("STATUS=loading: ") for line in before) and "WATCHDOG=1" not in before
    keeper.until("WATCHDOG=1")
    assert any(line == "STATUS=0 running, 0 waiting, 0 tokens generated" for _, line in keeper.heard)
    engine = keeper.engine()
    time.sleep(LIMIT_S / 2)  # it has answered pings: now it is known to be idle
    engine.suspend()
    stopped = time.monotonic()
    keeper.skip()
    # The server notices by itself, and starts another engine before systemd would end it all.
    while keeper.until("WATCHDOG=1") and engine.is_running() and engine.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() - stopped < LIMIT_S
    assert keeper.engine().pid != engine.pid
    keeper.until("STATUS=0 running")
    keeper.process.send_signal(signal.SIGTERM)
    keeper.until("STOPPING=1")
    assert keeper.process.wait(PATIENCE_S) == 0
    log = (tmp_path / "logs" / "x.log").read_text()
    assert "the engine gave no sign of life for 2 s; it is stopped" in log and "starts again" in log


def test_alive_is_not_said_for_an_engine_that_hangs(tmp_path: Path) -> None:
    import asyncio

    out = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    out.bind(str(tmp_path / "n"))
    out.settimeout(60)
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "n"), "WATCHDOG_USEC": "40000"})
    answers = iter([True, True, False, False])

    async def go() -> None:
        beating = asyncio.create_task(notifier.beat(lambda: next(answers), lambda: "x"))
        with pytest.raises(RuntimeError):  # the answers are at their end
            await beating

    asyncio.run(go())
    assert [out.recv(100) for _ in range(4)] == [b"WATCHDOG=1\nSTATUS=x"] * 2 + [b"STATUS=x"] * 2
    out.close()


def test_an_abstract_socket_a_lost_one_and_a_watchdog_of_another() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
        out.bind(f"\0pagoda-test-{os.getpid()}")
        notifier = Notifier({"NOTIFY_SOCKET": f"@pagoda-test-{os.getpid()}", "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1"})
        notifier.send(STATUS="one\nREADY=1")
        assert out.recv(100) == b"STATUS=one READY=1"
        assert notifier.limit_s is None
    notifier.send(READY=1)
    Notifier({}).send(READY=1)


def test_the_log_file_rotates(tmp_path: Path) -> None:
    path = tmp_path / "a" / "server.log"
    code = (
        "import logging, sys; from pagoda.observe import setup_logging; setup_logging('info', sys.argv[1], 1000, 2)\n"
        "for i in range(100): logging.getLogger('x').info('line %d of this log', i)"
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True, env=environ)
    names = sorted(p.name for p in path.parent.iterdir())
    assert names == ["server.log", "server.log.1", "server.log.2"]
    assert all(p.stat().st_size <= 1000 for p in path.parent.iterdir())
    assert path.read_text().splitlines()[-1].endswith("line 99 of this log")
