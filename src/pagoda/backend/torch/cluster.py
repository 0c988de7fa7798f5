"""Tensor parallel over the machines of a Ray cluster: Ray places the ranks and watches them, and carries no step."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import msgspec
import psutil
import ray
import torch
from msgspec.structs import replace
from ray.exceptions import GetTimeoutError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch._C._distributed_c10d import Store, TCPStore

from pagoda.arch.dummy import open_model
from pagoda.backend.torch.parallel import Followers, Job, ParallelExecutor, engine_ends
from pagoda.backend.torch.rank import run
from pagoda.errors import ConfigError, ModelError, PagodaError
from pagoda.weights.source import TensorSource

_ANSWER_S = 300.0
_END_S = 10.0
_KNOCK_S = 5.0
_PART = 0.001  # of a resource that only one machine has
_CURE = (
    "`ray status` shows who holds them; give a smaller --tensor-parallel-size, or add machines with "
    "`ray start --address=...`"
)
_START = "Start it: `ray start --head` on one machine, `ray start --address=THAT_MACHINE:6379` on the others"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_log = logging.getLogger(__name__)


class About(msgspec.Struct, frozen=True):
    """What the process of a rank finds on its machine."""

    address: str
    host: str
    gpus: tuple[str, ...]
    torch: str
    model: int = 0  # see fingerprint
    error: tuple[str, str] = ("", "")

    def __str__(self) -> str:
        return f"{self.host} ({self.address})"


class Rank:
    """One rank as a Ray actor. Bytes of msgpack go in and out."""

    def about(self, message: bytes) -> bytes:
        return msgspec.msgpack.encode(_about(msgspec.msgpack.decode(message, type=Job)))

    def follow(self, message: bytes) -> int:
        """Compute what rank 0 tells, to the end."""
        job = msgspec.msgpack.decode(message, type=Job)
        _talk_through(ray.util.get_node_ip_address())
        host, port = job.meeting.rsplit(":", 1)
        return run(job, TCPStore(host, int(port), job.size, is_master=False))


def _about(job: Job) -> About:
    about = About(
        ray.util.get_node_ip_address(), socket.gethostname(), tuple(map(str, ray.get_gpu_ids())), str(torch.__version__)
    )
    try:
        source = open_model(job.path, job.limits.load_format, spec=job.spec, mmproj=job.limits.mmproj)
    except PagodaError as error:
        return replace(about, error=(error.message, error.remedy))
    return replace(about, model=fingerprint(source))


def fingerprint(source: TensorSource) -> int:
    """A number of the names, shapes and types of a checkpoint's tensors; reads no weight."""
    tensors = sorted((name, tensor.shape, tensor.type) for name, tensor in source.tensors.items())
    return zlib.crc32(msgspec.json.encode(tensors))


class RayRanks:
    """Followers in a Ray cluster."""

    def __init__(self, actors: Sequence[Any], messages: Sequence[bytes], group: PlacementGroup, ours: bool) -> None:
        self._actors, self._group, self._ours, self.ending = actors, group, ours, False
        self._ends = [actor.follow.remote(message) for actor, message in zip(actors, messages, strict=True)]
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        ended, _ = ray.wait(self._ends, num_returns=1)
        if self.ending:
            return
        try:
            why = f"code {ray.get(ended[0])}"
        except RayError as error:
            why = type(error).__name__
            _log.error("a rank was lost: %s", error)
        engine_ends(f"rank {self._ends.index(ended[0]) + 1} ended ({why})")

    def end(self, *, kill: bool) -> None:
        self.ending = True
        if not kill:
            ray.wait(self._ends, num_returns=len(self._ends), timeout=_END_S)
        for actor in self._actors:
            ray.kill(actor)
        _leave(self._group, self._ours)


class RayExecutor(ParallelExecutor):
    """Rank 0 of several; the others are actors wherever in the cluster a GPU is free."""

    place_s = 60.0
    """How long to wait for free GPUs: after a death Ray needs a while to see what is free again."""

    @classmethod
    @contextmanager
    def gathered(cls, first: Job) -> Iterator[tuple[Followers, str | Store]]:
        ours = not ray.is_initialized()
        if ours:
            _join()
        group = None
        try:
            group = _placed(first, cls.place_s)
            actors = [_actor(group, index, first.cuda) for index in range(first.size)]
            found = _found(actors, msgspec.msgpack.encode(first))
            check_alike(first, found)
            ray.kill(actors[0])  # this process takes its place
            if first.cuda:
                torch.cuda.set_device(gpu_index(found[0].gpus[0], os.environ.get("CUDA_VISIBLE_DEVICES")))
            own = found[0].address
            _talk_through(own)
            store = TCPStore(own, 0, first.size, is_master=True, wait_for_workers=False)
            jobs = [replace(first, rank=rank, meeting=f"{own}:{store.port}") for rank in range(1, first.size)]
            ranks = RayRanks(actors[1:], [msgspec.msgpack.encode(job) for job in jobs], group, ours)
        except BaseException:
            _leave(group, ours)
            raise
        yield ranks, store


