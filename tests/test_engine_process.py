"""The engine process by itself: what it does with bytes, signals, silence and a slow reader."""

from __future__ import annotations

import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import engine_fake as fake
import msgspec
import psutil
import pytest

from pagoda.engine import process as engine_process
from pagoda.engine.messages import (
    MAX_FRAME_BYTES,
    Cancel,
    EngineStats,
    Framer,
    FromEngine,
    LoadFailed,
    Loading,
    ProtocolError,
    Ready,
    Shutdown,
    Step,
    Submit,
    frame,
)
from pagoda.engine.spawn import COMMAND, EngineProcess
from pagoda.options.engine_config import EngineConfig
from pagoda.sched.stats import SchedulerStats
from pagoda.types import Delta, Request, SamplingParams


class Peer:
    """The server's end of the socket, blocking."""

    def __init__(self, sock: socket.socket, process: subprocess.Popen[bytes]) -> None:
        self.sock, self.process = sock, process
        self._framer = Framer()
        self._messages: list[FromEngine] = []

    def send(self, message: object) -> None:
        self.sock.sendall(frame(message))

    def next(self) -> FromEngine:
        while not self._messages:
            data = self.sock.recv(1 << 16)
            assert data, "the engine closed its end"
            decoded = [msgspec.msgpack.decode(body, type=FromEngine) for body in self._framer.feed(data)]
            self._messages += decoded
        return self._messages.pop(0)

    def ready(self) -> Ready:
        while not isinstance(message := self.next(), Ready):
            assert isinstance(message, Loading)
        return message


@contextmanager
def engine(command: list[str] | tuple[str, ...], config: EngineConfig | None = None) -> Iterator[Peer]:
    ours, theirs = socket.socketpair()
    ours.settimeout(60)
    process = subprocess.Popen(
        [*command, str(theirs.fileno())], pass_fds=[theirs.fileno()], stderr=subprocess.PIPE, process_group=0
    )
    theirs.close()
    try:
        if config is not None:
            ours.sendall(frame(config))
        yield Peer(ours, process)
    finally:
        ours.close()
        process.kill()
        process.communicate()


FAKE = EngineConfig(model="fake")


def request(name: str, prompt: list[int], max_tokens: int = 5) -> Request:
    params = SamplingParams(temperature=0.0, seed=1, max_tokens=max_tokens)
    return Request(request_id=name, prompt_token_ids=prompt, params=params)


def test_messages_survive_the_trip() -> None:
    sent = Submit(request("a", [1, 2, 3]))
    body = Framer().feed(frame(sent))
    assert msgspec.msgpack.decode(body[0], type=Submit | Cancel | Shutdown) == sent


def test_frames_come_whole_however_they_are_cut() -> None:
    bodies = [b"", b"x", b"abc" * 1000]
    stream = b"".join(len(b).to_bytes(4, "big") + b for b in bodies)
    rng = random.Random(3)
    for _ in range(50):
        framer, got, at = Framer(), [], 0
        while at < len(stream):
            step = rng.choice([1, 3, 7, 1000])
            got += framer.feed(stream[at : at + step])
            at += step
        assert got == bodies


def test_a_length_over_the_limit_is_refused_and_never_allocated() -> None:
    framer = Framer()
    with pytest.raises(ProtocolError):
        framer.feed((MAX_FRAME_BYTES + 1).to_bytes(4, "big"))
    assert Framer().feed(MAX_FRAME_BYTES.to_bytes(4, "big") + b"x") == []


def test_a_load_error_is_told_in_our_words(tmp_path: os.PathLike[str]) -> None:
    with engine(COMMAND, EngineConfig(model=str(tmp_path), device="reference")) as peer:
        message = peer.next()
        assert isinstance(message, LoadFailed)
        assert (message.kind, message.exit_code) == ("ModelError", 65) and message.message
        assert peer.process.wait(60) == 65


@pytest.mark.parametrize(
    ("data", "loaded"),
    [
        (b"\x80\x04\x95\x10\x00\x00\x00 a pickle", True),
        (random.Random(1).randbytes(5000), False),
        (b"\x00\x00\x00\x03\xc1\xc1\xc1", False),
        (b"\xff\xff\xff\xff", False),
        (b"\x00\x00\x00\x00", True),
        (frame({"type": "Submit", "request": 5}), False),
        (frame({"type": "Submit", "request": 5}), True),
    ],
)
def test_bytes_that_are_no_message_end_the_engine_cleanly(data: bytes, loaded: bool) -> None:
    with engine(fake.command(), FAKE if loaded else None) as peer:
        if loaded:
            peer.ready()
        peer.sock.sendall(data)
        assert peer.process.wait(60) == ProtocolError.exit_code
        assert peer.process.stderr is not None
        log = peer.process.stderr.read().decode()
        assert "no message of ours" in log and "Traceback" not in log


