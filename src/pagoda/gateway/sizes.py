"""What each of several models takes of the memory, by `pagoda plan`'s arithmetic, so that they fit together."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pagoda.arch.memory import DEFAULT_SHARE
from pagoda.backend.cpu.machine import free_memory_bytes
from pagoda.deploy.plan.machines import Machine
from pagoda.deploy.plan.model import planned_model
from pagoda.deploy.plan.plan import Plan, make_plan
from pagoda.deploy.probe import nvidia_gpus
from pagoda.errors import MemoryShort
from pagoda.options.config import Options

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Sized:
    """A model with what is known of it before it is loaded. `options` are those of its own server."""

    name: str
    path: str
    options: Options
    need_bytes: int
    weight_bytes: int
    context: int
    architecture: str
    quantization: str


def machine_here(options: Options) -> Machine:
    """The GPUs, where the engine would take them, or else the CPU with the memory that is free now."""
    if options.device in ("auto", "cuda") and importlib.util.find_spec("torch") is not None:
        gpus = nvidia_gpus().gpus
        if gpus:
            return Machine(gpus[0].name, min(gpu.total_mib for gpu in gpus) * _MIB, len(gpus))
    return Machine("this CPU", free_memory_bytes())


def budget_bytes(options: Options, machine: Machine) -> int:
    """What all models together may take."""
    share = DEFAULT_SHARE if options.gpu_memory_utilization is None else options.gpu_memory_utilization
    return int(machine.memory_bytes * share)


def sized(models: Sequence[tuple[Options, str]], machine: Machine) -> list[Sized]:
    """Each model (its options and path) gets an equal part of the memory or, where that is too little, all of it.

    Raises MemoryShort for one that could not be loaded even alone.
    """
    return [_sized(options, path, machine, len(models)) for options, path in models]


def _sized(options: Options, path: str, machine: Machine, parts: int) -> Sized:
    config = options.engine_config(path)
    model = planned_model(Path(path), config.task)
    copies = 1 if machine.count else options.replicas
    gpus = options.tensor_parallel_size if machine.count else None
    for share in (parts, 1):
        part = replace(machine, memory_bytes=machine.memory_bytes // (share * copies))
        plan = make_plan(model, config, part, gpus)
        if plan.fits:
            break
    else:
        raise _too_large(options, plan)
    given = (options.kv_cache_memory_bytes, options.num_gpu_blocks_override)
    own = replace(options, kv_cache_memory_bytes=plan.kv_bytes) if given == (None, None) and plan.kv_bytes else options
    return Sized(
        name=(options.served_model_name or (options.model or path,))[0],
        path=path,
        options=own,
        need_bytes=plan.needed_bytes * copies,
        weight_bytes=plan.weight_bytes,
        context=plan.context,
        architecture=model.spec.model_type,
        quantization=model.method or next(iter(model.tensors.values())).type,
    )


def _too_large(options: Options, plan: Plan) -> MemoryShort:
    cures = [f"--{name} {value}" for cure in plan.cures for name, value in cure.items()]
    return MemoryShort(
        f"the model {options.model} does not fit on {plan.machine.name}, even alone: it needs "
        f"{plan.needed_bytes >> 20} MiB, and {plan.usable_bytes >> 20} MiB may be used",
        remedy=f"Give it {' or '.join(cures)}" if cures else "Leave it out, or take a smaller quantization of it",
    )
