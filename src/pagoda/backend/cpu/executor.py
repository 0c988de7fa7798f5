"""The native CPU executor: sizes the cache, loads a model into the library, runs each step as one call."""

from __future__ import annotations

import math
from collections.abc import Mapping

from pagoda.arch import memory
from pagoda.arch.lora import AdapterWeights, adapters_bytes
from pagoda.arch.registry import bind
from pagoda.arch.spec import ModelSpec
from pagoda.arch.vision_spec import Vision
from pagoda.backend.base import Capacity, Limits, Pending, Progress
from pagoda.backend.cpu.adapters import Products, adapted_products, native_pairs
from pagoda.backend.cpu.buffers import buffer_bytes
from pagoda.backend.cpu.encoder_program import EncoderProgram
from pagoda.backend.cpu.library import Native, matrix_bytes
from pagoda.backend.cpu.machine import free_memory_bytes, usable_cores
from pagoda.backend.cpu.panels import in_their_order, kind_of_cache, panel_type
from pagoda.backend.cpu.program import VECTORS, Program, check_spec
from pagoda.backend.cpu.vision import VisionEncoder, check_vision, split_tensors, vision_quantization
from pagoda.types import Float32, Image, Int32, StepPlan
from pagoda.weights.files import drop_pages
from pagoda.weights.source import Tensor, TensorSource

_AHEAD_BYTES = 48 << 20
"""So much of the cache, behind what was used, is taken from the system while nothing is asked: on a virtual machine a
new page of 2 MB may take 5 ms, and a prompt of SmolLM2 needs one for 90 tokens."""


class CpuExecutor:
    """See backend.base.Executor. Steps begin on the library's threads; the calling one joins them in `wait`."""

    def __init__(
        self, lib: Native, capacity: Capacity, vision: VisionEncoder | None = None, products: Products | None = None
    ) -> None:
        self._lib, self._vision, self._products = lib, vision, products or {}
        self.capacity = capacity

    @classmethod
    def load(
        cls, spec: ModelSpec, source: TensorSource, limits: Limits, progress: Progress | None = None
    ) -> CpuExecutor:
        """Raises ModelError (a tensor is missing or cannot run) or, before any weight is read, MemoryShort."""
        spec = spec.served(limits.max_model_len)
        check_spec(spec)
        if spec.vision is not None:
            check_vision(spec.vision)
        tensors = bind(spec, source)
        text, seeing = split_tensors(tensors, spec.vision)
        kv_type = memory.kv_type(limits.kv_cache_dtype)
        threads = limits.threads or usable_cores()
        image_bytes = memory.vision_bytes(spec, limits.max_model_len)
        blocks, kept = memory.fit(
            spec,
            limits,
            free_bytes=max(0, free_memory_bytes() - limits.reserved_bytes),
            weight_bytes=weight_bytes(tensors, limits.quantization, spec.vision) + adapters_bytes(spec, limits),
            activation_bytes=buffer_bytes(spec, limits.max_num_batched_tokens) + image_bytes,
            kv_type=kv_type,
        )
        states, lib, vision = limits.max_num_seqs + kept, Native(threads), None
        try:
            kind = Program if spec.encoder is None else EncoderProgram
            program = kind(lib, spec, text, progress, limits.quantization, limits.max_loras > 0)
            program.finish(limits.max_num_batched_tokens, blocks, kind_of_cache(limits.kv_cache_dtype, text), states)
            if spec.vision is not None:
                vision = VisionEncoder(spec, seeing, progress, threads, limits)
        except BaseException:
            lib.close()
            raise
        drop_pages(tensors.values(), files=True)  # the repacked weights are what is read from now on
        capacity = Capacity(
            num_blocks=blocks,
            weight_bytes=lib.weight_bytes + (vision.weight_bytes if vision else 0) + adapters_bytes(spec, limits),
            kv_bytes=blocks * memory.kv_bytes_per_block(spec, kv_type) + states * memory.state_bytes(spec),
            activation_bytes=lib.activation_bytes + image_bytes,
            device=f"cpu ({lib.isa}, {threads} thread{'s' if threads > 1 else ''})",
            kept_states=kept,
        )
        return cls(lib, capacity, vision, adapted_products(program.ids, text) if limits.max_loras else None)

    def launch(self, plan: StepPlan) -> Pending:
        self._lib.start(plan, images=self._seen(plan))
        return self._lib

    def run(self, plan: StepPlan, logits: Float32) -> None:
        """A step in one go, whose raw logits [L, vocab] are wanted too."""
        self._lib.run(plan, logits, self._seen(plan))

    def _seen(self, plan: StepPlan) -> tuple[Float32, Int32] | None:
        return self._vision.rows(plan.images, len(plan.tokens)) if self._vision and plan.images else None

    def encoded(self, image: Image, most_s: float) -> bool:
        return self._vision is None or self._vision.ready(image, most_s)

    def prepare(self) -> bool:
        return self._lib.touch(_AHEAD_BYTES)

    def adapt(self, place: int, weights: AdapterWeights) -> None:
        self._lib.adapt(place, native_pairs(self._products, weights))

    def close(self) -> None:
        self._lib.close()
        if self._vision is not None:
            self._vision.close()


def weight_bytes(tensors: Mapping[str, Tensor], quantization: str | None = None, vision: Vision | None = None) -> int:
    """What the tensors take once they are repacked; vectors are kept in float32."""
    text, seeing = split_tensors(tensors, vision)
    return _repacked_bytes(text, quantization) + _repacked_bytes(seeing, vision_quantization(quantization))


def _repacked_bytes(tensors: Mapping[str, Tensor], quantization: str | None) -> int:
    total = 0
    for slot, t in in_their_order(tensors)[0].items():
        kept = slot in VECTORS or slot.startswith("project.")
        if len(t.shape) > 1 and not kept and not slot.endswith(("_bias", "_conv")):
            total += math.prod(t.shape[:-2]) * matrix_bytes(panel_type(slot, t, quantization), *t.shape[-2:])
        else:
            total += math.prod(t.shape) * 4
    return total
