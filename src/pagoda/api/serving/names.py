"""Which model a request means: the served names, matched as tolerantly as is safe."""

from __future__ import annotations

from collections.abc import Sequence

from pagoda.errors import ModelNotFound


class ServedNames:
    """A table of names; what a client sends is only ever looked up here, never used as a path.

    The model has names of its own, and others may be added to them while the server runs.
    """

    def __init__(self, names: Sequence[str], root: str) -> None:
        self._own = tuple(names)
        self._exact = {name: name for name in names}
        self._whole = {_plain(name): name for name in reversed((*names,))}
        self._base = {_base(name): name for name in reversed((*names,))}
        self._whole.setdefault(_plain(root), self._own[0])
        self._base.setdefault(_base(root), self._own[0])
        self._added: dict[str, str] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return (*self._own, *self._added.values())

    def is_own(self, name: str) -> bool:
        return name in self._exact or _plain(name) in self._whole

    def has(self, name: str) -> bool:
        """Whether one of the names is this, the model's own or an added one."""
        return self.is_own(name) or _plain(name) in self._added

    def add(self, name: str) -> None:
        self._added[_plain(name)] = name

    def remove(self, name: str) -> None:
        del self._added[_plain(name)]

    def resolve(self, wanted: str | None) -> str:
        """The served name that `wanted` means; none or an empty one means the first. Raises ModelNotFound."""
        if wanted is None or not wanted.strip():
            return self._own[0]
        found = self.find(wanted)
        if found is None:
            raise not_served(wanted, self.names)
        return found

    def find(self, wanted: str) -> str | None:
        plain = _plain(wanted)
        return (
            self._exact.get(wanted) or self._whole.get(plain) or self._added.get(plain) or self._base.get(_base(wanted))
        )


def not_served(wanted: str, names: Sequence[str]) -> ModelNotFound:
    return ModelNotFound(f"the model {wanted[:200]!r} is not served here. Served: {', '.join(names)}", param="model")


def _plain(name: str) -> str:
    return name.strip().casefold().removesuffix(":latest").strip("/").removeprefix("./")


def _base(name: str) -> str:
    return _plain(name).rpartition("/")[2].removesuffix(".gguf")
