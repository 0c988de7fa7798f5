"""All models behind one port: finds the one that a name means, has it loaded, and unloads what nobody uses."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

from pagoda.api.serving.derived import DerivedModels
from pagoda.api.serving.names import ServedNames
from pagoda.engine.adapters import adapter_names
from pagoda.errors import BadRequest, Overloaded
from pagoda.gateway.child import AFTER_FAILURE_S, Child
from pagoda.gateway.policy import expired, next_step
from pagoda.gateway.sizes import Sized

MAX_WAITING = 1024
_TICK_S = 0.5

log = logging.getLogger("pagoda.gateway")


class Fleet:
    """The first model is loaded with the gateway, and again when it has crashed; the others when they are asked for."""

    def __init__(
        self,
        models: Sequence[Sized],
        budget_bytes: int,
        folder: Path,
        derived: Path | None = None,
        api_keys: Sequence[str] = (),
    ) -> None:
        self.budget_bytes = budget_bytes
        self._change = asyncio.Event()
        self.children = tuple(
            Child(each, folder, number, api_keys, self._changed) for number, each in enumerate(models)
        )
        self._exact = {name: child for child in reversed(self.children) for name in child.names}
        self._derived = derived
        self._served: list[tuple[ServedNames, Child]] = []
        self.read_names()

    def read_names(self) -> None:
        """The names of each model and of its adapters, and those that clients gave to what they made of it."""
        self._served = [(ServedNames(child.names, child.sized.path), child) for child in self.children]
        for names, child in self._served:
            for name in adapter_names(child.sized.options.lora_modules):
                names.add(name)
            DerivedModels(names, child.sized.path, self._derived)

    @property
    def first(self) -> Child:
        return self.children[0]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for names, _ in self._served for name in names.names)

    def names_of(self, child: Child) -> tuple[str, ...]:
        return next(names.names for names, each in self._served if each is child)

    def find(self, wanted: str | None) -> Child | None:
        """The model that a client means; the first one where it names none."""
        if wanted is None or not wanted.strip():
            return self.first
        if wanted in self._exact:
            return self._exact[wanted]
        return next((child for names, child in self._served if names.find(wanted) is not None), None)

    def name_of(self, wanted: str) -> str | None:
        """The served name that a client means."""
        found = (names.find(wanted) for names, child in self._served if child is self.find(wanted))
        return next(found, None)

    def check_new(self, name: str, child: Child) -> None:
        """Raises BadRequest where a model that is to be made of `child` would have the name of one of another's."""
        if any(names.has(name) for names, each in self._served if each is not child):
            raise BadRequest(
                f"{name[:200]!r} is the name of another model here",
                remedy="Take another name, or delete that model first if it was made here: DELETE /api/delete",
                param="model",
            )

    def check_unused(self, wanted: str) -> None:
        """Raises BadRequest where files of a model of ours would be removed, which has other names here."""
        name = "/" + wanted.removesuffix(":latest")
        if any(child.sized.options.model and name.endswith("/" + child.sized.options.model) for child in self.children):
            raise BadRequest(f"model '{wanted[:200]}' is being served", remedy="Stop this server first", param="model")

    async def loaded(self, child: Child) -> None:
        """Wait until it takes requests; it is started, and others leave, as needed. Raises what loading ended with."""
        if child.state == "ready":
            return
        if child.waiting >= MAX_WAITING:
            raise Overloaded(
                f"{child.waiting} requests wait for {child.sized.name} to be loaded; no more are taken now"
            )
        if not child.waiting:
            child.waiting_since_s = time.monotonic()
        child.waiting += 1
        try:
            await self._load(child)
        finally:
            child.waiting -= 1

    async def _load(self, child: Child) -> None:
        since_s = time.monotonic()
        while child.state != "ready":
            if child.failure is not None and child.state == "stopped":
                if child.failed_at_s >= since_s or time.monotonic() - child.failed_at_s < AFTER_FAILURE_S:
                    raise child.failure
                child.failure = None
            if child.state == "stopped":
                self._make_room(child, time.monotonic() - since_s)
            # What happened may have happened to another one; what it waits for may also be time alone.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TICK_S):
                    await self._change.wait()

    def _make_room(self, child: Child, waited_s: float) -> None:
        others = [each for each in self.children if each is not child]
        step = next_step(child.seen(), [each.seen() for each in others], self.budget_bytes, waited_s)
        if step.start:
            child.start()
            return
        for each in others:
            if each.sized.name in step.unload:
                log.info("%s: makes room for %s", each.sized.name, child.sized.name)
                each.leave()

    def _changed(self) -> None:
        self._change.set()
        self._change = asyncio.Event()

    @contextlib.asynccontextmanager
    async def tended(self) -> AsyncGenerator[None, None]:
        """Meanwhile unload what has been idle for too long, and start the first one again when it has crashed."""
        task = asyncio.create_task(self._tend())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def _tend(self) -> None:
        while True:
            names = expired([child.seen() for child in self.children], time.monotonic())
            for child in self.children:
                if child.sized.name in names:
                    child.leave()
            first = self.first
            if first.crashed and time.monotonic() - first.failed_at_s >= AFTER_FAILURE_S:
                self._make_room(first, 0.0)
            await asyncio.sleep(_TICK_S)

    async def stop(self) -> None:
        await asyncio.gather(*(child.stop() for child in self.children))


def looked_at(loading: asyncio.Future[None]) -> None:
    """For one that nobody may wait for: what went wrong is in the log already."""
    if not loading.cancelled():
        loading.exception()