@pytest.mark.alone
def test_a_closed_socket_or_shutdown_ends_it() -> None:
    for shutdown in (True, False):
        with engine(fake.command(), FAKE) as peer:
            peer.ready()
            if shutdown:
                peer.send(Shutdown())
            else:
                peer.sock.shutdown(socket.SHUT_RDWR)
            assert peer.process.wait(2) == 0


@pytest.mark.alone
def test_idle_takes_no_cpu_and_signals_of_the_terminal_are_ignored() -> None:
    with engine(fake.command(), FAKE) as peer:
        peer.ready()
        proc = psutil.Process(peer.process.pid)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            proc.send_signal(number)
        time.sleep(0.2)
        before = proc.cpu_times()
        switches = proc.num_ctx_switches().voluntary
        time.sleep(1.0)
        after = proc.cpu_times()
        assert (after.user - before.user) + (after.system - before.system) < 0.02
        assert proc.num_ctx_switches().voluntary - switches < 5
        peer.send(Submit(request("a", [3])))
        assert isinstance(peer.next(), Step)


def test_cancel_is_taken_in_between_two_steps() -> None:
    with engine(fake.command(step_s=0.05), FAKE) as peer:
        peer.ready()
        peer.send(Submit(request("a", [3] * 20, max_tokens=400)))
        assert isinstance(peer.next(), Step)
        peer.send(Cancel("a"))
        tokens = 0
        while True:
            message = peer.next()
            assert isinstance(message, Step)
            tokens += len(message.deltas)
            if message.stats.scheduler.blocks_used == 0:
                break
        assert tokens <= 1 and message.stats.scheduler.running == 0


class SlowReader:
    """A wire, and its other end that is read when the test wants."""

    def __init__(self) -> None:
        self.ours, theirs = socket.socketpair()
        self.wire = engine_process.Wire(theirs)


def test_a_slow_reader_stops_the_steps_but_not_before_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_process, "BACKLOG_BYTES", 1 << 20)
    slow = SlowReader()
    text = "x" * 100_000
    sent = 0
    while not slow.wire.full:
        slow.wire.send(Delta(request_id="a", error=text))  # never blocks, though nobody reads
        sent += 1
    assert 10 <= sent < 40
    framer, got = Framer(), 0
    while got < sent:
        if slow.wire.full or select.select([slow.ours], [], [], 0)[0]:
            got += len(framer.feed(slow.ours.recv(1 << 20)))
        slow.wire.receive(wait=False)  # sends on what waits
    assert not slow.wire.full


def test_a_step_too_large_for_a_frame_goes_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagoda.engine.messages.MAX_FRAME_BYTES", 1500)
    slow = SlowReader()
    stats = EngineStats(scheduler=SchedulerStats(**dict.fromkeys(SchedulerStats.__struct_fields__, 0)))
    deltas = [Delta(request_id=str(i), error="x" * size) for i, size in enumerate((800, 800, 5000))]
    slow.wire.send_step(Step(deltas, stats))
    bodies = Framer().feed(slow.ours.recv(1 << 16))
    steps = [msgspec.msgpack.decode(body, type=FromEngine) for body in bodies]
    got = [delta for step in steps for delta in step.deltas]
    assert got[:2] == deltas[:2]
    assert got[2].finish_reason == "error" and "too large" in (got[2].error or "")


def test_the_process_imports_no_web_server_and_no_tokenizer() -> None:
    code = "import sys, pagoda.engine.process; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"asyncio", "starlette", "uvicorn", "jinja2", "tokenizers", "torch", "rich", "http"}
    assert not heavy & set(done.stdout.split())


def test_the_engine_dies_with_its_parent() -> None:
    code = (
        "import engine_fake as fake, sys, time\n"
        "from pagoda.options.engine_config import EngineConfig\n"
        "from pagoda.engine.client import EngineClient\n"
        "engine = EngineClient(EngineConfig(model='fake'), command=fake.command(load_s=30))\n"
        "engine.spawn()\n"
        "print(engine.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=child_env(), text=True)
    assert parent.stdout is not None
    engine = psutil.Process(int(parent.stdout.readline()))
    time.sleep(0.5)  # the engine is in its long load now, and does not look at its socket
    parent.kill()
    parent.wait()
    assert gone(engine, 2.0)


def child_env() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def gone(process: psutil.Process, limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


def test_a_process_that_nobody_takes_over_ends_with_its_block() -> None:
    before = set(psutil.Process().children())
    with EngineProcess("cpu"):
        assert len(set(psutil.Process().children()) - before) == 1
    assert set(psutil.Process().children()) <= before
    with EngineProcess("cpu") as early:
        process, sock = early.take()
    assert process.poll() is None, "who took it ends it"
    sock.close()
    assert process.wait(60) == 0, "it sees that nobody is there"
