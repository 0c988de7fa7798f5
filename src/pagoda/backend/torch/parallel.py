"""Tensor parallel: this process is rank 0, plans and samples; each other GPU has a process of its own that follows."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace as changed
from functools import partial
from pathlib import Path
from typing import Protocol, Self

import msgspec
import torch
from msgspec.structs import replace
from torch._C._distributed_c10d import Store

from pagoda.arch.registry import bind
from pagoda.arch.sharding import check_size
from pagoda.arch.spec import ModelSpec
from pagoda.arch.vision_spec import Vision
from pagoda.backend.base import Limits, Pending, Progress
from pagoda.backend.torch.executor import TorchExecutor
from pagoda.backend.torch.faults import engine_lost
from pagoda.backend.torch.group import Group, Recording, Work
from pagoda.backend.torch.team import ALONE, Team
from pagoda.backend.torch.upload import MAX_ROWS, Fed, upload, upload_batch
from pagoda.backend.vision import vectors_taken
from pagoda.errors import ConfigError, EngineError
from pagoda.types import StepPlan
from pagoda.weights.source import TensorSource

_COMMAND = (sys.executable, "-P", "-m", "pagoda.backend.torch.rank")
_STDERR = 2
_END_S = 10.0

_log = logging.getLogger(__name__)


class Job(msgspec.Struct, frozen=True):
    """What a process that follows is told first. `gpu` is its place among the GPUs that it sees."""

    rank: int
    size: int
    meeting: str
    cuda: bool
    gpu: int
    path: str
    spec: ModelSpec
    limits: Limits


class Followers(Protocol):
    """The other ranks. When one of them ends before it was told to, this process ends too: no step can be done."""

    ending: bool
    """From now on they may end."""

    def end(self, *, kill: bool) -> None: ...


class Processes:
    """Followers on this machine."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.ending = False
        environment = dict(os.environ) if jobs[0].cuda else {**os.environ, "OMP_NUM_THREADS": "1"}
        self._processes = [
            subprocess.Popen(_COMMAND, stdin=subprocess.PIPE, stdout=_STDERR, env=environment) for _ in jobs
        ]
        for job, process in zip(jobs, self._processes, strict=True):
            message = msgspec.msgpack.encode(job)
            if process.stdin is not None:  # it stays open: its end tells the process that this one is gone
                process.stdin.write(len(message).to_bytes(8, "little") + message)
                process.stdin.flush()
            threading.Thread(target=self._watch, args=(job.rank, process), daemon=True).start()

    def _watch(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        code = process.wait()
        if not self.ending:
            engine_ends(f"the process of GPU {rank} ended (code {code})")

    def end(self, *, kill: bool) -> None:
        self.ending = True
        for process in self._processes:
            if kill:
                process.kill()
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdin is not None:
                process.stdin.close()


class ParallelExecutor(TorchExecutor):
    """Rank 0 of several. What it is told to launch it tells the others, and all compute it together."""

    group: Group
    followers: Followers
    apart = False  # a step was told to the others and is not done here

    @classmethod
    def load(
        cls,
        spec: ModelSpec,
        source: TensorSource,
        limits: Limits,
        progress: Progress | None = None,
        team: Team = ALONE,
    ) -> Self:
        """Raises ConfigError, before anything is started, where the GPUs are too few or cannot share the model."""
        size = limits.tensor_parallel_size
        if spec.encoder is not None:
            raise ConfigError(
                f"--tensor-parallel-size {size}: an encoder is computed on one GPU",
                remedy="Leave it out",
                param="tensor_parallel_size",
            )
        check_size(spec, bind(spec, source), size)
        first = Job(0, size, "", cls.cuda, 0, source.path, spec, limits)
        with cls.gathered(first) as (followers, meeting):
            group = None
            try:
                group = Group(0, size, meeting, cls.cuda)
                executor = super().load(spec, source, limits, progress, group)
            except BaseException:
                followers.end(kill=True)
                if group is not None:
                    group.close()
                raise
        executor.group, executor.followers = group, followers
        return executor

    @classmethod
    @contextmanager
    def gathered(cls, first: Job) -> Iterator[tuple[Followers, str | Store]]:
        """Starts the ranks behind the first; as long as this is open, all can find each other at the meeting."""
        if cls.cuda:
            _check_gpus(first.size)
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # nobody outside can reach the ranks of one machine
        with tempfile.TemporaryDirectory(prefix="pagoda-") as folder:
            meeting = (Path(folder) / "ranks").as_uri()
            others = range(1, first.size)
            yield Processes([replace(first, rank=rank, gpu=rank, meeting=meeting) for rank in others]), meeting

    def _run(self, plan: StepPlan) -> Pending:
        if self.apart:
            raise EngineError("a step was interrupted, and the GPUs are at different places; load the model again")
        plan = without_images(plan, self.decoder.spec.vision)
        batch, turns = upload(plan, self._device.device, self.capacity.num_blocks)
        rows = len(plan.rows) if self.decoder.spec.pooling is None else 0
        work = Work(self.width(plan), rows, lambda: self._computed(plan, batch, turns), self.idle(plan))
        with self._together(f"step {plan.step}"):
            self.group.tell(plan)
            pending = self.group.step(plan.tokens, work)
        self.record_wanted()
        return pending

    def record(self, size: int, *, new: bool) -> None:
        with self._together(f"the recording of a graph of {size} requests"):
            self.group.tell(Recording(size, new))
            super().record(size, new=new)

    @contextmanager
    def _together(self, what: str) -> Iterator[None]:
        """What all ranks do. A fault within it ends the engine: they may be at different places then."""
        self.apart = True
        try:
            yield
        except torch.OutOfMemoryError:
            self.apart = False
            raise
        except Exception as error:
            # the others may have gone further, or wait for this one
            raise engine_lost(f"{what} failed at one of {self.group.size} ranks") from error
        self.apart = False

    def close(self) -> None:
        self.followers.ending = True  # before they are told: they may be gone at once
        if self.apart:
            self.followers.end(kill=True)
        else:
            self.group.tell(None)
        super().close()  # the end of the exchange waits for the graphs that have it in them
        if not (self.apart and self.cuda):  # NCCL would wait for what the others do no more
            self.group.close()
        self.followers.end(kill=self.apart)


class ParallelCpuExecutor(ParallelExecutor):
    """The same over processes of a CPU, for tests."""

    cuda = False


def without_images(plan: StepPlan, vision: Vision | None) -> StepPlan:
    """The plan with tokens that are nobody's in the places of images: rank 0 alone has an encoder."""
    if not plan.images or vision is None:
        return plan
    tokens = plan.tokens.copy()
    for part in plan.images:
        tokens[vectors_taken(part, vision)[0]] = -1
    return changed(plan, tokens=tokens)


def engine_ends(why: str) -> None:
    """Without one of its ranks: the server starts another one, and the streams go on there."""
    _log.critical("%s; the engine ends", why)
    os._exit(EngineError.exit_code)


def follow(executor: TorchExecutor, group: Group) -> None:
    """Compute what rank 0 tells, until it has no more."""
    with torch.inference_mode():
        while (fed := group.told()) is not None:
            if isinstance(fed, Recording):
                executor.record(fed.size, new=fed.new)
                continue
            rows = len(fed.rows) if executor.decoder.spec.pooling is None else 0
            work = Work(executor.width(fed), rows, partial(_followed, executor, fed, rows), executor.idle(fed))
            try:
                group.step(fed.tokens, work)
            except torch.OutOfMemoryError as error:
                _log.warning("rank %d: %s", group.rank, error)
                executor.release()


def _followed(executor: TorchExecutor, fed: Fed, rows: int) -> None:
    hidden = executor.hidden(upload_batch(fed, executor.device, executor.capacity.num_blocks))
    for first in range(0, rows, MAX_ROWS):
        executor.decoder.logits(hidden[first : first + MAX_ROWS])


def _check_gpus(size: int) -> None:
    there = torch.cuda.device_count()
    if there < size:
        shown = os.environ.get("CUDA_VISIBLE_DEVICES")
        named = "" if shown is None else f" (CUDA_VISIBLE_DEVICES is {shown!r})"
        raise ConfigError(
            f"--tensor-parallel-size {size} needs {size} GPUs, and PyTorch finds {there}{named}",
            remedy=f"Use --tensor-parallel-size {max(1, there)}, or make more of them visible",
            param="tensor_parallel_size",
        )
