"""A process that follows rank 0, `python -m pagoda.backend.torch.rank`: what it is to hold comes on standard input."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import BinaryIO

import msgspec
import torch
from torch._C._distributed_c10d import Store

from pagoda.arch.dummy import open_model
from pagoda.backend.torch.executor import TorchCpuExecutor, TorchExecutor
from pagoda.backend.torch.group import Group
from pagoda.backend.torch.parallel import Job, follow
from pagoda.errors import PagodaError
from pagoda.observe import setup_logging


def run(job: Job, meeting: str | Store) -> int:
    """The exit code. What goes wrong while loading is said by rank 0, which hears of it."""
    if job.cuda:
        torch.cuda.set_device(job.gpu)
    group = Group(job.rank, job.size, meeting, job.cuda)
    kind = TorchExecutor if job.cuda else TorchCpuExecutor
    try:
        source = open_model(job.path, job.limits.load_format, spec=job.spec, mmproj=job.limits.mmproj)
        executor = kind.load(job.spec, source, job.limits, None, group)
    except PagodaError as error:
        return error.exit_code
    follow(executor, group)
    executor.close()
    group.close()  # NCCL has the ranks of a machine do so together
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
    return run(job, job.meeting)


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)
