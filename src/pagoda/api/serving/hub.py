"""What the API needs of the place where models come from and are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

Show = Callable[[int, int], None]
"""Told the bytes that are here and those of the whole; an error that it raises ends the pull."""


class Hub(Protocol):
    """Both calls block their thread, and raise a PagodaError whose status says what went wrong."""

    def pull(self, name: str, show: Show) -> None: ...
    def delete(self, name: str) -> None: ...
