"""Loads the LoRA adapters that requests wait for: one at a time between steps, so that streams go on meanwhile."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence

import msgspec

from pagoda.arch.lora import AdapterWeights, check_adapters, read_adapter
from pagoda.arch.spec import ModelSpec
from pagoda.backend.base import Executor
from pagoda.errors import BadRequest, ConfigError, PagodaError
from pagoda.options.config import Options
from pagoda.options.engine_config import EngineConfig
from pagoda.sched.scheduler import Scheduler
from pagoda.types import Adapter, Delta, Request
from pagoda.weights.lora import find_adapter

_log = logging.getLogger(__name__)


def named_adapters(modules: Sequence[str]) -> tuple[list[Adapter], dict[str, str]]:
    """The adapters of --lora-modules, and by name the models that some say they are for.

    Raises ConfigError for what is written wrong, ModelError for what is not there.
    """
    adapters: list[Adapter] = []
    parents: dict[str, str] = {}
    for module in modules:
        name, path, parent = _module(module)
        if any(name == other.name for other in adapters):
            raise ConfigError(f"--lora-modules names {name} twice", remedy="Give each adapter a name of its own")
        adapters.append(find_adapter(name, path))
        if parent:
            parents[name] = parent
    return adapters, parents


def adapter_names(modules: Sequence[str]) -> list[str]:
    return [_module(module)[0] for module in modules]


def with_adapters(config: EngineConfig, options: Options) -> EngineConfig:
    """The engine's part of the options, with the adapters that come with the model."""
    adapters, _ = named_adapters(options.lora_modules)
    return msgspec.structs.replace(config, adapters=tuple(adapters))


def _module(text: str) -> tuple[str, str, str]:
    """Name, path, and the model that it is for, if it says so."""
    if text.startswith("{"):
        try:
            table = json.loads(text)
        except ValueError:
            table = {}
        found = [table.get(key, "") for key in ("name", "path", "base_model_name")]
    else:
        found = [*text.partition("=")[::2], ""]
    name, path, parent = (each if isinstance(each, str) else "" for each in found)
    if not name or not path:
        raise ConfigError(
            f"--lora-modules: {text} names no adapter",
            remedy='Write it as NAME=PATH, or as \'{"name": NAME, "path": PATH}\'',
        )
    return name, path, parent


class Adapters:
    """Those of one model. Raises ConfigError where it takes none."""

    def __init__(self, config: EngineConfig, spec: ModelSpec, *, gguf: bool) -> None:
        self._config, self._spec, self._gguf = config, spec, gguf
        if not config.max_loras:
            return
        check_adapters(spec)
        if config.tensor_parallel_size > 1:
            raise ConfigError(
                "--enable-lora: adapters are not shared by several GPUs", remedy="Leave --tensor-parallel-size out"
            )

    def begin(self, scheduler: Scheduler, executor: Executor) -> None:
        """Load those that come with the model, as many as there are places; the others are read to see that they can
        be."""
        for place, adapter in enumerate(self._config.adapters):
            if place < self._config.max_loras:
                self._load(place, adapter, scheduler, executor)
            else:
                self._read(adapter)

    def check(self, request: Request) -> None:
        if request.adapter is not None and not self._config.max_loras:
            raise BadRequest("this engine was started without LoRA adapters", remedy="Give --enable-lora")

    def load_next(self, scheduler: Scheduler, executor: Executor) -> list[Delta]:
        """Load the adapter that is needed next. Where that fails, all that need it end."""
        wanted = scheduler.wanted_adapter()
        if wanted is None:
            return []
        place, adapter = wanted
        try:
            self._load(place, adapter, scheduler, executor)
        except Exception as error:
            _log.exception("the LoRA adapter %r cannot be loaded", adapter.name)
            told = error.message if isinstance(error, PagodaError) else "the engine failed to load a LoRA adapter"
            failed = scheduler.needing(adapter)
            for request_id in failed:
                scheduler.cancel(request_id)
            return [Delta(request_id=request_id, finish_reason="error", error=told) for request_id in failed]
        return []

    def _load(self, place: int, adapter: Adapter, scheduler: Scheduler, executor: Executor) -> None:
        weights = self._read(adapter)
        scheduler.places.put(place, None)
        executor.adapt(place, weights)
        scheduler.places.put(place, adapter)

    def _read(self, adapter: Adapter) -> AdapterWeights:
        return read_adapter(adapter, self._spec, gguf=self._gguf, max_rank=self._config.max_lora_rank)
