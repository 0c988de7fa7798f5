"""What the API needs of the place where models come from and are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

Show = Callable[[int, int], None]
"""Told the bytes that are here and those of the whole; an error that it raises ends the pull."""


class Hub(Protocol):
    """All calls block their thread, and raise a PagodaError whose status says what went wrong."""

    def pull(self, name: str, show: Show) -> None: ...
    def delete(self, name: str) -> None: ...
    def created(self, name: str) -> str | None:
        """The path of the model of this name that was made of files."""
        ...

    def keep(self, name: str, files: Mapping[str, Path], texts: Mapping[str, str]) -> str:
        """The path of a model of that name, made of these files and texts by the names that they get."""
        ...

    def architecture(self, path: Path) -> str | None:
        """What a GGUF file says it is of; None for another kind of file."""
        ...

    def check_template(self, source: str) -> None:
        """BadRequest for a chat template that is no Jinja, as Ollama's own are not."""
        ...
