"""A process that follows rank 0, `python -m pagoda.backend.torch.rank`: what it is to hold comes on standard input."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import BinaryIO

import msgspec
import torch

from pagoda.backend.torch.executor import TorchCpuExecutor, TorchExecutor
from pagoda.backend.torch.group import Group
from pagoda.backend.torch.parallel import Job, follow
from pagoda.errors import PagodaError
from pagoda.observe import setup_logging
from pagoda.weights.open import open_source


def run(job: Job) -> int:
    """The exit code. What goes wrong while loading is said by rank 0, which hears of it."""
    if job.cuda:
        torch.cuda.set_device(job.rank)
    group = Group(job.rank, job.size, job.meeting, job.cuda)
    kind = TorchExecutor if job.cuda else TorchCpuExecutor
    try:
        executor = kind.load(job.spec, open_source(job.path), job.limits, None, group)
    except PagodaError as error:
        return error.exit_code
    follow(executor, group)
    return 0


def _end_with(pipe: BinaryIO) -> None:
    """Rank 0 holds the other end: once that is closed nobody is there to compute for."""
    pipe.read()
    os._exit(0)


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    setup_logging()
    pipe = sys.stdin.buffer
    size_bytes = int.from_bytes(pipe.read(8), "little")
    job = msgspec.msgpack.decode(pipe.read(size_bytes), type=Job)
    threading.Thread(target=_end_with, args=(pipe,), daemon=True).start()
    return run(job)


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)
