"""Responses that clients may ask for again, or go on from: in memory, bounded in number, size and age."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import msgspec

from pagoda.api.responses.protocol import ResponseReply
from pagoda.errors import BadRequest, NotFound

MAX_RESPONSES = 1000
MAX_BYTES = 64 << 20
MAX_AGE_S = 24 * 3600.0


class ResponseNotFound(NotFound):
    code = "response_not_found"


@dataclass(slots=True, eq=False)
class Stored:
    """`items` is all that the response was made from, earlier turns too. `task` runs one that is in the background."""

    reply: ResponseReply
    items: list[dict[str, Any]]
    task: asyncio.Task[None] | None = None
    stored_at_s: float = 0.0
    size_bytes: int = 0

    def history(self) -> list[dict[str, Any]]:
        """The items that a next turn begins with. Raises BadRequest while the answer is not there yet."""
        if self.reply.status in ("queued", "in_progress"):
            raise BadRequest(
                "previous_response_id: that response is not finished yet",
                remedy="Wait for it: GET /v1/responses/{id}",
                param="previous_response_id",
            )
        return [*self.items, *(msgspec.to_builtins(item) for item in self.reply.output)]


class ResponseStore:
    """What is oldest goes first when there is too much."""

    def __init__(
        self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES, max_age_s: float = MAX_AGE_S
    ) -> None:
        self._entries: OrderedDict[str, Stored] = OrderedDict()
        self._size_bytes = 0
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s

    def weigh(self, stored: Stored) -> None:
        """It has changed; if it is still here, its size counts anew."""
        if self._entries.get(stored.reply.id) is stored:
            self.put(stored)

    def put(self, stored: Stored) -> None:
        self._remove(stored.reply.id)
        stored.stored_at_s = time.monotonic()
        stored.size_bytes = len(msgspec.json.encode([stored.reply, stored.items]))
        self._entries[stored.reply.id] = stored
        self._size_bytes += stored.size_bytes
        self._forget()

    def get(self, response_id: str) -> Stored:
        """Raises ResponseNotFound for what was never stored, deleted or forgotten."""
        self._forget()
        found = self._entries.get(response_id)
        if found is None:
            raise ResponseNotFound(
                f"no response {response_id[:80]!r} is stored here",
                remedy=f"Responses are kept for {self._max_age_s / 3600:g} hours at most, and until the server ends",
            )
        return found

    def delete(self, response_id: str) -> None:
        task = self.get(response_id).task
        if task is not None:
            task.cancel()
        self._remove(response_id)

    def _remove(self, response_id: str) -> None:
        gone = self._entries.pop(response_id, None)
        if gone is not None:
            self._size_bytes -= gone.size_bytes

    def _forget(self) -> None:
        oldest_s = time.monotonic() - self._max_age_s
        for response_id, stored in list(self._entries.items()):
            too_much = len(self._entries) > self._max_responses or self._size_bytes > self._max_bytes
            if not too_much and stored.stored_at_s >= oldest_s:
                return
            if stored.task is None or stored.task.done():
                self._remove(response_id)
