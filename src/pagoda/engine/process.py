"""The engine process, `python -m pagoda.engine.process FD`: one loop between a socket and an EngineCore."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable

import msgspec

from pagoda import heap
from pagoda.engine.core import EngineCore
from pagoda.engine.images import HeldImages
from pagoda.engine.messages import (
    Cancel,
    Forget,
    Framer,
    LoadFailed,
    Loading,
    Picture,
    Ping,
    ProtocolError,
    Ready,
    Shutdown,
    Step,
    Submit,
    ToEngine,
    frame,
)
from pagoda.errors import PagodaError
from pagoda.observe import setup_logging
from pagoda.options.engine_config import EngineConfig
from pagoda.types import Delta

BACKLOG_BYTES = 64 << 20
_READ_BYTES = 1 << 18
_PROGRESS_S = 0.05
_READS_AT_ONCE = 128
_AT_ONCE_S = 0.001
_PR_SET_PDEATHSIG = 1
_TURN_S = 0.0005  # that another thread, which reads a vocabulary, may hold the GIL when the loop wants it

_log = logging.getLogger(__name__)

CoreFactory = Callable[[EngineConfig, Callable[[str, float], None]], EngineCore]


class Gone(Exception):
    """The server has closed its end."""


class Wire:
    """Frames over a non-blocking socket. What the server does not read yet waits here, so sending never blocks."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._framer = Framer()
        self._out = bytearray()

    @property
    def full(self) -> bool:
        """So much waits that no more should be made."""
        return len(self._out) > BACKLOG_BYTES

    def send(self, message: object) -> None:
        self._out += frame(message)
        self._flush()

    def send_step(self, step: Step) -> None:
        """Send a step; where it is too large for one frame each delta goes alone, or ends with an error."""
        try:
            self.send(step)
        except ProtocolError:
            for delta in step.deltas:
                try:
                    self.send(Step([delta], step.stats))
                except ProtocolError:
                    error = "the log-probabilities of this prompt are too large to send; ask for fewer"
                    end = Delta(request_id=delta.request_id, finish_reason="error", error=error)
                    self.send(Step([end], step.stats))

    def receive(self, wait: bool) -> list[bytes]:
        """Frames that have come; with `wait`, sleep until something can be read or written. Raises Gone at the end."""
        if wait:
            select.select([self._sock], [self._sock] if self._out else [], [])
        self._flush()
        try:
            data = self._sock.recv(_READ_BYTES)
        except BlockingIOError:
            return []
        except OSError as error:
            raise Gone from error
        if not data:
            raise Gone
        frames = self._framer.feed(data)
        return frames if frames or not self._framer.partial else self._rest()

    def _rest(self) -> list[bytes]:
        """More of a large frame, as long as it comes at once: with one read for each step it would take many steps."""
        for _ in range(_READS_AT_ONCE):
            readable, _, _ = select.select([self._sock], [], [], _AT_ONCE_S)
            if not readable:
                break
            try:
                frames = self._framer.feed(self._sock.recv(_READ_BYTES))
            except OSError as error:
                raise Gone from error
            if frames:
                return frames
        return []

    def _flush(self) -> None:
        try:
            while self._out:
                del self._out[: self._sock.send(memoryview(self._out)[:_READ_BYTES])]
        except BlockingIOError:
            pass
        except OSError as error:
            raise Gone from error


def serve(wire: Wire, core: EngineCore) -> None:
    """Take in messages and compute steps until told to end. Without work it sleeps in the kernel."""
    decoder = msgspec.msgpack.Decoder(ToEngine)
    images = HeldImages()
    more = True  # to prepare
    while True:
        asked = False
        for data in wire.receive(wait=wire.full or not (core.has_work or more)):
            match message := decoder.decode(data):
                case Submit(request):
                    core.add(images.whole(request))
                case Picture():
                    images.hold(message)
                case Forget(digests):
                    images.forget(digests)
                case Cancel(request_id):
                    core.cancel(request_id)
                    asked = True
                case Ping():
                    asked = True
                case Shutdown():
                    return
        told: list[Delta] | None = None
        if core.has_work and not wire.full:
            told, more = core.begin(), True
        elif more and not (core.has_work or asked):
            more = core.prepare()
        if told is not None or asked:  # sent while the next step runs
            wire.send_step(Step(told or [], core.stats()))
        core.wait()


def run(sock: socket.socket, make_core: CoreFactory = EngineCore) -> int:
    """Load the model that the first frame names, then serve; the exit code."""
    wire = Wire(sock)
    try:
        first: list[bytes] = []
        while not first:
            first = wire.receive(wait=True)
        config = msgspec.msgpack.decode(first[0], type=EngineConfig)
        gc.disable()  # what is loaded stays
        try:
            core = make_core(config, _Reporter(wire))
        except PagodaError as error:
            wire.send(LoadFailed(type(error).__name__, error.message, error.remedy, error.exit_code))
            return error.exit_code
        heap.settle()
        gc.enable()
        wire.send(Ready(core.info))
        serve(wire, core)
    except Gone:
        return 0
    except (ProtocolError, msgspec.DecodeError) as error:
        _log.error("the engine ends: the server sent what is no message of ours: %s", error)
        return ProtocolError.exit_code
    return 0


class _Reporter:
    """Sends the progress of loading, but not more often than anyone can see."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._phase = ""
        self._sent_at = 0.0

    def __call__(self, phase: str, share: float) -> None:
        now = time.monotonic()
        if phase == self._phase and share < 1 and now - self._sent_at < _PROGRESS_S:
            return
        self._phase, self._sent_at = phase, now
        self._wire.send(Loading(phase, share))


def main(argv: list[str], make_core: CoreFactory = EngineCore) -> int:
    _die_with_parent()
    # The server decides what a signal means: a terminal's Ctrl-C and systemd's SIGTERM reach the engine too.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.setswitchinterval(_TURN_S)
    setup_logging()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    with socket.socket(fileno=int(argv[1])) as sock:
        return run(sock, make_core)


def _die_with_parent() -> None:
    """On Linux the kernel kills us with the server, even inside a long native call; else the closed socket tells."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


if __name__ == "__main__":
    code = main(sys.argv)
    sys.stderr.flush()
    os._exit(code)  # nothing is left to say; unmapping a model page by page is not worth waiting for
