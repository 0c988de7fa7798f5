"""Several engines with the same model behind one server: a request goes on elsewhere when one dies."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence

import msgspec

from pagoda.api.serving.engine import Engine
from pagoda.backend.base import Progress
from pagoda.backend.cpu.machine import free_memory_bytes, usable_cores
from pagoda.engine.client import EngineClient
from pagoda.engine.messages import EngineStats, ModelInfo
from pagoda.engine.stream import DeltaStream, Stream
from pagoda.errors import ConfigError
from pagoda.gateway.spread import Prefixes, choose, request_keys
from pagoda.options.engine_config import EngineConfig
from pagoda.sched.stats import SchedulerStats
from pagoda.types import Request

_SUMS = ("num_blocks", "max_num_seqs", "weight_bytes", "kv_bytes", "activation_bytes")


def environments(count: int, gpus_each: int, environ: Mapping[str, str]) -> list[dict[str, str]]:
    """What each replica's environment has of its own: its GPUs, of those that are visible or of all in order."""
    visible = [one.strip() for one in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one.strip()]
    if visible and len(visible) < count * gpus_each:
        raise ConfigError(
            f"--replicas {count} with {gpus_each} GPU{'s' if gpus_each > 1 else ''} each need {count * gpus_each}, "
            f"and CUDA_VISIBLE_DEVICES names {len(visible)}",
            remedy=f"Give --replicas {max(1, len(visible) // gpus_each)} or fewer",
        )
    gpus = visible or [str(number) for number in range(count * gpus_each)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(gpus[i * gpus_each : (i + 1) * gpus_each])} for i in range(count)]


def part_of(config: EngineConfig, count: int) -> EngineConfig:
    """The configuration of one of `count` replicas: on a CPU each has its part of the threads and the free memory."""
    threads = max(1, (config.threads or usable_cores()) // count)
    reserved = free_memory_bytes() * (count - 1) // count
    return msgspec.structs.replace(config, threads=threads, reserved_bytes=reserved)


class Replicas:
    """Takes the place of an EngineClient. Answers are the same on each replica, so a request may move at any token.

    What was running on a replica that died, and what waits for it, goes on with the next best one at once; only
    requests that are suspected of killing engines stay, and are tried alone when it is back.
    """

    def __init__(self, clients: Sequence[EngineClient]) -> None:
        self.on_dead: Callable[[str], None] | None = None
        self._clients = tuple(clients)
        self._prefixes = Prefixes()
        self._homes: dict[Stream, EngineClient] = {}
        self._up: set[int] = set()
        for client in clients:
            client.on_change = self._settle
            client.on_dead = self._one_dead

    @property
    def engines(self) -> Sequence[Engine]:
        return self._clients

    @property
    def info(self) -> ModelInfo:
        """The model, with the sizes of all replicas together, and the context that each of them has."""
        infos = [client.info for client in self._clients]
        return msgspec.structs.replace(
            infos[0],
            max_model_len=min(info.max_model_len for info in infos),
            device=f"{len(infos)} x {infos[0].device}",
            load_s=max(info.load_s for info in infos),
            **{name: sum(getattr(info, name) for info in infos) for name in _SUMS},
        )

    @property
    def stats(self) -> EngineStats:
        every = [client.stats for client in self._clients]
        names = SchedulerStats.__struct_fields__
        sums = {name: sum(getattr(stats.scheduler, name) for stats in every) for name in names}
        return EngineStats(
            scheduler=SchedulerStats(**sums),
            steps=sum(stats.steps for stats in every),
            last_step_s=max(stats.last_step_s for stats in every),
        )

    @property
    def ready(self) -> bool:
        return any(client.ready for client in self._clients)

    @property
    def responsive(self) -> bool:
        return any(client.responsive for client in self._clients)

    @property
    def restarts(self) -> int:
        return sum(client.restarts for client in self._clients)

    @property
    def pid(self) -> int | None:
        return next((client.pid for client in self._clients if client.ready), None)

    def spawn(self) -> None:
        for client in self._clients:
            client.spawn()

    async def start(self, on_progress: Progress | None = None) -> None:
        """Wait until all have loaded. Raises the first error that loading ended with."""
        shares = [0.0] * len(self._clients)

        def progress_of(index: int) -> Progress:
            def note(phase: str, share: float) -> None:
                shares[index] = share
                if on_progress is not None and share == min(shares):
                    on_progress(phase, share)

            return note

        await asyncio.gather(*(client.start(progress_of(i)) for i, client in enumerate(self._clients)))
        kinds = {client.info.device.partition(" ")[0] for client in self._clients}
        if len(kinds) > 1:
            raise ConfigError(
                f"{len(self._clients)} replicas need as many GPUs (times --tensor-parallel-size), and here are fewer",
                remedy="Give fewer --replicas, or --device cpu",
            )

    async def stop(self) -> None:
        await asyncio.gather(*(client.stop() for client in self._clients))

    def generate(self, request: Request) -> DeltaStream:
        keys = request_keys(request)
        index = self._choose(keys)
        stream = self._clients[index].take(request)
        self._prefixes.note(keys, index)
        self._homes[stream] = self._clients[index]
        return DeltaStream(stream, self._release)

    def _choose(self, keys: Sequence[int]) -> int:
        """Of those that are up; where none is, of those that will be."""
        usable = [i for i, c in enumerate(self._clients) if c.ready] or [
            i for i, c in enumerate(self._clients) if not c.dead
        ]
        loads = {i: self._clients[i].load for i in usable or range(len(self._clients))}
        return choose(loads, self._prefixes.known_tokens(keys))

    def _release(self, stream: Stream) -> None:
        self._homes.pop(stream).release(stream)

    def _settle(self) -> None:
        """A replica went down or came up: what waits for one that is down goes to those that are up."""
        for index, client in enumerate(self._clients):
            if client.ready:
                self._up.add(index)
            elif index in self._up:
                self._up.remove(index)
                self._prefixes.forget(index)
        for client in self._clients:
            takers = any(c.ready for c in self._clients) or (client.dead and not all(c.dead for c in self._clients))
            if client.ready or not takers:
                continue
            for stream in client.give_waiting():
                keys = request_keys(stream.request)
                index = self._choose(keys)
                self._prefixes.note(keys, index)
                self._homes[stream] = self._clients[index]
                self._clients[index].adopt(stream)

    def _one_dead(self, reason: str) -> None:
        if self.on_dead is not None and all(client.dead for client in self._clients):
            self.on_dead(reason)


def make_replicas(
    config: EngineConfig, count: int, make: Callable[[EngineConfig, Mapping[str, str]], EngineClient]
) -> Replicas:
    """`count` replicas, each made by `make` of its configuration and what its environment has beside ours."""
    part = part_of(config, count)
    return Replicas([make(part, own) for own in environments(count, config.tensor_parallel_size, os.environ)])
