"""What the API needs of the engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from pagoda.engine.messages import EngineStats, ModelInfo
from pagoda.types import Delta, Request


class Deltas(Protocol):
    """The deltas of one sequence; closing it cancels the sequence."""

    def __aiter__(self) -> AsyncIterator[Delta]: ...
    async def aclose(self) -> None: ...


class Engine(Protocol):
    """The part of `pagoda.engine.client.EngineClient` that the API uses. `engines` are those that it is made of."""

    @property
    def engines(self) -> Sequence[Engine]: ...
    @property
    def info(self) -> ModelInfo: ...
    @property
    def ready(self) -> bool: ...
    @property
    def stats(self) -> EngineStats: ...
    @property
    def restarts(self) -> int: ...
    @property
    def pid(self) -> int | None: ...
    def generate(self, request: Request) -> Deltas: ...
