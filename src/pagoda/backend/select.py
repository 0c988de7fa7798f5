"""From the name of a device to an executor that has the model loaded."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from pagoda.arch.spec import ModelSpec
from pagoda.backend.base import Executor, Limits, Progress
from pagoda.errors import ConfigError
from pagoda.options.check import check_one_device
from pagoda.weights.source import TensorSource

_EXECUTORS = MappingProxyType(
    {
        "cpu": ("pagoda.backend.cpu.executor", "CpuExecutor"),
        "cuda": ("pagoda.backend.torch.executor", "TorchExecutor"),
        "reference": ("pagoda.backend.reference", "ReferenceExecutor"),
        "torch-cpu": ("pagoda.backend.torch.executor", "TorchCpuExecutor"),
    }
)
_PARALLEL = MappingProxyType(
    {
        "cuda": ("pagoda.backend.torch.parallel", "ParallelExecutor"),
        "torch-cpu": ("pagoda.backend.torch.parallel", "ParallelCpuExecutor"),
    }
)
_RAY = MappingProxyType(
    {
        "cuda": ("pagoda.backend.torch.cluster", "RayExecutor"),
        "torch-cpu": ("pagoda.backend.torch.cluster", "RayCpuExecutor"),
    }
)
_OFFERED = ("auto", "cpu", "cuda", "reference")
_GPU_FILES = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg")  # the last under Windows' Linux
_EXTRA = "pip install 'pagoda-llm[cuda]'"
_NEEDED_BY = MappingProxyType(
    {
        "torch": ("--device cuda", _EXTRA),
        "triton": ("--device cuda", _EXTRA),
        "ray": ("--distributed-executor-backend ray", "pip install 'pagoda-llm[cuda,ray]', on each machine"),
    }
)

_log = logging.getLogger(__name__)


def resolve_device(device: str, spec: ModelSpec) -> str:
    """What "auto" is on this machine: "cuda" where PyTorch finds a GPU, else "cpu"."""
    if device != "auto":
        return device
    if not any(Path(file).exists() for file in _GPU_FILES):
        return "cpu"  # without asking PyTorch, which takes seconds to import
    if importlib.util.find_spec("torch") is None:
        _log.info("an NVIDIA GPU is here and PyTorch is not: the CPU computes. To use the GPU: %s", _EXTRA)
        return "cpu"
    if why := _imported("pagoda.backend.torch.device").no_gpu():
        _log.warning("an NVIDIA GPU is here, and %s: the CPU computes", why)
    return "cpu" if why else "cuda"


def load_executor(
    device: str, spec: ModelSpec, source: TensorSource, limits: Limits, progress: Progress | None = None
) -> Executor:
    """Load the model for a device: "auto", "cpu" (native), "cuda" or "reference" (numpy)."""
    device = resolve_device(device, spec)
    size = limits.tensor_parallel_size
    if device in _EXECUTORS and device not in _PARALLEL:
        check_one_device(size)
    if device not in _EXECUTORS:
        raise ConfigError(f"unknown device {device!r}", remedy=f"Choose one of: {', '.join(_OFFERED)}", param="device")
    several = _RAY if limits.distributed_executor_backend == "ray" else _PARALLEL
    module, name = (several if size > 1 else _EXECUTORS)[device]
    if device == "reference" and spec.encoder is not None:
        module, name = "pagoda.backend.reference_encoder", "ReferenceEncoder"
    if device == "reference" and spec.vision is not None:
        module, name = "pagoda.backend.reference_vision", "ReferenceVision"
    executor_class = getattr(_imported(module), name)
    return cast(Executor, executor_class.load(spec, source, limits, progress))


def _imported(module: str) -> Any:
    """Imported only now: a backend may need a library that a machine without its device lacks."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        name = error.name or ""
        if name not in _NEEDED_BY:
            raise
        option, extra = _NEEDED_BY[name]
        raise ConfigError(f"{option} needs {name}, which is not installed", remedy=f"Run: {extra}") from error