class RayCpuExecutor(RayExecutor):
    """The same with a CPU core for each rank, for tests."""

    cuda = False


def _join() -> None:
    """Become a driver of the cluster that RAY_ADDRESS names, or of the one that runs here."""
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    address = os.environ.get("RAY_ADDRESS", "auto")
    if address.startswith("ray://"):
        raise ConfigError(
            f"RAY_ADDRESS is {address}, and through Ray's client nothing can be computed on this machine",
            remedy="Run the server on a machine of the cluster, with RAY_ADDRESS unset",
        )
    try:
        _knock(address)
        ray.init(address=address, logging_level=logging.WARNING)
    except (RayError, RuntimeError, ValueError, OSError) as error:
        _log.error("Ray says: %s", error)
        where = "on this machine" if address == "auto" else f"at {address}, which RAY_ADDRESS names"
        raise ConfigError(f"--distributed-executor-backend ray: no Ray cluster runs {where}", remedy=_START) from error
    finally:
        for number, handler in handlers.items():  # what signals mean is not Ray's to say
            signal.signal(number, handler)


def _knock(address: str) -> None:
    """OSError where nobody listens: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), _KNOCK_S).close()


def _leave(group: PlacementGroup | None, ours: bool) -> None:
    if group is not None:
        remove_placement_group(group)
    if ours:
        ray.shutdown()


def _placed(first: Job, wait_s: float) -> PlacementGroup:
    """One GPU for each rank, the first on this machine."""
    kind = "GPU" if first.cuda else "CPU"
    bundles = [{kind: 1.0} for _ in range(first.size)]
    bundles[0][f"node:{ray.util.get_node_ip_address()}"] = _PART
    group: PlacementGroup = placement_group(bundles, strategy="PACK")
    _log.info("waiting up to %.0f s for %d free %ss in the Ray cluster", wait_s, first.size, kind)
    if group.wait(wait_s):
        return group
    remove_placement_group(group)
    raise ConfigError(_too_few(kind, first.size), remedy=_CURE, param="tensor_parallel_size")


def _too_few(kind: str, size: int) -> str:
    free, there = (int(table.get(kind, 0)) for table in (ray.available_resources(), ray.cluster_resources()))
    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    own = nodes.get(ray.get_runtime_context().get_node_id(), {})
    here = "" if own.get(kind) else f"; this machine, where the first must be, has no {kind}"
    return (
        f"--tensor-parallel-size {size} needs {size} free {kind}s in the Ray cluster, which has {there} on "
        f"{len(nodes)} machine{'s' if len(nodes) > 1 else ''}, {free} of them free{here}"
    )


def _actor(group: PlacementGroup, index: int, cuda: bool) -> Any:
    place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
    needs = MappingProxyType({"num_cpus": 0, "num_gpus": 1} if cuda else {"num_cpus": 1})
    return ray.remote(Rank).options(scheduling_strategy=place, max_restarts=0, **needs).remote()


def _found(actors: Sequence[Any], message: bytes) -> list[About]:
    try:
        answers = ray.get([actor.about.remote(message) for actor in actors], timeout=_ANSWER_S)
    except (RayError, GetTimeoutError) as error:
        _log.error("Ray says: %s", error)
        raise ConfigError(
            "a machine of the Ray cluster cannot run a rank: the log above says why",
            remedy="Install the same pagoda-llm[cuda,ray] there, in the environment in which `ray start` runs",
        ) from error
    return [msgspec.msgpack.decode(answer, type=About) for answer in answers]


def check_alike(first: Job, found: Sequence[About]) -> None:
    """Every machine has the model, and it is the same one; so is PyTorch, whose ranks talk to each other."""
    for about in found:
        message, remedy = about.error
        if message:
            raise ModelError(f"on {about}: {message}", remedy=remedy)
        if about.model != found[0].model:
            raise ModelError(
                f"{about} has another model at {first.path} than {found[0]}", remedy="Copy the same files to both"
            )
        if about.torch != found[0].torch:
            raise ConfigError(
                f"{about} has PyTorch {about.torch}, and {found[0]} has {found[0].torch}",
                remedy="Install the same version on all machines",
            )


def gpu_index(gpu: str, visible: str | None) -> int:
    """The place of a GPU, as Ray names it, among those that this process sees."""
    names = None if visible is None else [name.strip() for name in visible.split(",")]
    if names is None and gpu.isdigit():
        return int(gpu)
    if names is None or gpu not in names:
        raise ConfigError(
            f"Ray gives this server the GPU {gpu}, which CUDA_VISIBLE_DEVICES={visible} does not show to it",
            remedy="Start the server with the CUDA_VISIBLE_DEVICES that `ray start` had here",
        )
    return names.index(gpu)


def _talk_through(address: str) -> None:
    """Ranks exchange over the network in which Ray's machines know each other, unless the environment says another."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == address for one in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
            return
