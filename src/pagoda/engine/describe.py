"""What an engine tells of the model that it has loaded."""

from __future__ import annotations

import time
from collections import Counter

from pagoda.arch.spec import ModelSpec
from pagoda.backend.base import Capacity, Limits
from pagoda.engine.messages import ModelInfo
from pagoda.options.engine_config import EngineConfig
from pagoda.options.formats import QUANTIZE_ON_LOAD_GPU
from pagoda.types import BLOCK_SIZE
from pagoda.weights.grouped import OrderedTensor
from pagoda.weights.source import TensorSource


def weight_types(source: TensorSource, quantization: str | None = None) -> str:
    """The types that the weights are stored in, largest share first; those under one percent are left out."""
    sizes: Counter[str] = Counter()
    for tensor in source.tensors.values():
        stored = tensor.packed if isinstance(tensor, OrderedTensor) else tensor
        sizes[stored.type] += stored.nbytes
    types = ", ".join(name for name, size in sizes.most_common() if size * 100 >= sizes.total())
    return f"{types} as {quantization}" if quantization in QUANTIZE_ON_LOAD_GPU else types


def _width(spec: ModelSpec) -> int:
    """Numbers that a pooled model gives for a text."""
    if spec.pooling is None:
        return 0
    last = spec.pooling.projections[-1].width if spec.pooling.projections else spec.hidden_size
    return spec.pooling.labels or last


def describe(
    config: EngineConfig,
    limits: Limits,
    capacity: Capacity,
    spec: ModelSpec,
    source: TensorSource,
    max_model_len: int,
    started: float,
) -> ModelInfo:
    return ModelInfo(
        model=config.model,
        architecture=spec.model_type,
        vocab_size=spec.vocab_size,
        max_model_len=max_model_len,
        model_max_len=spec.max_position,
        num_blocks=capacity.num_blocks,
        block_size=BLOCK_SIZE,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        weight_bytes=capacity.weight_bytes,
        kv_bytes=capacity.kv_bytes,
        activation_bytes=capacity.activation_bytes,
        device=capacity.device,
        weight_types=weight_types(source, config.quantization),
        eos_token_ids=spec.eos_token_ids,
        load_s=time.monotonic() - started,
        task="generate" if spec.pooling is None else "score" if spec.pooling.labels else "embed",
        width=_width(spec),
        sees=spec.vision is not None,
    )
