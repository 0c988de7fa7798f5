"""Models that clients made of the served one: a name with a system prompt, first messages and parameters of its own."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from pagoda.api.serving.kept import DiskFull, load_all, write_whole
from pagoda.api.serving.names import ServedNames
from pagoda.errors import BadRequest, TooLarge

MAX_DERIVED = 1000
MAX_DERIVED_BYTES = 1 << 20
_SYSTEM = ("system", "developer")


class Derived(msgspec.Struct, kw_only=True):
    """`root` is the path of the model that it is made of, `parent` the name it was made from (none: from files),
    `adapter` that of the LoRA adapter it is used with.

    `options` are its parameters as the client named them, `params` the same as defaults of sampling.
    """

    name: str
    parent: str
    adapter: str = ""
    created: float
    root: str = ""
    system: str = ""
    messages: list[dict[str, Any]] = []
    options: dict[str, Any] = {}
    params: dict[str, Any] = {}
    license: str = ""


class DerivedModels:
    """Those of one served model, each in a file of its own; without a folder they end with the server."""

    def __init__(self, served: ServedNames, root: str, folder: Path | None) -> None:
        self._served = served
        self._root = os.path.realpath(root)
        self._folder = folder
        self._made: dict[str, Derived] = {}
        kept = load_all(folder, Derived) if folder is not None else {}
        for each in sorted(kept.values(), key=lambda made: (made.created, made.name)):
            if each.root != self._root:
                continue
            if served.is_own(each.name):  # a model of files, as it was made
                self._made[served.resolve(each.name)] = each
            elif not served.has(each.name):
                self._know(each)

    def get(self, name: str) -> Derived | None:
        """By the name that `ServedNames` resolved."""
        return self._made.get(name)

    def params(self, name: str) -> Mapping[str, Any]:
        made = self._made.get(name)
        return {} if made is None else made.params

    def system(self, name: str) -> str:
        made = self._made.get(name)
        return "" if made is None else made.system

    def begin(self, name: str, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages behind those that the model begins with; a system message of the request's replaces its own."""
        made = self._made.get(name)
        if made is None:
            return list(messages)
        systems = [message for message in messages if message.get("role") in _SYSTEM]
        if made.system and not systems:
            systems = [{"role": "system", "content": made.system}]
        return [*systems, *made.messages, *(message for message in messages if message.get("role") not in _SYSTEM)]

    def put(self, made: Derived) -> None:
        """Keep it, in place of the one that has this name. Raises a PagodaError where that cannot be."""
        made.root = self._root
        if self._served.is_own(made.name):
            raise BadRequest(f"{made.name[:200]!r} is what the served model itself is called", param="model")
        if self._served.has(made.name) and made.name not in self._made:
            raise BadRequest(f"{made.name[:200]!r} is what a LoRA adapter is called here", param="model")
        if len(self._made) >= MAX_DERIVED and made.name not in self._made:
            raise TooLarge(f"{MAX_DERIVED} models may be made of one", remedy="Delete some with DELETE /api/delete")
        self._write(made)
        self._know(made)

    def keep(self, made: Derived, root: str) -> None:
        """The same for a model that is not served now, whose path this is."""
        made.root = os.path.realpath(root)
        self._write(made)

    def forget(self, name: str, root: str) -> None:
        if self._folder is not None:
            self._path(self._folder, name, os.path.realpath(root)).unlink(missing_ok=True)

    def delete(self, name: str) -> None:
        """By the name that `ServedNames` resolved."""
        if self._folder is not None:
            self._path(self._folder, name, self._root).unlink(missing_ok=True)
        del self._made[name]
        self._served.remove(name)

    def _know(self, made: Derived) -> None:
        self._served.add(made.name)
        self._made[made.name] = made

    def _write(self, made: Derived) -> None:
        if len(msgspec.json.encode(made)) > MAX_DERIVED_BYTES:
            raise TooLarge(f"what a model begins with may hold {MAX_DERIVED_BYTES >> 20} MiB")
        if self._folder is None:
            return
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_whole(self._path(self._folder, made.name, made.root), made)
        except (OSError, DiskFull) as error:
            raise DiskFull(f"the model can't be stored: {error}", remedy="Set PAGODA_CACHE to a folder") from None

    def _path(self, folder: Path, name: str, root: str) -> Path:
        held = hashlib.sha256(f"{root}\0{name}".encode()).hexdigest()
        return folder / f"{held}.json"
