"""`pagoda plan`: what a model takes of a machine's memory, what fits, and what would make it fit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from pagoda.arch import memory, sharding
from pagoda.arch.lora import adapters_bytes
from pagoda.backend.base import Limits
from pagoda.backend.cpu import buffers, executor, program
from pagoda.deploy.plan.machines import Machine
from pagoda.deploy.plan.model import PlannedModel, packed, planned_model
from pagoda.engine.draft_limits import draft_limits
from pagoda.engine.limits import resolve_limits
from pagoda.errors import ConfigError, MemoryShort
from pagoda.options.engine_config import EngineConfig
from pagoda.options.formats import KV_EIGHT_BITS, QUANTIZE_ON_LOAD, QUANTIZE_ON_LOAD_GPU
from pagoda.types import BLOCK_SIZE
from pagoda.weights import device_size
from pagoda.weights.grouped import MadeTensor
from pagoda.weights.source import Tensor

_SHORT_CONTEXT = 2048
_CONTEXTS = (_SHORT_CONTEXT, 8192, 32768, 131072)
_MOST_SHARE_GPU = 0.95
# What the two processes take beside the model, measured with vocabularies of 30, 49 and 152 thousand tokens: their
# own memory, what they touch of Python and its libraries, and of each token the tokenizer and a GGUF file's tables.
_PROCESS_BYTES, LIBRARY_BYTES, _TOKEN_BYTES, GGUF_TOKEN_BYTES = 56 << 20, 10 << 20, 256, 40
_BITS, _FP8 = {"U8G": 8, "U4G": 4}, "F8_E4M3"


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes are those of each GPU, or of the CPU's free memory; `activation_bytes` with the states of requests.

    `blocks` is what the engine would take for its cache, `most_blocks` what would fit; `context` is the longest
    context it would serve, `longest_context` what would fit at most; `wanted_context` is what was asked for, else a
    short one. `cures`: options with which it fits.
    """

    machine: Machine
    share: float
    gpus: int
    weight_bytes: int
    activation_bytes: int
    overhead_bytes: int
    image_bytes: int
    draft_bytes: int
    block_bytes: int
    blocks: int
    most_blocks: int
    limits: Limits
    context: int
    longest_context: int
    wanted_context: int
    fits: bool
    parallel_sizes: tuple[int, ...] = ()
    quantization: str | None = None
    cures: tuple[Mapping[str, str], ...] = ()

    @property
    def usable_bytes(self) -> int:
        """The share; on a CPU, of what the processes and a draft model leave free."""
        first = 0 if self.gpus else min(self.overhead_bytes + self.draft_bytes, self.machine.memory_bytes)
        return first + int((self.machine.memory_bytes - first) * self.share)

    @property
    def fixed_bytes(self) -> int:
        """All but the cache."""
        return self.weight_bytes + self.activation_bytes + self.overhead_bytes + self.image_bytes + self.draft_bytes

    @property
    def kv_bytes(self) -> int:
        return self.blocks * self.block_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        return self.block_bytes // BLOCK_SIZE

    @property
    def needed_bytes(self) -> int:
        """With the cache that is planned, or where nothing fits, with that of one request."""
        cache = self.kv_bytes or memory.blocks_for(self.wanted_context) * self.block_bytes
        return self.fixed_bytes + cache

    def parallel(self) -> dict[int, int]:
        """Context in tokens -> requests of that length that run at once."""
        contexts = sorted({*(c for c in _CONTEXTS if c < self.context), self.context} - {0})
        return {c: min(self.limits.max_num_seqs, self.blocks // memory.blocks_for(c)) for c in contexts}


def make_plan(model: PlannedModel, config: EngineConfig, machine: Machine, gpus: int | None = None) -> Plan:
    """The plan with what was asked for and, where that does not fit, what would."""
    plan = _plan(model, config, machine, gpus)
    return plan if plan.fits else replace(plan, cures=tuple(_cures(model, config, machine, plan)))


def _plan(model: PlannedModel, config: EngineConfig, machine: Machine, gpus: int | None) -> Plan:
    return _gpu_plan(model, config, machine, gpus) if machine.count else _cpu_plan(model, config, machine)


def _cpu_plan(model: PlannedModel, config: EngineConfig, machine: Machine) -> Plan:
    """The arithmetic of backend.cpu.executor."""
    asked, model = _as_asked(model, config.quantization, QUANTIZE_ON_LOAD)
    program.check_spec(model.spec)
    limits = resolve_limits(config, model.spec)
    kv_type = memory.kv_type(limits.kv_cache_dtype)
    seeing, language = _parted(model)
    weights = executor.weight_bytes(language, asked) + adapters_bytes(model.spec, limits)
    work = buffers.buffer_bytes(model.spec, limits.max_num_batched_tokens)
    draft = _draft_bytes(config, limits, machine)
    processes = _PROCESS_BYTES + LIBRARY_BYTES + _TOKEN_BYTES * model.spec.vocab_size + _table_bytes(model)
    images = executor.weight_bytes(seeing, asked, model.spec.vision) + memory.vision_bytes(
        model.spec, limits.max_model_len
    )
    try:
        blocks, kept = memory.fit(
            model.spec,
            limits,
            free_bytes=max(0, machine.memory_bytes - draft - processes),
            weight_bytes=weights + images,
            activation_bytes=work,
            kv_type=kv_type,
        )
    except MemoryShort:
        blocks, kept = 0, 0
    if config.max_model_len is not None and blocks < memory.blocks_for(config.max_model_len):
        blocks = 0  # the engine refuses a length that was asked for, where the model's own is cut
    work += (limits.max_num_seqs + kept) * memory.state_bytes(model.spec)
    share = memory.DEFAULT_SHARE if config.memory_share is None else config.memory_share
    block_bytes = memory.kv_bytes_per_block(model.spec, kv_type)
    return _filled(
        machine, share, 0, (weights, work, processes, images, draft), block_bytes, blocks, limits, model, config
    )


def _gpu_plan(model: PlannedModel, config: EngineConfig, machine: Machine, gpus: int | None) -> Plan:
    quantization, model = _as_asked(model, config.quantization, QUANTIZE_ON_LOAD_GPU)
    limits = resolve_limits(msgspec.structs.replace(config, device="cuda"), model.spec)
    sizes = sharding.parallel_sizes(model.spec, machine.count, _group_of(model))
    size = gpus or (1 if limits.max_loras else max(sizes))
    if size not in sizes:
        raise ConfigError(
            f"--tensor-parallel-size {size} cannot work on {machine.name}: heads and matrices do not divide by it",
            remedy=f"Sizes that work: {', '.join(map(str, sizes))}",
        )
    item = 4 if config.dtype == "float32" else 2
    seeing, language = (
        {slot: _gpu_bytes(slot, t, quantization, model.group, item) for slot, t in part.items()}
        for part in _parted(model)
    )
    weights = sharding.weight_bytes(model.spec, language, size) + adapters_bytes(model.spec, limits, item)
    vision_work = memory.vision_bytes(model.spec, limits.max_model_len, item)
    work = sharding.activation_bytes(model.spec, limits, size, item) - vision_work
    state_bytes = sharding.state_bytes(model.spec, size)
    work += limits.max_num_seqs * state_bytes
    overhead, images = sharding.overhead_bytes(size), sum(seeing.values()) + vision_work
    share = memory.DEFAULT_SHARE if config.memory_share is None else config.memory_share
    kv_item = 1 if limits.kv_cache_dtype in KV_EIGHT_BITS else item
    block_bytes = sharding.kv_bytes_per_block(model.spec, size, kv_item)
    draft = _draft_bytes(config, limits, machine)
    left = int(machine.memory_bytes * share) - weights - work - overhead - images - draft
    one = memory.blocks_for(limits.max_model_len)
    kept_bytes = memory.kept_states(limits, state_bytes, left, one * block_bytes) * state_bytes
    work, most = work + kept_bytes, max(0, left - kept_bytes) // block_bytes
    blocks = most if config.max_model_len is None or most >= one else 0
    blocks = min(blocks, one * limits.max_num_seqs)
    parts = (weights, work, overhead, images, draft)
    plan = _filled(machine, share, size, parts, block_bytes, blocks, limits, model, config)
    return replace(plan, parallel_sizes=tuple(sizes))


def _draft_bytes(config: EngineConfig, limits: Limits, machine: Machine) -> int:
    """A draft model with its cache and its work."""
    if config.speculation is None or config.speculation.model is None:
        return 0
    model = planned_model(Path(config.speculation.model))
    own, blocks = draft_limits(config.speculation, limits, model.spec)
    if machine.count:
        item = 4 if config.dtype == "float32" else 2
        stored = (_gpu_bytes(slot, t, own.quantization, model.group, item) for slot, t in model.tensors.items())
        work = sharding.activation_bytes(model.spec, own, 1, item)
        kv_item = 1 if own.kv_cache_dtype in KV_EIGHT_BITS else item
        return sum(stored) + work + blocks * sharding.kv_bytes_per_block(model.spec, 1, kv_item)
    program.check_spec(model.spec)
    work = buffers.buffer_bytes(model.spec, own.max_num_batched_tokens)
    cache = blocks * memory.kv_bytes_per_block(model.spec, memory.kv_type(own.kv_cache_dtype))
    return executor.weight_bytes(model.tensors, own.quantization) + work + cache + _table_bytes(model)


def _table_bytes(model: PlannedModel) -> int:
    """Where each token and merge of a GGUF file lies, which the engine knows as long as the file is open."""
    return GGUF_TOKEN_BYTES * model.spec.vocab_size if model.method == "gguf" else 0


def _filled(
    machine: Machine,
    share: float,
    gpus: int,
    parts: tuple[int, int, int, int, int],
    block_bytes: int,
    blocks: int,
    limits: Limits,
    model: PlannedModel,
    config: EngineConfig,
) -> Plan:
    plan = Plan(
        machine=machine,
        share=share,
        gpus=gpus,
        weight_bytes=parts[0],
        activation_bytes=parts[1],
        overhead_bytes=parts[2],
        image_bytes=parts[3],
        draft_bytes=parts[4],
        block_bytes=block_bytes,
        blocks=blocks,
        most_blocks=0,
        limits=limits,
        context=min(limits.max_model_len, blocks * BLOCK_SIZE),
        longest_context=0,
        wanted_context=config.max_model_len or min(_SHORT_CONTEXT, model.spec.max_position),
        fits=blocks > 0,
        quantization=config.quantization,
    )
    left = max(0, plan.usable_bytes - plan.fixed_bytes)
    most = left // block_bytes if block_bytes else blocks  # an encoder has no cache
    return replace(plan, most_blocks=most, longest_context=min(model.spec.max_position, most * BLOCK_SIZE))


def _as_asked(
    model: PlannedModel, quantization: str | None, on_load: tuple[str, ...]
) -> tuple[str | None, PlannedModel]:
    """What to quantize on load, and the model; one in floats counts as its AWQ or GPTQ version where that is asked."""
    if quantization is None or quantization == model.method:
        return None, model
    if quantization in on_load and model.method is None:
        return quantization, model
    method = quantization.removesuffix("_marlin").removeprefix("auto_")
    if model.method is None and method in ("awq", "gptq", "fp8"):
        return None, packed(model, method)
    if method == model.method:
        return None, model
    raise ConfigError(
        f"--quantization {quantization} cannot be planned for weights in {model.method or 'floats'}",
        remedy="Leave --quantization out" if model.method else "Give int8, int4, awq or gptq",
    )


def _parted(model: PlannedModel) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """The tensors of the vision encoder, which is whole on each GPU, and those of the language model."""
    seeing = {slot: tensor for slot, tensor in model.tensors.items() if slot.startswith("vision.")}
    return seeing, {slot: tensor for slot, tensor in model.tensors.items() if slot not in seeing}


def _group_of(model: PlannedModel) -> int:
    return model.group if model.method in ("awq", "gptq") else 1


def _gpu_bytes(slot: str, tensor: Tensor, quantization: str | None, group: int, itemsize: int) -> int:
    """What a tensor takes on a GPU; packed ones of which config.json alone is known have even groups."""
    if tensor.type in _BITS and not isinstance(tensor, MadeTensor):
        groups = math.prod(tensor.shape[:-1]) * math.ceil(tensor.shape[-1] / group)
        return device_size.grouped_bytes(tensor, _BITS[tensor.type], groups, itemsize)
    if tensor.type == _FP8 and not isinstance(tensor, MadeTensor):
        quantization = "fp8"
    return device_size.tensor_bytes(slot, tensor, quantization, itemsize)


def _cures(model: PlannedModel, config: EngineConfig, machine: Machine, plan: Plan) -> Iterator[Mapping[str, str]]:
    """Options with which it fits, the least costly first."""
    if plan.most_blocks and config.max_model_len:
        yield {"max-model-len": str(min(config.max_model_len, plan.most_blocks * BLOCK_SIZE))}
    gpus = plan.gpus or None
    most_share = _MOST_SHARE_GPU if machine.count else memory.MOST_SHARE
    if plan.share < most_share and (share := _share_that_fits(plan)) <= most_share:
        yield {"gpu-memory-utilization": f"{share:.2f}"}
    if model.method is None and config.quantization is None:
        for quantization in ("int8", "awq", "int4") if machine.count else QUANTIZE_ON_LOAD:
            if _plan(model, msgspec.structs.replace(config, quantization=quantization), machine, gpus).fits:
                yield {"quantization": quantization}
    if machine.count:
        yield from _more_gpus(model, config, machine)


def _more_gpus(model: PlannedModel, config: EngineConfig, machine: Machine) -> Iterator[Mapping[str, str]]:
    wide = replace(machine, count=64)
    for size in sharding.parallel_sizes(model.spec, 64, _group_of(model)):
        if size > machine.count and _plan(model, config, wide, size).fits:
            yield {"tensor-parallel-size": str(size)}
            return


def _share_that_fits(plan: Plan) -> float:
    first = 0 if plan.gpus else plan.overhead_bytes + plan.draft_bytes
    need = plan.fixed_bytes - first + memory.blocks_for(plan.wanted_context) * plan.block_bytes
    free = plan.machine.memory_bytes - first
    return math.ceil(100 * need / free) / 100 if free > 0 else math.inf
