"""The native CPU executor: sizes the cache, loads a model into the library, runs each step as one call."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pagoda.arch import memory
from pagoda.arch.registry import bind
from pagoda.arch.spec import ModelSpec
from pagoda.backend.base import Capacity, Done, Limits, Progress
from pagoda.backend.cpu.encoder_program import EncoderProgram
from pagoda.backend.cpu.library import Native, matrix_bytes
from pagoda.backend.cpu.machine import free_memory_bytes, usable_cores
from pagoda.backend.cpu.program import VECTORS, Program, buffer_bytes, check_spec, in_their_order, panel_type
from pagoda.errors import ModelError
from pagoda.types import StepPlan
from pagoda.weights.files import drop_pages
from pagoda.weights.source import Tensor, TensorSource


class CpuExecutor:
    """See backend.base.Executor. Steps run in `launch`, on the calling thread and the library's own."""

    def __init__(self, lib: Native, capacity: Capacity) -> None:
        self._lib = lib
        self.capacity = capacity

    @classmethod
    def load(
        cls, spec: ModelSpec, source: TensorSource, limits: Limits, progress: Progress | None = None
    ) -> CpuExecutor:
        """Raises ModelError (a tensor is missing or cannot run) or, before any weight is read, MemoryShort."""
        if spec.encoder is None:
            check_spec(spec)
        if spec.vision is not None:
            raise ModelError("the CPU backend cannot see yet", remedy="Use --device cuda, or try --device reference")
        tensors = bind(spec, source)
        kv_type = memory.kv_type(limits.kv_cache_dtype)
        threads = limits.threads or usable_cores()
        blocks = memory.fit(
            spec,
            limits,
            free_bytes=max(0, free_memory_bytes() - limits.reserved_bytes),
            weight_bytes=weight_bytes(tensors, limits.quantization),
            activation_bytes=buffer_bytes(spec, limits.max_num_batched_tokens)
            + memory.vision_bytes(spec, limits.max_model_len),
            kv_type=kv_type,
        )
        lib = Native(threads)
        try:
            kind = Program if spec.encoder is None else EncoderProgram
            program = kind(lib, spec, tensors, progress, limits.quantization)
            program.finish(limits.max_num_batched_tokens, blocks, kv_int8=kv_type == "int8")
        except BaseException:
            lib.close()
            raise
        drop_pages(tensors.values(), files=True)  # the repacked weights are what is read from now on
        capacity = Capacity(
            num_blocks=blocks,
            weight_bytes=lib.weight_bytes,
            kv_bytes=blocks * memory.kv_bytes_per_block(spec, kv_type),
            activation_bytes=lib.activation_bytes,
            device=f"cpu ({lib.isa}, {threads} thread{'s' if threads > 1 else ''})",
        )
        return cls(lib, capacity)

    def launch(self, plan: StepPlan) -> Done:
        return Done(self._lib.run(plan))

    def prepare(self) -> bool:
        return False

    def close(self) -> None:
        self._lib.close()


def weight_bytes(tensors: Mapping[str, Tensor], quantization: str | None = None) -> int:
    """What the tensors take once they are repacked; vectors are kept in float32."""
    total = 0
    for slot, t in in_their_order(tensors)[0].items():
        if len(t.shape) > 1 and slot not in VECTORS:
            total += math.prod(t.shape[:-2]) * matrix_bytes(panel_type(slot, t, quantization), *t.shape[-2:])
        else:
            total += math.prod(t.shape) * 4
    return total
