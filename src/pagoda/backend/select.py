"""From the name of a device to an executor that has the model loaded."""

from __future__ import annotations

import importlib
from types import MappingProxyType
from typing import cast

from pagoda.arch.spec import ModelSpec
from pagoda.backend.base import Executor, Limits, Progress
from pagoda.errors import ConfigError
from pagoda.weights.source import TensorSource

_EXECUTORS = MappingProxyType(
    {
        "auto": ("pagoda.backend.cpu.executor", "CpuExecutor"),
        "cpu": ("pagoda.backend.cpu.executor", "CpuExecutor"),
        "reference": ("pagoda.backend.reference", "ReferenceExecutor"),
    }
)


def load_executor(
    device: str, spec: ModelSpec, source: TensorSource, limits: Limits, progress: Progress | None = None
) -> Executor:
    """Load the model for a device: "auto" (the CPU), "cpu" (native) or "reference" (numpy)."""
    if device == "cuda":
        raise ConfigError("the CUDA backend is not here yet; use --device cpu", param="device")
    if device not in _EXECUTORS:
        raise ConfigError(
            f"unknown device {device!r}", remedy=f"Choose one of: {', '.join(_EXECUTORS)}", param="device"
        )
    module, name = _EXECUTORS[device]
    if device == "reference" and spec.encoder is not None:
        module, name = "pagoda.backend.reference_encoder", "ReferenceEncoder"
    # Imported only now: a backend may need a library that a machine without its device lacks.
    executor_class = getattr(importlib.import_module(module), name)
    return cast(Executor, executor_class.load(spec, source, limits, progress))
