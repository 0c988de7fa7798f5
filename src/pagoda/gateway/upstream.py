"""Another server, such as an Ollama or a vLLM, that answers for models that are not here."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Mapping
from typing import Any

from pagoda.errors import PagodaError
from pagoda.gateway.wire import Answer, Place, Unreachable, as_json, call

VIA = "x-pagoda-via"
_LISTS_S = 5.0
_LIST_LIMIT_S = 5.0
_NOT_SENT = frozenset(("authorization", "x-api-key", "cookie", "host", VIA))

log = logging.getLogger("pagoda.gateway")


class UpstreamError(PagodaError):
    """The upstream does not answer."""

    status = 502
    code = "upstream_error"
    type = "UpstreamError"


class LoopDetected(PagodaError):
    status = 508
    code = "loop_detected"
    type = "UpstreamError"


class Upstream:
    """Its models are asked for anew every few seconds; the clients' keys are never sent to it, only its own."""

    def __init__(self, place: Place, key: str = "") -> None:
        self.place = place
        self.calls = 0
        self.failures = 0
        self._key = key
        self._own_id = secrets.token_hex(8)
        self._lists: dict[str, tuple[float, list[dict[str, Any]]]] = {}
        self._silent = False

    async def send(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """The answer, whatever its status. Raises UpstreamError, or LoopDetected where we come round to ourselves."""
        via = headers.get(VIA, "")
        if self._own_id in via:
            raise LoopDetected(
                f"the upstream {self.place} leads back to this server", remedy="Take --upstream from one of the two"
            )
        kept = {name: value for name, value in headers.items() if name.lower() not in _NOT_SENT}
        kept[VIA] = f"{via}, {self._own_id}" if via else self._own_id
        if self._key:
            kept["authorization"] = f"Bearer {self._key}"
        self.calls += 1
        try:
            return await call(self.place, method, path, kept, body)
        except Unreachable as error:
            self.failures += 1
            raise self.error(error) from None

    def error(self, cause: Unreachable) -> UpstreamError:
        return UpstreamError(f"the upstream {self.place} does not answer: {cause}", remedy="Is it running?")

    async def cards(self) -> list[dict[str, Any]]:
        """Its entries of /v1/models."""
        return await self._list("/v1/models", "data", "id")

    async def tags(self) -> list[dict[str, Any]]:
        """Its entries of /api/tags; none where it is no Ollama."""
        return await self._list("/api/tags", "models", "name")

    async def _list(self, path: str, key: str, name: str) -> list[dict[str, Any]]:
        at_s, known = self._lists.get(path, (-_LISTS_S, []))
        if time.monotonic() - at_s < _LISTS_S:
            return known
        try:
            async with asyncio.timeout(_LIST_LIMIT_S):
                answer = await self.send("GET", path, {}, b"")
                body = as_json(await answer.whole())
            self._silent = False
        except (PagodaError, Unreachable, TimeoutError) as error:
            if not self._silent:
                log.warning("the models of the upstream cannot be listed: %s", error)
            self._silent, body = True, None
        items = body.get(key) if isinstance(body, dict) else None
        found = [item for item in items or [] if isinstance(item, dict) and isinstance(item.get(name), str)]
        self._lists[path] = (time.monotonic(), found)
        return found
