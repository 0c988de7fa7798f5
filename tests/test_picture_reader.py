"""Pictures are decoded in processes that may be killed: by time, by memory, by themselves; the next one still works."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import msgspec
import pytest
from test_media_decode import SIZING, bomb, encoded, noise

from pagoda.engine import picture_worker
from pagoda.engine.picture_reader import PictureReader
from pagoda.errors import BadRequest, Overloaded
from pagoda.media.decode import decode
from pagoda.media.task import TOO_MUCH, Failed, Task

GOOD = Task(parts=[encoded(noise(60, 60))], sizing=SIZING)
OTHER = Task(parts=[encoded(noise(61, 60))], sizing=SIZING)


def test_what_comes_back_is_what_is_decoded_here_and_is_kept() -> None:
    async def go() -> None:
        reader = PictureReader()
        first = await reader.read(GOOD)
        assert first == decode(GOOD) and await reader.read(GOOD) is first
        with pytest.raises(BadRequest, match="million pixels"):
            await reader.read(Task(parts=[bomb()], sizing=SIZING))
        both = await asyncio.gather(*(reader.read(task) for task in (GOOD, OTHER, OTHER, GOOD)))
        assert both[0] == both[3] != both[1]
        reader.close()

    asyncio.run(go())


def worker(tmp_path: Path, body: str) -> tuple[str, ...]:
    """A worker that does something else to a picture of one size, and with others what it should."""
    path = tmp_path / "worker.py"
    path.write_text(
        "import os, signal, time\n"
        "from pagoda.engine import picture_worker as w\n"
        "real = w.decode\n"
        "def decode(task):\n"
        f"    if len(task.parts) > 1:\n        {body}\n"
        "    return real(task)\n"
        "w.decode = decode\n"
        "w.CPU_S = 1.0\n"
        "w.MEMORY_BYTES = 1 << 30\n"
        "w.main()\n"
    )
    return (sys.executable, str(path))


@pytest.mark.parametrize(
    "body", ["while True: pass", "bytearray(4 << 30)", "os.kill(os.getpid(), signal.SIGSEGV)", "time.sleep(60)"]
)
def test_a_picture_that_kills_its_process_kills_nothing_else(tmp_path: Path, body: str) -> None:
    evil = Task(parts=[b"a", b"b"], sizing=SIZING, video=True)

    async def go() -> None:
        reader = PictureReader(command=worker(tmp_path, body), wall_s=20.0 if "sleep" not in body else 6.0)
        assert (await reader.read(GOOD)).frames == 1
        started = time.monotonic()
        with pytest.raises(BadRequest, match=TOO_MUCH):
            await reader.read(evil)
        assert time.monotonic() - started < 60
        assert (await reader.read(OTHER)).frames == 1
        reader.close()

    asyncio.run(go())


def test_who_waits_too_long_is_told_to_come_back(tmp_path: Path) -> None:
    evil = Task(parts=[b"a", b"b"], sizing=SIZING, video=True)

    async def go() -> None:
        reader = PictureReader(command=worker(tmp_path, "time.sleep(60)"), wall_s=8.0, turn_s=0.2)
        busy = [asyncio.create_task(reader.read(evil)) for _ in range(min(4, os.cpu_count() or 1))]
        await asyncio.sleep(0.1)
        with pytest.raises(Overloaded, match="too many pictures"):
            for _ in range(4):
                await reader.read(OTHER)
        for task in busy:
            task.cancel()
        await asyncio.gather(*busy, return_exceptions=True)
        reader.close()

    asyncio.run(go())


def test_the_decoders_own_words_stay_in_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(task: Task) -> None:
        raise MemoryError("/home/somebody")

    monkeypatch.setattr(picture_worker, "decode", breaks)
    assert picture_worker.answer(msgspec.msgpack.encode(GOOD)) == Failed(TOO_MUCH)
    assert signal.getsignal(signal.SIGPROF) is signal.SIG_DFL
