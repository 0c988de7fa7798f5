"""The LoRA adapters of the served model: each is a model of its own to clients, and requests name it as `model`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pagoda.api.serving.names import ServedNames
from pagoda.errors import BadRequest, ConfigError, ModelError, ModelNotFound
from pagoda.types import Adapter
from pagoda.weights.lora import find_adapter


@dataclass(frozen=True, kw_only=True)
class LoraSide:
    """What the server knows of adapters at its start. `parents`: by name, the models that some say they are for.

    `check` raises ModelError for one that the model cannot use. Below `root` clients may load others; None: they may
    not.
    """

    adapters: tuple[Adapter, ...] = ()
    parents: Mapping[str, str] = field(default_factory=dict)
    check: Callable[[Adapter], object]
    root: Path | None = None


class ServedAdapters:
    """Those that are loaded, by name."""

    def __init__(self, served: ServedNames, side: LoraSide | None) -> None:
        self._served, self._side = served, side
        self._known: dict[str, Adapter] = {}
        for adapter in () if side is None else side.adapters:
            if served.has(adapter.name):
                raise ConfigError(
                    f"--lora-modules: {adapter.name} is what the model itself is called",
                    remedy="Give the adapter another name, or the model one with --served-model-name",
                )
            self._add(adapter)

    @property
    def may_change(self) -> bool:
        """Whether clients may load and unload."""
        return self._side is not None and self._side.root is not None

    def get(self, name: str) -> Adapter | None:
        """By the name that `ServedNames` resolved."""
        return self._known.get(name)

    def need(self, name: str) -> Adapter | None:
        """The adapter that a model made of one stands on; "" stands on none. Raises ModelNotFound where it is gone."""
        if not name:
            return None
        if name not in self._known:
            raise ModelNotFound(f"the LoRA adapter {name!r}, which this model is made of, is not loaded", param="model")
        return self._known[name]

    def parent(self, name: str) -> str:
        """The model that an adapter says it is for; "" if it does not."""
        return "" if self._side is None else self._side.parents.get(name, "")

    def load(self, name: str, path: str, *, again: bool) -> None:
        """Take an adapter in, in place of one of this name where `again`. Reads its files: call it in a thread."""
        side, known = self._changing(), name in self._known
        if known and not again:
            raise BadRequest(
                f"the LoRA adapter {name!r} is loaded already",
                remedy='Unload it first, or send "load_inplace": true',
                param="lora_name",
            )
        if not known and self._served.has(name):
            raise BadRequest(f"{name!r} is what another model is called here", param="lora_name")
        place = Path(os.path.realpath(path))
        if side.root is None or not place.is_relative_to(os.path.realpath(side.root)):
            raise BadRequest(
                "lora_path must lie below the folder that adapters are loaded from",
                remedy="Start the server with --lora-dir FOLDER",
                param="lora_path",
            )
        try:
            adapter = find_adapter(name, str(place))
            side.check(adapter)
        except ModelError as error:
            raise BadRequest(error.message, remedy=error.remedy, param="lora_path") from None
        self._add(adapter)

    def unload(self, name: str) -> None:
        """Requests that run go on with it."""
        self._changing()
        if name not in self._known:
            raise ModelNotFound(f"the LoRA adapter {name!r} is not loaded", param="lora_name")
        del self._known[name]
        self._served.remove(name)

    def _changing(self) -> LoraSide:
        if self._side is None or self._side.root is None:
            raise BadRequest("this server loads no adapters", remedy="Start it with --allow-runtime-lora-updating")
        return self._side

    def _add(self, adapter: Adapter) -> None:
        self._known[adapter.name] = adapter
        self._served.add(adapter.name)
