"""Who may change what a server has: models that are fetched, made and removed, and adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pagoda.api.http.auth import Forbidden


class Access(Protocol):
    """Who can reach a server."""

    @property
    def local(self) -> bool: ...
    @property
    def api_keys(self) -> Sequence[str]: ...


def check_may_change(server: Access) -> None:
    """Raises Forbidden where anybody could do it."""
    if not server.local and not server.api_keys:
        raise Forbidden(
            "everyone can reach this server, so it fetches, makes and removes no models",
            remedy="Start it with --api-key KEY, or type pagoda pull NAME on its machine",
        )
